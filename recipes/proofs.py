"""Train a model for a fixed time on CPU cores and hold its score against a bar.

python recipes/proofs.py NAME [--work runs/proofs] [--threads 2] [--minutes M] [--resume]
python recipes/proofs.py --list

Writes benchmarks/results/proofs/NAME.json: command, machine, time spent, every figure, and whether the bar was reached.
Data are rendered into the work folder, or read from ../shared/data. The minutes of a proof are CPU minutes: a run on
two threads ends after half of them.
"""

import argparse
import json
import os
import platform
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from denselab.data.descriptor import open_dataset
from denselab.data.scenes.write import write_scenes
from denselab.evaluate import evaluate
from denselab.export.torch_session import load_predictor
from denselab.files import write_json
from denselab.task_scores import numbers
from denselab.training.fit import fit
from denselab.training.options import FitOptions

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
RESULTS = ROOT / "benchmarks" / "results" / "proofs"
SCENES, SCENES_HW, SCENES_SEED = 1500, (240, 320), 7


@dataclass(frozen=True)
class Proof:
    """What is trained on what, for how long, and which figure must reach what. bar: None: only reported.

    data: makes or finds the data set below the work folder. figure: path in the figures of `denselab evaluate`.
    """

    data: Callable[[Path], Path]
    options: dict[str, Any]
    minutes: float
    figure: str
    bar: float | None
    split: str = "test"


def scenes(work: Path) -> Path:
    """Rendered streets with every truth: 1200 to train, 150 to validate, 150 held out."""
    folder = work / "scenes"
    if not (folder / "scenes.json").exists():
        write_scenes(folder, SCENES, SCENES_HW, SCENES_SEED)
    return folder


def shared(name: str) -> Callable[[Path], Path]:
    """A data set beside the repository, described in recipes/data where it does not describe itself."""

    def find(work: Path) -> Path:
        description = Path(__file__).parent / "data" / f"{name}.yaml"
        return description if description.exists() else SHARED / name

    return find


ON_SCENES = {"backbone": "street", "width": 64, "batch_size": 8, "crop": "256x192", "lr": 2e-3, "jitter": 0.3}
MASKS = {**ON_SCENES, "queries": 64, "clip_norm": 1.0}
DEPTH = {"max_depth": 80.0}
DPT = {**ON_SCENES, "model": "dpt", "width": 48, "lr": 1e-3}

PROOFS: dict[str, Proof] = {
    "scenes_semantic_street": Proof(
        scenes, {"task": "semantic", "model": "street", "batch_size": 8, "crop": "256x192"}, 30, "miou", 0.75
    ),
    "scenes_panoptic_kmax": Proof(
        scenes, {**MASKS, "task": "panoptic", "model": "kmax", "norm": "group"}, 30, "pq", 0.55
    ),
    "scenes_panoptic_mask2former": Proof(
        scenes, {**MASKS, "task": "panoptic", "model": "mask2former", "lr": 5e-4}, 30, "pq", None
    ),
    "scenes_panoptic_eomt": Proof(
        scenes,
        {**MASKS, "task": "panoptic", "model": "eomt", "backbone": "vit_tiny_patch16_224", "width": None, "lr": 5e-4},
        30,
        "pq",
        None,
    ),
    "scenes_panoptic_deeplab": Proof(
        scenes, {**ON_SCENES, "task": "panoptic", "model": "panoptic_deeplab"}, 30, "pq", None
    ),
    "scenes_depth_polymax": Proof(
        scenes, {**MASKS, **DEPTH, "task": "depth", "model": "polymax", "norm": "group"}, 30, "abs_rel", 0.12
    ),
    "scenes_depth_dpt": Proof(scenes, {**DPT, **DEPTH, "task": "depth"}, 30, "abs_rel", 0.12),
    "scenes_normals_polymax": Proof(
        scenes, {**MASKS, "task": "normals", "model": "polymax", "norm": "group"}, 30, "median_deg", 12.0
    ),
    "scenes_normals_dpt": Proof(scenes, {**DPT, "task": "normals"}, 30, "median_deg", 12.0),
    "scenes_panoptic_depth_kmax": Proof(
        scenes,
        {**MASKS, "task": "panoptic+depth", "model": "kmax", "norm": "group", "max_depth": 80.0},
        36,
        "panoptic/pq",
        None,
    ),
    "nuclei_instance_mask2former": Proof(
        shared("nuclei"),
        {**MASKS, "task": "instance", "model": "mask2former", "crop": "256x256", "queries": 100, "lr": 5e-4},
        60,
        "mask/ap50",
        0.70,
    ),
    "nuclei_instance_panoptic_deeplab": Proof(
        shared("nuclei"),
        {**ON_SCENES, "task": "instance", "model": "panoptic_deeplab", "crop": "256x256"},
        60,
        "mask/ap50",
        0.70,
    ),
    "room_depth_dpt": Proof(
        shared("room"),
        {**ON_SCENES, "task": "depth", "model": "dpt", "max_depth": 5.0, "crop": "320x240"},
        20,
        "abs_rel",
        None,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=[*PROOFS])
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--work", type=Path, default=Path("runs/proofs"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    if args.list or not args.name:
        for name, proof in PROOFS.items():
            print(f"{name:36} {proof.minutes:4.0f} CPU minutes  {proof.figure} {proof.bar or 'reported'}")
        return
    proof = PROOFS[args.name]
    torch.set_num_threads(args.threads)
    data = proof.data(args.work)
    wall_s = 60 * (args.minutes or proof.minutes) / args.threads
    run = args.work / args.name
    given = {name: value for name, value in proof.options.items() if value is not None}
    where = {"data": str(data), "out": str(run), "max_time": str(round(wall_s))}
    options = FitOptions.from_mapping({**given, **where, "workers": 0, "picture_epochs": 10})
    before_s, start = cpu_seconds(), time.monotonic()
    fit(options, resume=args.resume, overwrite=not args.resume)
    spent_s, took_s = cpu_seconds() - before_s, time.monotonic() - start
    dataset = open_dataset(data)
    split = proof.split if dataset.splits.get(proof.split) else "val"
    figures = evaluate(load_predictor(run / "best.ckpt"), dataset, split).to_dict()
    value = numbers(figures)[proof.figure]
    lower = proof.figure in ("abs_rel", "median_deg")
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_json(
        RESULTS / f"{args.name}.json",
        {
            "command": f"python recipes/proofs.py {args.name} --threads {args.threads}",
            "figure": proof.figure,
            "value": value,
            "bar": proof.bar,
            "reached": None if proof.bar is None else (value <= proof.bar if lower else value >= proof.bar),
            "cpu_minutes_with_validation_and_loading": round(spent_s / 60, 1),
            "wall_minutes": round(took_s / 60, 1),
            "training_limit_wall_minutes": round(wall_s / 60, 1),
            "threads": args.threads,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
            "options": given,
            "figures": figures,
        },
    )
    print(json.dumps({"name": args.name, proof.figure: value, "bar": proof.bar}))


def cpu_seconds() -> float:
    """Spent by this process and the children it waited for."""
    times = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in times)


if __name__ == "__main__":
    main()
