"""Panoptic quality of 100 COCO pairs of 640x480 (PNG + JSON on disk) in one process, against panopticapi's algorithm.

python benchmarks/metric_speed.py [--data COCO200_PANOPTIC] [--out RESULT.json]
Truth: COCO panoptic maps resized to 640x480, or random regions where they are absent. Predictions: the truth moved by
3 px, a tenth of the segments merged into a neighbour and a tenth of another class. Both sides read the same files. Each
side and each stage has a fresh process of its own, for what one frees another would use again; it runs once unmeasured.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from measure import median, write_result
from panoptic_reference import panoptic_quality, read_ids
from PIL import Image

from denselab.scoring import rasters
from denselab.scoring.count import keep_freed_memory
from denselab.scoring.panoptic import PanopticFiles, score_panoptic

PAIRS, WIDTH, HEIGHT = 100, 640, 480
COCO = Path(__file__).resolve().parents[2] / "shared" / "data" / "coco200_panoptic"

rng = np.random.default_rng(0)


def truths(annotations: Path) -> list[tuple[np.ndarray, list[dict[str, Any]]]]:
    if not annotations.is_dir():
        return [random_truth() for _ in range(PAIRS)]
    data = json.loads((annotations / "panoptic_val2017.json").read_text())
    maps = []
    for entry in data["annotations"][:PAIRS]:
        with Image.open(annotations / "panoptic_val2017" / entry["file_name"]) as picture:
            colours = np.asarray(picture.resize((WIDTH, HEIGHT), Image.Resampling.NEAREST), np.int64)
        maps.append((colours @ (1, 256, 65536), entry["segments_info"]))
    return maps


def random_truth() -> tuple[np.ndarray, list[dict[str, Any]]]:
    ids = np.zeros((HEIGHT, WIDTH), np.int64)
    numbers = rng.choice(np.arange(1, 256**3), 12, replace=False)
    for number in numbers:
        y, x, h, w = rng.integers((HEIGHT, WIDTH, HEIGHT, WIDTH))
        ids[y : y + h // 2, x : x + w // 2] = number
    return ids, [{"id": int(number), "category_id": int(rng.integers(1, 60)), "iscrowd": 0} for number in numbers]


def predicted(ids: np.ndarray, segments: list[dict[str, Any]]) -> tuple[np.ndarray, list[dict[str, Any]]]:
    ids = np.roll(ids, 3, axis=1)
    for segment in segments:
        if rng.random() < 0.1:
            ids[ids == segment["id"]] = segments[0]["id"]
    moved = [s | {"category_id": segments[0]["category_id"]} if rng.random() < 0.1 else s for s in segments]
    return ids, moved


def save(folder: Path, maps: Iterable[tuple[np.ndarray, list[dict[str, Any]]]], categories: list[Any]) -> None:
    folder.mkdir()
    entries = []
    for index, (ids, segments) in enumerate(maps):
        colours = np.stack((ids % 256, ids // 256 % 256, ids // 65536), axis=2).astype(np.uint8)
        Image.fromarray(colours).save(folder / f"{index}.png")
        areas = {number: int(area) for number, area in zip(*np.unique(ids, return_counts=True), strict=True)}
        infos = [{**s, "area": areas[s["id"]]} for s in segments if s["id"] in areas]
        entries.append({"image_id": index, "file_name": f"{index}.png", "segments_info": infos})
    folder.with_suffix(".json").write_text(json.dumps({"annotations": entries, "categories": categories}))


def untracked(items: Iterable[Any], total: int, label: str) -> Iterable[Any]:
    return items


def score(folder: Path, boundary: bool = False) -> Any:
    pred, gt = (PanopticFiles(folder / f"{side}.json") for side in ("pred", "gt"))
    return score_panoptic(pred, gt, boundary, 1, False, untracked).figures


def reference(folder: Path) -> dict[int, list[float]]:
    return panoptic_quality(folder / "gt.json", folder / "pred.json", folder / "gt", folder / "pred")


def decode(path: Path) -> None:
    with Image.open(path) as picture:
        picture.load()


def every_png(read: Callable[[Path], object], folder: Path) -> None:
    for path in (folder / side / f"{index}.png" for index in range(PAIRS) for side in ("gt", "pred")):
        read(path)


def read_as_ours(folder: Path) -> None:
    keep_freed_memory()
    every_png(rasters.read_segment_ids, folder)


WORK: dict[str, Callable[[Path], object]] = {
    "ours": score,
    "ours with boundary PQ": lambda folder: score(folder, boundary=True),
    "reference": reference,
    "Pillow decodes the PNGs": lambda folder: every_png(decode, folder),
    "ours: files to ids": read_as_ours,
    "reference: files to ids": lambda folder: every_png(read_ids, folder),
}


def seconds(name: str, folder: Path, repeat: int, kornia: bool, cores: Collection[int]) -> dict[str, float]:
    """Median wall and CPU time of a piece of work, on these cores where the system lets one choose them."""
    if not kornia:
        rasters.read_image_png_u8 = None
    if cores:
        os.sched_setaffinity(0, cores)
    WORK[name](folder)
    spent: dict[str, list[float]] = {"wall": [], "cpu": []}
    for _ in range(repeat):
        began = time.perf_counter(), time.process_time()
        WORK[name](folder)
        spent["wall"].append(time.perf_counter() - began[0])
        spent["cpu"].append(time.process_time() - began[1])
    return {clock: median(values, 4) for clock, values in spent.items()}


def in_a_fresh_process(
    name: str, folder: Path, repeat: int, kornia: bool = True, cores: Collection[int] = ()
) -> dict[str, float]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(seconds, name, folder, repeat, kornia, cores).result()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default=COCO)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--out")
    given = parser.parse_args()
    if rasters.read_image_png_u8 is None:
        parser.error("wanted kornia-rs, got none; pip install kornia-rs")
    annotations = given.data / "panoptic_segmentation" / "annotations"
    cores: Collection[int] = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    if cores:
        os.sched_setaffinity(0, {min(cores)})  # for the processes below too
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        true_maps = truths(annotations)
        category_ids = sorted({segment["category_id"] for _, segments in true_maps for segment in segments})
        categories = [{"id": number, "name": str(number), "isthing": int(number < 91)} for number in category_ids]
        save(folder / "gt", true_maps, categories)
        save(folder / "pred", [predicted(ids, segments) for ids, segments in true_maps], categories)

        figures, by_category = score(folder), reference(folder)
        expected = np.array([by_category[number] for number in category_ids])
        seen = expected[:, 1] + (expected[:, 2] + expected[:, 3]) / 2
        with np.errstate(invalid="ignore"):
            difference = float(np.nanmax(np.abs(expected[:, 0] / seen - figures.pq)))
        assert (expected[:, 1:] == np.stack((figures.tp, figures.fp, figures.fn), axis=1)).all()

        setting = (folder, given.repeat)
        one_core = {
            "ours_s": in_a_fresh_process("ours", *setting),
            "ours_with_pillow_s": in_a_fresh_process("ours", *setting, kornia=False),
            "ours_with_boundary_pq_s": in_a_fresh_process("ours with boundary PQ", *setting),
            "reference_s": in_a_fresh_process("reference", *setting),
        }
        stages = {
            "Pillow decodes the PNGs": in_a_fresh_process("Pillow decodes the PNGs", *setting),
            "ours: files to ids": in_a_fresh_process("ours: files to ids", *setting),
            "ours: files to ids, with Pillow": in_a_fresh_process("ours: files to ids", *setting, kornia=False),
            "reference: files to ids": in_a_fresh_process("reference: files to ids", *setting),
        }
        # Both sides on the same cores: on a machine with other work a clock says nothing across different ones.
        all_cores = (
            {
                "ours_s": in_a_fresh_process("ours", *setting, cores=cores),
                "ours_with_pillow_s": in_a_fresh_process("ours", *setting, kornia=False, cores=cores),
                "reference_s": in_a_fresh_process("reference", *setting, cores=cores),
            }
            if len(cores) > 1
            else {}
        )

    def times_faster(times: dict[str, dict[str, float]], ours: str, clock: str) -> float:
        return round(times["reference_s"][clock] / times[ours][clock], 2)

    ratios = {
        "one core, CPU time": times_faster(one_core, "ours_s", "cpu"),
        "one core, CPU time, with Pillow": times_faster(one_core, "ours_with_pillow_s", "cpu"),
        "one core, CPU time, had all but decoding with Pillow cost nothing": round(
            one_core["reference_s"]["cpu"] / stages["Pillow decodes the PNGs"]["cpu"], 2
        ),
        "one core, by the clock": times_faster(one_core, "ours_s", "wall"),
    }
    if all_cores:
        ratios["all cores, by the clock"] = times_faster(all_cores, "ours_s", "wall")
        ratios["all cores, by the clock, with Pillow"] = times_faster(all_cores, "ours_with_pillow_s", "wall")

    write_result(
        given.out,
        {
            "pairs": PAIRS,
            "size": f"{WIDTH}x{HEIGHT}",
            "data": "coco val" if annotations.is_dir() else "random regions",
            "reference": "our transcription of panopticapi@7bb4655 (benchmarks/panoptic_reference.py), one process; "
            "tests/test_metrics_panoptic.py holds it to the golden numbers of panopticapi itself",
            "ours": "counts Parsing Covering too; decodes with kornia-rs (the extra fast-png) unless said otherwise",
            "kornia-rs": version("kornia-rs"),
            "largest_pq_difference": difference,
            "one_core": one_core,
            "one_core_stages_s": stages,
            "all_cores": {"cores": len(cores), **all_cores} if all_cores else None,
            "times_faster": ratios,
            "bar": {"times_faster": 10},
        },
    )


if __name__ == "__main__":
    main()
