"""Train a model for a fixed time on CPU cores and hold its score against a bar.

python recipes/proofs.py NAME [--work runs/proofs] [--threads 2] [--minutes M] [--resume]
python recipes/proofs.py --list | --table

Writes benchmarks/results/proofs/NAME.json: command, machine, time spent, every figure, and whether the bar was reached.
Data are rendered into the work folder, or read from ../shared/data. The minutes of a proof are minutes of CPU time, of
all threads together, so that it is the same on a machine that others use too.
"""

import argparse
import json
import os
import platform
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from denselab.data.dataset import Dataset, Item
from denselab.data.descriptor import open_dataset
from denselab.data.scenes import Mount, write_scenes
from denselab.evaluate import evaluate
from denselab.export.torch_session import load_predictor
from denselab.files import write_json
from denselab.task_scores import numbers
from denselab.training.fit import fit
from denselab.training.options import FitOptions

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
RESULTS = ROOT / "benchmarks" / "results" / "proofs"
SCENES, SCENES_HW, SCENES_SEED = 1500, (360, 480), 7
SMALL_SCENES_HW = (192, 256)
REPEATS = 25


Bars = Mapping[str, float | None]
"""What figures must reach, by their path in the figures of `denselab evaluate`; None: only reported."""


@dataclass(frozen=True)
class Proof:
    """What is trained on what, for how long, and which figures must reach what.

    data: makes or finds the data set below the work folder. singles: proofs of one task each that a proof of several
    tasks is held against.
    """

    data: Callable[[Path], Path]
    options: dict[str, Any]
    minutes: float
    bars: Bars | Callable[[Dataset, str], Bars]
    singles: tuple[str, ...] = ()


def scenes(
    work: Path, folder: str = "scenes", mount: Mount | None = None, size_hw: tuple[int, int] = SCENES_HW
) -> Path:
    """Rendered streets with every truth, each with its own camera: 1200 to train, 150 to validate, 150 held out."""
    if not (work / folder / "scenes.json").exists():
        write_scenes(work / folder, SCENES, size_hw, SCENES_SEED, mount=mount)
    return work / folder


def scenes_of_one_camera(work: Path) -> Path:
    """The same streets as one car's camera sees them: how far a thing is cannot be told without knowing the lens."""
    return scenes(work, "scenes_one_camera", Mount())


def small_scenes_of_one_camera(work: Path) -> Path:
    """The same, small enough that benchmarks/ptq runs every method on what learned from them."""
    return scenes(work, "small_scenes_one_camera", Mount(), SMALL_SCENES_HW)


def eight_photos(work: Path) -> Path:
    """Eight COCO photos, half as large: the first without a crowd and without a segment that COCO calls small."""
    source, folder = SHARED / "coco200_panoptic", work / "eight_photos"
    file = json.loads((source / "panoptic_segmentation/annotations/panoptic_train2017.json").read_text("utf-8"))
    names = {image["id"]: image["file_name"] for image in file["images"]}
    chosen: list[dict[str, Any]] = []
    for annotation in sorted(file["annotations"], key=lambda each: each["image_id"]):
        segments = annotation["segments_info"]
        if not any(segment["iscrowd"] for segment in segments) and min(s["area"] for s in segments) >= 32**2:
            chosen.append(annotation)
    chosen = chosen[:8]
    for kind in ("images", "panoptic"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    for annotation in chosen:
        name = names[annotation["image_id"]]
        photo = Image.open(source / "images/train2017" / name).convert("RGB")
        half = (photo.width // 2, photo.height // 2)
        photo.resize(half, Image.Resampling.LANCZOS).save(folder / "images" / name, quality=95)
        ids = Image.open(source / "panoptic_segmentation/annotations/panoptic_train2017" / annotation["file_name"])
        ids.resize(half, Image.Resampling.NEAREST).save(folder / "panoptic" / annotation["file_name"])
        images.append({"id": annotation["image_id"], "file_name": name, "width": half[0], "height": half[1]})
    repeats = [
        {**file, "images": copies(images, "id", REPEATS), "annotations": copies(chosen, "image_id", REPEATS)},
        {**file, "images": images, "annotations": chosen},
    ]
    for name, contents in zip(("train", "val"), repeats, strict=True):
        write_json(folder / f"panoptic_{name}.json", contents)
    (folder / "dataset.yaml").write_text(
        "images: images\nsegments: panoptic\n"
        "annotations: {train: panoptic_train.json, val: panoptic_val.json, test: panoptic_val.json}\n",
        "utf-8",
    )
    return folder


def half_camvid(work: Path) -> Path:
    """CamVid half as wide and as high: a plain transformer reads four times as many of its photos in a minute."""
    folder = work / "half_camvid"
    if not folder.exists():
        partial = folder.with_suffix(".part")
        for file in sorted((SHARED / "camvid").rglob("*.*")):
            target = partial / file.relative_to(SHARED / "camvid")
            target.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix not in (".png", ".jpg"):
                target.write_bytes(file.read_bytes())
                continue
            picture = Image.open(file)
            half = (picture.width // 2, picture.height // 2)
            is_photo = target.is_relative_to(partial / "images")
            resampling = Image.Resampling.LANCZOS if is_photo else Image.Resampling.NEAREST
            picture.resize(half, resampling).save(target, **({"quality": 95} if is_photo else {}))
        partial.rename(folder)
    return folder


def copies(records: list[dict[str, Any]], key: str, count: int) -> list[dict[str, Any]]:
    """Every record as often, each time with an id of its own: an epoch of many steps, so that validation is rare."""
    return [{**each, key: each[key] + copy * 10**7} for copy in range(count) for each in records]


def shared(name: str) -> Callable[[Path], Path]:
    """A data set beside the repository, described in recipes/data where it does not describe itself."""

    def find(work: Path) -> Path:
        description = Path(__file__).parent / "data" / f"{name}.yaml"
        return description if description.exists() else SHARED / name

    return find


FROM_STREET = {"backbone": "street", "start": "street"}
SAME_SCALE = {"zoom_min": 1.0, "zoom_max": 1.0}
TRAINING = {**FROM_STREET, "width": 64, "batch_size": 8, "lr": 2e-3, "jitter": 0.3}
ON_SCENES = {**TRAINING, **SAME_SCALE, "batch_size": 3, "crop": "384x288"}
MASKS = {**ON_SCENES, "queries": 64, "clip_norm": 1.0, "lr": 1e-3}
STREET = {
    "start": "street",
    "batch_size": 8,
    "crop": "256x192",
    "lr": 2e-3,
    "jitter": 0.3,
    "loss": "ce+0.5*dice",
    "zoom_min": 0.5,
    "zoom_max": 1.2,
}
ON_SMALL_SCENES = {**MASKS, "batch_size": 4, "crop": "256x192"}
DEPTH = {"max_depth": 80.0}
DPT = {**ON_SCENES, "model": "dpt", "width": 48, "lr": 1e-3}

PHOTOS = {
    **FROM_STREET,
    **SAME_SCALE,
    "task": "panoptic",
    "width": 64,
    "batch_size": 4,
    "crop": "320x320",
    "flip": False,
    "jitter": 0.0,
    "ema_decay": 0.99,
    "clip_norm": 1.0,
}


def half_of_a_constant(dataset: Dataset, split: str) -> Bars:
    """Half the error of the one distance that fits the images of the split best (the median, weighted by 1 / d)."""
    depths_m = np.concatenate([known_depths(dataset, item) for item in dataset.split(split)])
    order = np.argsort(depths_m)
    weights = 1 / depths_m[order]
    constant_m = depths_m[order][np.searchsorted(weights.cumsum(), weights.sum() / 2)]
    return {"abs_rel": float(np.mean(np.abs(depths_m - constant_m) / depths_m)) / 2}


def known_depths(dataset: Dataset, item: Item) -> NDArray[np.float32]:
    """Every known depth of an image, in metres."""
    depth_m = dataset.read(item, ("depth",))[1].depth_m
    assert depth_m is not None
    return depth_m[depth_m > 0]


def three_points_from_singles(dataset: Dataset, split: str) -> Bars:
    """What the runs of one task each reached, less 0.03."""
    panoptic, depth = (json.loads((RESULTS / f"{name}.json").read_text("utf-8"))["figures"] for name in SINGLES)
    return {
        "panoptic/pq": panoptic["pq"] - 0.03,
        "depth/abs_rel": depth["abs_rel"] + 0.03,
        "depth/delta1": depth["delta1"] - 0.03,
    }


SINGLES = ("scenes_panoptic_kmax", "scenes_depth_polymax")

PROOFS: dict[str, Proof] = {
    "scenes_semantic_street": Proof(scenes, {**STREET, "task": "semantic", "model": "street"}, 25, {"miou": 0.75}),
    "scenes_panoptic_kmax": Proof(
        scenes_of_one_camera, {**MASKS, "task": "panoptic", "model": "kmax", "norm": "group"}, 25, {"pq": None}
    ),
    "scenes_panoptic_mask2former": Proof(
        scenes, {**MASKS, "task": "panoptic", "model": "mask2former", "lr": 5e-4}, 10, {"pq": None}
    ),
    "scenes_panoptic_eomt": Proof(
        scenes,
        {
            **MASKS,
            "task": "panoptic",
            "model": "eomt",
            "backbone": "vit_tiny_patch16_224",
            "start": None,
            "width": None,
            "lr": 5e-4,
        },
        8,
        {"pq": None},
    ),
    "scenes_panoptic_street": Proof(
        scenes, {**STREET, "task": "panoptic", "model": "street_objects"}, 28, {"pq": 0.55}
    ),
    "scenes_panoptic_deeplab": Proof(
        scenes, {**ON_SCENES, "task": "panoptic", "model": "panoptic_deeplab"}, 25, {"pq": None}
    ),
    "scenes_depth_polymax": Proof(
        scenes_of_one_camera,
        {**MASKS, **DEPTH, "task": "depth", "model": "polymax", "norm": "group"},
        18,
        {"abs_rel": 0.12},
    ),
    "scenes_depth_dpt": Proof(scenes_of_one_camera, {**DPT, **DEPTH, "task": "depth"}, 15, {"abs_rel": 0.12}),
    "scenes_normals_polymax": Proof(
        scenes, {**MASKS, "task": "normals", "model": "polymax", "norm": "group"}, 12, {"median_deg": 12.0}
    ),
    "scenes_normals_dpt": Proof(scenes, {**DPT, "task": "normals"}, 12, {"median_deg": 12.0}),
    "scenes_panoptic_depth_kmax": Proof(
        scenes_of_one_camera,
        {**MASKS, "task": "panoptic+0.2*depth", "model": "kmax", "norm": "group", "max_depth": 80.0},
        25.5,
        three_points_from_singles,
        SINGLES,
    ),
    "small_scenes_panoptic_kmax": Proof(
        small_scenes_of_one_camera,
        {**ON_SMALL_SCENES, "task": "panoptic", "model": "kmax", "norm": "group"},
        20,
        {"pq": None},
    ),
    "small_scenes_depth_polymax": Proof(
        small_scenes_of_one_camera,
        {**ON_SMALL_SCENES, **DEPTH, "task": "depth", "model": "polymax", "norm": "group"},
        15,
        {"abs_rel": None},
    ),
    "nuclei_instance_mask2former": Proof(
        shared("nuclei"),
        {
            **TRAINING,
            "start": None,
            "task": "instance",
            "model": "mask2former",
            "crop": "256x256",
            "queries": 100,
            "lr": 5e-4,
            "clip_norm": 1.0,
        },
        20,
        {"mask/ap50": None},
    ),
    "nuclei_instance_panoptic_deeplab": Proof(
        shared("nuclei"),
        {**TRAINING, "start": None, "task": "instance", "model": "panoptic_deeplab", "crop": "256x256"},
        30,
        {"mask/ap50": 0.70},
    ),
    "photos_panoptic_kmax": Proof(
        eight_photos, {**PHOTOS, "model": "kmax", "norm": "group", "queries": 64}, 35, {"pq": 0.90}
    ),
    "photos_panoptic_deeplab": Proof(eight_photos, {**PHOTOS, "model": "panoptic_deeplab"}, 28, {"pq": 0.90}),
    "camvid_semantic_vit": Proof(
        half_camvid,
        {
            "task": "semantic",
            "model": "dpt",
            "backbone": "vit_tiny_patch16_224",
            "width": 32,
            "batch_size": 8,
            "crop": "240x192",
            "lr": 5e-4,
            "jitter": 0.3,
            "zoom_min": 0.9,
            "zoom_max": 1.5,
            "clip_norm": 1.0,
        },
        25,
        {"miou": None},
    ),
    "room_depth_dpt": Proof(
        shared("room"),
        {**TRAINING, "task": "depth", "model": "dpt", "max_depth": 5.0, "crop": "320x240"},
        12,
        half_of_a_constant,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=[*PROOFS])
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--table", action="store_true", help="print the results that are there, as Markdown")
    parser.add_argument("--work", type=Path, default=Path("runs/proofs"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    if args.table:
        print(table())
        return
    if args.list or not args.name:
        for name, proof in PROOFS.items():
            print(f"{name:36} {proof.minutes:4.0f} CPU minutes")
        return
    proof = PROOFS[args.name]
    torch.set_num_threads(args.threads)
    data = proof.data(args.work)
    minutes = args.minutes or proof.minutes
    run = args.work / args.name
    given = {name: value for name, value in proof.options.items() if value is not None}
    where = {"data": str(data), "out": str(run), "max_time": str(round(60 * minutes))}
    options = FitOptions.from_mapping({**given, **where, "workers": 0, "cache_mb": 6000, "picture_epochs": 10})
    before_s, start = cpu_seconds(), time.monotonic()
    fit(options, resume=args.resume, overwrite=not args.resume, clock=cpu_seconds)
    spent_s, took_s = cpu_seconds() - before_s, time.monotonic() - start
    dataset = open_dataset(data)
    split = "test" if dataset.splits.get("test") else "val"
    figures = evaluate(load_predictor(run / "best.ckpt"), dataset, split).to_dict()
    bars = proof.bars(dataset, split) if callable(proof.bars) else proof.bars
    values = numbers(figures)
    reached = {name: held(name, values[name], bar) for name, bar in bars.items()}
    record = {
        "command": f"python recipes/proofs.py {args.name} --threads {args.threads}"
        + (f" --minutes {minutes:g}" if args.minutes else ""),
        "values": {name: values[name] for name in bars},
        "bars": bars,
        "reached": reached,
        "cpu_minutes_with_validation_and_loading": round(spent_s / 60, 1),
        "wall_minutes": round(took_s / 60, 1),
        "training_limit_cpu_minutes": minutes,
        "threads": args.threads,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "options": given,
        "figures": figures,
    }
    if proof.singles:
        record["share_of_the_singles_minutes"] = round(minutes / sum(PROOFS[name].minutes for name in proof.singles), 3)
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_json(RESULTS / f"{args.name}.json", record)
    print(json.dumps({key: record[key] for key in ("command", "values", "bars", "reached")}))


def table() -> str:
    """What every proof reached, as Markdown."""
    rows = ["| proof | reached | bar | CPU minutes |", "| --- | --- | --- | --- |"]
    for name in PROOFS:
        if (path := RESULTS / f"{name}.json").exists():
            record = json.loads(path.read_text("utf-8"))
            values = ", ".join(f"{figure} {value:.3f}" for figure, value in record["values"].items())
            bars = ", ".join("reported" if bar is None else f"{bar:.3g}" for bar in record["bars"].values())
            rows.append(f"| {name} | {values} | {bars} | {record['cpu_minutes_with_validation_and_loading']:.0f} |")
    return "\n".join(rows)


def held(name: str, value: float, bar: float | None) -> bool | None:
    """Whether a figure reaches its bar; errors from above."""
    if bar is None:
        return None
    return value <= bar if name.rpartition("/")[2] in ("abs_rel", "median_deg") else value >= bar


def cpu_seconds() -> float:
    """Spent by this process and the children it waited for."""
    times = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in times)


if __name__ == "__main__":
    main()
