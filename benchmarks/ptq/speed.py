"""Milliseconds of files that files.py has made, anew: small and float files and eager torch in turns, one photo each.

python benchmarks/ptq/speed.py CASE ... [--work runs/proofs] [--threads 2] [--rounds 5]

Give it a machine that does nothing else. Writes benchmarks/results/ptq/speed_CASE.json: medians over rounds. Of dense
models also how long OpenVINO's profile says that convolutions and matrix products alone take at least, and how many
times as fast as eager torch the file would be if everything else cost nothing.
"""

import argparse
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from files import CASES, CIFAR, RESULTS, case_in
from testbeds import TESTBEDS

from denselab.compress.receipt import TORCH, both_times_ms
from denselab.compress.scoring import open_data, photos_to_compare
from denselab.compress.small_file import float_session
from denselab.compress.subject import Dense
from denselab.export.parity import open_engines
from denselab.files import write_json
from denselab.runtime.session import import_openvino

PRODUCTS = ("Convolution", "FullyConnected", "MatMul", "ScaledDotProductAttention")
"""What OpenVINO's profile calls what multiplies."""


def run(case: str, work: Path, threads: int, rounds: int) -> None:
    source, options = case_in(case, work)
    testbed = next(each for each in TESTBEDS.values() if each.source == source.removeprefix("timm:"))
    subject = testbed.subject(work)
    dense = isinstance(subject.kind, Dense)
    network_hw = subject.kind.loaded.network_hw if isinstance(subject.kind, Dense) else None
    data = open_data(subject, Path(options[options.index("--data") + 1]) if dense else CIFAR)
    photo = photos_to_compare(subject, data, ()).images[0]
    files = work / "files"
    small = open_engines(files / f"{case}.onnx", threads)
    full = open_engines(files / f"{case}.work" / "float.onnx", threads)
    eager = float_session(subject, network_hw)
    found = [both_times_ms(small, full, eager, photo) for _ in range(rounds)]
    small_ms, float_ms = (
        {name: round(median(each[side][name] for each in found), 3) for name in found[0][side]} for side in (0, 1)
    )
    best = min(small_ms, key=small_ms.__getitem__)
    record = {
        "command": f"python benchmarks/ptq/speed.py {case} --threads {threads} --rounds {rounds}",
        "photo_hw": list(photo.shape[:2]),
        "threads": threads,
        "small_ms": small_ms,
        "float_ms": float_ms,
        "times_as_fast_as_eager": round(float_ms[TORCH] / small_ms[best], 2),
    }
    if dense:
        alone_ms = products_ms(files / f"{case}.onnx", photo, threads, rounds)
        record["products_alone_ms"] = round(alone_ms, 3)
        record["times_as_fast_as_eager_at_most"] = round(float_ms[TORCH] / alone_ms, 2)
    write_json(RESULTS / f"speed_{case}.json", record)
    print(case, record, flush=True)


def products_ms(file: Path, photo: np.ndarray, threads: int, rounds: int) -> float:
    """What OpenVINO's profile says that all products of one photo take, the least of 10 runs per round."""
    options = {"INFERENCE_NUM_THREADS": threads, "PERF_COUNT": True, "PERFORMANCE_HINT": "LATENCY"}
    request: Any = import_openvino().Core().compile_model(str(file), "CPU", options).create_infer_request()
    found: list[float] = []
    for _ in range(10 * rounds):
        request.infer([photo[None]])
        nodes = request.profiling_info
        found.append(sum(node.real_time.total_seconds() for node in nodes if node.node_type in PRODUCTS))
    return 1000 * min(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", nargs="+", choices=CASES)
    parser.add_argument("--work", type=Path, default=Path("runs/proofs"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for case in args.case:
        run(case, args.work, args.threads, args.rounds)


if __name__ == "__main__":
    main()
