"""Panoptic quality of 100 COCO pairs of 640x480 (PNG + JSON on disk) in one process, against panopticapi's algorithm.

python benchmarks/metric_speed.py [--data COCO200_PANOPTIC] [--out RESULT.json]
Truth: COCO panoptic maps resized to 640x480, or random regions where they are absent. Predictions: the truth moved by
3 px, a tenth of the segments merged into a neighbour and a tenth of another class. Both sides read the same files; the
stages are timed by themselves, on one core.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from measure import median, write_result
from panoptic_reference import panoptic_quality, read_ids
from PIL import Image

from denselab.metrics.panoptic import match_segments
from denselab.scoring.panoptic import PanopticFiles, score_panoptic
from denselab.scoring.rasters import read_segment_ids
from denselab.segments import Segment, Segments

PAIRS, WIDTH, HEIGHT = 100, 640, 480
COCO = Path(__file__).resolve().parents[2] / "shared" / "data" / "coco200_panoptic"

parser = argparse.ArgumentParser()
parser.add_argument("--data", type=Path, default=COCO)
parser.add_argument("--repeat", type=int, default=5)
parser.add_argument("--out")
given = parser.parse_args()
annotations = given.data / "panoptic_segmentation" / "annotations"
rng = np.random.default_rng(0)


def truths() -> list[tuple[np.ndarray, list[dict[str, Any]]]]:
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


def seconds(work: Callable[[], Any]) -> dict[str, float]:
    """Median wall and CPU time."""
    work()
    spent: dict[str, list[float]] = {"wall": [], "cpu": []}
    for _ in range(given.repeat):
        began = time.perf_counter(), time.process_time()
        work()
        spent["wall"].append(time.perf_counter() - began[0])
        spent["cpu"].append(time.process_time() - began[1])
    return {clock: median(values, 4) for clock, values in spent.items()}


def untracked(items: Iterable[Any], total: int, label: str) -> Iterable[Any]:
    return items


with tempfile.TemporaryDirectory() as scratch:
    gt, pred = Path(scratch) / "gt", Path(scratch) / "pred"
    true_maps = truths()
    category_ids = sorted({segment["category_id"] for _, segments in true_maps for segment in segments})
    categories = [{"id": number, "name": str(number), "isthing": int(number < 91)} for number in category_ids]
    save(gt, true_maps, categories)
    save(pred, [predicted(ids, segments) for ids, segments in true_maps], categories)
    gt_json, pred_json = gt.with_suffix(".json"), pred.with_suffix(".json")

    def ours(boundary: bool = False) -> Any:
        return score_panoptic(PanopticFiles(pred_json), PanopticFiles(gt_json), boundary, 1, False, untracked).figures

    def reference() -> dict[int, list[float]]:
        return panoptic_quality(gt_json, pred_json, gt, pred)

    figures, by_category = ours(), reference()
    expected = np.array([by_category[number] for number in category_ids])
    seen = expected[:, 1] + (expected[:, 2] + expected[:, 3]) / 2
    with np.errstate(invalid="ignore"):
        difference = float(np.nanmax(np.abs(expected[:, 0] / seen - figures.pq)))
    assert (expected[:, 1:] == np.stack((figures.tp, figures.fp, figures.fn), axis=1)).all()

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    all_cores = {"ours_s": seconds(ours), "reference_s": seconds(reference)}
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    one_core = {
        "ours_s": seconds(ours),
        "ours_with_boundary_pq_s": seconds(lambda: ours(True)),
        "reference_s": seconds(reference),
    }
    files = [(gt / f"{index}.png", pred / f"{index}.png") for index in range(PAIRS)]
    entries = [json.loads(path.read_text())["annotations"] for path in (gt_json, pred_json)]
    pairs = []
    for two, both in zip(files, zip(*entries, strict=True), strict=True):
        pairs.append(
            tuple(
                Segments(
                    read_segment_ids(path)[None],
                    tuple(Segment(s["id"], category_ids.index(s["category_id"])) for s in entry["segments_info"]),
                )
                for path, entry in zip(two, both, strict=True)
            )
        )

    def decode() -> None:
        for path in (path for two in files for path in two):
            with Image.open(path) as picture:
                picture.load()

    stages = {
        "decode the PNGs (both sides do)": seconds(decode),
        "ours: files to ids, decoding included": seconds(lambda: [read_segment_ids(p) for two in files for p in two]),
        "ours: match": seconds(lambda: [match_segments(p, t, len(category_ids)) for t, p in pairs]),
        "reference: files to ids, decoding included": seconds(lambda: [read_ids(p) for two in files for p in two]),
    }

    decoding = stages["decode the PNGs (both sides do)"]["cpu"]
    ours_cpu, reference_cpu = one_core["ours_s"]["cpu"], one_core["reference_s"]["cpu"]
    write_result(
        given.out,
        {
            "pairs": PAIRS,
            "size": f"{WIDTH}x{HEIGHT}",
            "data": "coco val" if annotations.is_dir() else "random regions",
            "reference": "our transcription of panopticapi@7bb4655 (benchmarks/panoptic_reference.py), one process; "
            "tests/test_metrics_panoptic.py holds it to the golden numbers of panopticapi itself",
            "largest_pq_difference": difference,
            "all_cores": {"cores": cores, **all_cores},
            "one_core": one_core,
            "one_core_stages_s": stages,
            "times_faster": {
                "one core, CPU time": round(reference_cpu / ours_cpu, 2),
                "one process on all cores, by the clock (ours decodes in threads)": round(
                    all_cores["reference_s"]["wall"] / all_cores["ours_s"]["wall"], 2
                ),
                "one core, CPU time, without decoding the PNGs": round(
                    (reference_cpu - decoding) / (ours_cpu - decoding), 2
                ),
                "most that any counting could be, as both decode the PNGs": round(reference_cpu / decoding, 2),
            },
            "bar": {"times_faster": 10},
        },
    )
