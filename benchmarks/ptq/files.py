"""Small files as a user gets them: bytes, scores and milliseconds, from the receipts of `denselab compress`.

python benchmarks/ptq/files.py [CASE ...] [--work runs/proofs]
python benchmarks/ptq/files.py --table

Writes benchmarks/results/ptq/file_CASE.json. Scores are of the file, in the engine that the receipt names, beside the
float network in torch, on the whole test split; times of one photo, small and float files in turns.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from testbeds import ROOT, SHARED

RESULTS = ROOT / "benchmarks" / "results" / "ptq"
CAMVID, CIFAR = SHARED / "camvid", SHARED / "cifar10" / "cifar10_18k_jpeg.zip"
ON_CAMVID = ["--calibrate", str(CAMVID / "images" / "train"), "--images", "32", "--data", str(CAMVID)]
ON_HALF_CAMVID = ["--calibrate", "WORK/half_camvid/images/train", "--images", "32", "--data", "WORK/half_camvid"]
ON_CIFAR = ["--calibrate", str(CIFAR), "--data", str(CIFAR)]
CASES = {
    "street_quarter": ("street", [*ON_CAMVID, "--budget", "0.25x", "--method", "minmax"]),
    "street_015": ("street", [*ON_CAMVID, "--budget", "0.15x"]),
    "camvid_vit_015": ("camvid_semantic_vit/best.ckpt", [*ON_HALF_CAMVID, "--budget", "0.15x"]),
    "cifar_vit_int8": ("timm:cifar/vit", [*ON_CIFAR, "--budget", "0.3x", "--method", "minmax"]),
    "cifar_vit_w4": ("timm:cifar/vit", [*ON_CIFAR, "--budget", "0.15x"]),
    "cifar_swin_int8": ("timm:cifar/swin", [*ON_CIFAR, "--budget", "0.35x", "--method", "minmax"]),
    "cifar_vit_ivit": ("timm:cifar/vit", [*ON_CIFAR, "--method", "i-vit"]),
}


def case_in(case: str, work: Path) -> tuple[str, list[str]]:
    """What is compressed, and the options, with the work folder in its place."""
    source, options = CASES[case]
    return source, [each.replace("WORK", str(work)) for each in options]


def run(case: str, work: Path) -> None:
    source, options = case_in(case, work)
    prefix = "timm:" if source.startswith("timm:") else ""
    if source != "street":
        source = f"{prefix}{work / source.removeprefix(prefix)}"
    files = work / "files"
    files.mkdir(parents=True, exist_ok=True)
    receipt = RESULTS / f"file_{case}.json"
    outputs = ["-o", str(files / f"{case}.onnx"), "--json", str(receipt), "--overwrite"]
    command = [sys.executable, "-m", "denselab", "compress", source, *options, *outputs]
    subprocess.run(command, check=True)
    written = json.loads(receipt.read_text("utf-8"))
    told = {"command": f"python benchmarks/ptq/files.py {case}", "options": " ".join(options)}
    receipt.write_text(
        json.dumps({**told, **written}, indent=2).replace(str(ROOT.parent), "..").replace(str(work), "WORK") + "\n",
        "utf-8",
    )


def table() -> str:
    """The receipts that are there, as Markdown."""
    lines = ["| case | of float bytes | score | float | small ms (float ms) |", "| --- | --- | --- | --- | --- |"]
    for file in sorted(RESULTS.glob("file_*.json")):
        found = json.loads(file.read_text("utf-8"))
        score = found["scores"][0]
        times = ", ".join(f"{name} {ms:.1f} ({found['float_ms'][name]:.1f})" for name, ms in found["small_ms"].items())
        of = found["file_bytes"] / found["float_bytes"]
        lines.append(
            f"| {file.stem.removeprefix('file_')} | {of:.3f} | {score['after']:.4f} {score['name']} "
            f"| {score['before']:.4f} | {times} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", nargs="*", choices=[*CASES, []])
    parser.add_argument("--table", action="store_true", help="print the results that are there, as Markdown")
    parser.add_argument("--work", type=Path, default=Path("runs/proofs"))
    args = parser.parse_args()
    if args.table:
        print(table())
        return
    for case in args.case or CASES:
        run(case, args.work)


if __name__ == "__main__":
    main()
