"""Average precision against pycocotools on random masks and real labels, hand-worked values, crowds, nothing at all."""

import contextlib
import io
import json
import math
import pickle
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from denselab.errors import InputError
from denselab.metrics import InstanceFigures, InstanceScore
from denselab.metrics.boundary import boundary_width_px, inner_boundary
from denselab.metrics.instance import AveragePrecision
from denselab.rle import Rle, encode, from_string
from denselab.segments import Segment, Segments, from_masks


class BoundaryEval(COCOeval):
    """pycocotools with min(mask IoU, boundary IoU), boundaries by our own rule; crowds keep the IoU of masks."""

    def computeIoU(self, imgId: int, catId: int) -> Any:  # noqa: N802, N803
        ious = super().computeIoU(imgId, catId)
        true, found = self._gts[imgId, catId], self._dts[imgId, catId]
        if not len(ious):
            return ious
        order = np.argsort([-each["score"] for each in found], kind="mergesort")[: self.params.maxDets[-1]]
        edges = coco_mask.iou([edge(found[i]) for i in order], list(map(edge, true)), [0] * len(true))
        crowds = np.array([bool(each["iscrowd"]) for each in true])
        return np.where(crowds, ious, np.minimum(ious, edges))


def edge(annotation: dict[str, Any]) -> Any:
    counts, hw = annotation["segmentation"]["counts"], annotation["segmentation"]["size"]
    mask = from_string(counts.decode(), (hw[0], hw[1])).to_mask()
    near = inner_boundary(mask.astype(np.uint8), boundary_width_px(*mask.shape))
    return coco_mask.encode(np.asfortranarray(mask & near, np.uint8))


@dataclass
class BothWays:
    """The same images counted by us and gathered for pycocotools."""

    num_classes: int
    parts: list[InstanceScore] = field(default_factory=list)
    images: list[dict[str, Any]] = field(default_factory=list)
    truths: list[dict[str, Any]] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)

    def add(
        self, masks: Sequence[np.ndarray], class_ids: Sequence[int], scores: Sequence[float], truth: Segments
    ) -> None:
        part = InstanceScore(self.num_classes, boundary=True)
        part.update([encode(mask) for mask in masks], class_ids, scores, truth)
        self.parts.append(pickle.loads(pickle.dumps(part)))
        image_id = len(self.images) + 1
        self.images.append({"id": image_id, "height": truth.hw[0], "width": truth.hw[1]})
        for segment, mask in zip(truth.segments, truth.masks(), strict=True):
            runs = coco_mask.encode(np.asfortranarray(mask, np.uint8))
            self.truths.append(
                {
                    "id": len(self.truths) + 1, "image_id": image_id, "category_id": segment.class_id,
                    "segmentation": runs, "area": float(coco_mask.area(runs)),
                    "bbox": coco_mask.toBbox(runs).tolist(), "iscrowd": int(segment.is_crowd),
                }
            )  # fmt: skip
        for mask, class_id, score in zip(masks, class_ids, scores, strict=True):
            runs = coco_mask.encode(np.asfortranarray(mask, np.uint8))
            self.results.append(
                {"image_id": image_id, "category_id": class_id, "segmentation": runs, "score": float(score)}
            )

    def ours(self) -> InstanceFigures:
        total = InstanceScore(self.num_classes, boundary=True)
        for part in self.parts:
            total.merge(part)
        return total.compute()

    def check(self) -> InstanceFigures:
        """Ours, after comparing every figure with pycocotools'."""
        figures = self.ours()
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO()
            categories = [{"id": number, "name": str(number)} for number in range(self.num_classes)]
            truth.dataset = {"images": self.images, "annotations": self.truths, "categories": categories}
            truth.createIndex()
            results = truth.loadRes(self.results)
            for theirs, mine in (
                (COCOeval(truth, results, "segm"), figures.mask),
                (COCOeval(truth, results, "bbox"), figures.box),
                (BoundaryEval(truth, results, "segm"), figures.boundary),
            ):
                assert mine is not None
                theirs.evaluate()
                theirs.accumulate()
                theirs.summarize()
                assert twelve(mine) == pytest.approx(theirs.stats, abs=1e-9)
                precision = theirs.eval["precision"][..., 0, 2]
                per_class = np.where(precision < 0, np.nan, precision).mean(axis=(0, 1))
                assert mine.ap_per_class == pytest.approx(per_class, abs=1e-9, nan_ok=True)
        return figures


def twelve(figures: AveragePrecision) -> list[float]:
    return [-1.0 if value is None else value for value in figures.to_dict().values()]


def test_agrees_with_pycocotools_on_random_masks() -> None:
    rng = np.random.default_rng(0)

    def blob(hw: tuple[int, int]) -> np.ndarray:
        mask, side = np.zeros(hw, np.bool_), int(rng.choice([6, 20, 60, 130]))
        y, x = rng.integers(hw)
        mask[y : y + rng.integers(1, side + 1), x : x + rng.integers(1, side + 1)] = True
        return mask

    both = BothWays(4)
    for _ in range(14):
        hw = (int(rng.integers(100, 200)), int(rng.integers(100, 200)))
        true = [blob(hw) for _ in range(rng.integers(0, 10))]
        classes = rng.integers(0, 3, len(true)).tolist()
        crowds = (rng.random(len(true)) < 0.15).tolist()
        described = [Segment(i + 1, classes[i], 1.0, crowds[i]) for i in range(len(true))]
        truth = from_masks(true, described, hw)
        moved = [np.roll(mask, int(rng.integers(0, 4)), 0) for mask in true]
        class_ids = [c if rng.random() < 0.7 else int(rng.integers(4)) for c in classes]
        masks = [*moved, *(blob(hw) for _ in range(4))]
        scores = np.round(rng.random(len(masks)), 1).tolist()  # many are equal: their order matters
        both.add(masks, [*class_ids, *rng.integers(0, 4, 4).tolist()], scores, truth)
    figures = both.check()
    assert figures.mask.ap > 0.03
    assert figures.boundary is not None
    assert 0 < figures.boundary.ap < figures.mask.ap
    assert math.isnan(figures.mask.ap_per_class[3])


def test_agrees_with_pycocotools_on_nuclei(shared_data: Path) -> None:
    both, rng = BothWays(1), np.random.default_rng(1)
    paths = [path for path in sorted((shared_data / "dsb2018_nuclei" / "labels").glob("*.png")) if "00" in path.stem]
    for path in paths[:6]:
        with Image.open(path) as picture:
            ids = np.array(picture, np.int32)[:256, :256]
        numbers = np.unique(ids[ids > 0]).tolist()
        truth = Segments(ids[None], tuple(Segment(number, 0) for number in numbers))
        masks = [np.roll(mask, 1, int(rng.integers(2))) for mask in truth.masks()]
        both.add(masks, [0] * len(masks), rng.random(len(masks)).tolist(), truth)
    assert 0.3 < both.check().mask.ap < 1


def test_agrees_with_pycocotools_on_coco(shared_data: Path) -> None:
    folder = shared_data / "coco200_panoptic" / "panoptic_segmentation" / "annotations"
    data = json.loads((folder / "panoptic_val2017.json").read_text())
    things = sorted(category["id"] for category in data["categories"] if category["isthing"])
    both, rng = BothWays(len(things)), np.random.default_rng(2)
    for entry in data["annotations"][:8]:
        with Image.open(folder / "panoptic_val2017" / entry["file_name"]) as picture:
            ids = np.asarray(picture, np.int32) @ np.array((1, 256, 65536), np.int32)
        kept = [s for s in entry["segments_info"] if s["category_id"] in things]
        described = [Segment(s["id"], things.index(s["category_id"]), 1.0, bool(s["iscrowd"])) for s in kept]
        truth = Segments(np.where(np.isin(ids, [s["id"] for s in kept]), ids, 0)[None], tuple(described))
        masks = [np.roll(mask, 3, 0) | np.roll(mask, -1, 1) for mask in truth.masks()]
        both.add(masks, [s.class_id for s in described], rng.random(len(masks)).tolist(), truth)
    assert 0.2 < both.check().mask.ap < 1


def square(y: int, x: int, side: int, hw: tuple[int, int] = (40, 40)) -> np.ndarray:
    mask = np.zeros(hw, np.bool_)
    mask[y : y + side, x : x + side] = True
    return mask


def one_class(masks: Sequence[np.ndarray], scores: Sequence[float], truth: Segments) -> InstanceFigures:
    counted = InstanceScore(1)
    counted.update([encode(mask) for mask in masks], [0] * len(masks), scores, truth)
    return counted.compute()


def test_values_worked_by_hand() -> None:
    truth = from_masks([square(0, 0, 10), square(20, 20, 10)], [Segment(1, 0), Segment(2, 0)], (40, 40))
    perfect = one_class([square(0, 0, 10), square(20, 20, 10)], [0.9, 0.8], truth)
    assert (perfect.mask.ap, perfect.box.ap, perfect.mask.ar1) == pytest.approx((1, 1, 0.5))
    assert math.isnan(perfect.mask.ap_large)
    assert perfect.headline.value == perfect.mask.ap
    # a wrong one first: precision 1/2 up to recall 1/2, then nothing: 51 of 101 recalls
    half = one_class([square(30, 0, 8), square(0, 0, 10)], [0.9, 0.8], truth)
    assert half.mask.ap == pytest.approx(51 / 101 / 2)
    # IoU 80/100: found at thresholds 0.5 to 0.75, and at 0.8 itself
    shorter = square(0, 0, 10)
    shorter[8:] = False
    near = one_class([shorter], [1.0], from_masks([square(0, 0, 10)], [Segment(1, 0)], (40, 40)))
    assert (near.mask.ap50, near.mask.ap75, near.mask.ap) == pytest.approx((1, 1, 0.7))
    lines = near.to_text(["cell"]).splitlines()
    assert lines[1].split() == ["cell", "70.00", "100.00", "70.00", "100.00"]
    assert lines[-1] == "1 predicted, 1 true instances in 1 images"


def test_crowds_forgive_and_are_no_truth() -> None:
    crowd = from_masks([square(0, 0, 30)], [Segment(1, 0, 1.0, True)], (40, 40))
    only = one_class([square(2, 2, 5)], [0.9], crowd)
    assert math.isnan(only.mask.ap)
    assert only.to_dict()["mask"]["ap"] is None  # pyright: ignore[reportIndexIssue]
    segments = [Segment(1, 0, 1.0, True), Segment(2, 0)]
    both = from_masks([square(0, 0, 20), square(28, 28, 10)], segments, (40, 40))
    inside, found = square(2, 2, 5), square(28, 28, 10)
    assert one_class([inside, found], [0.9, 0.8], both).mask.ap == pytest.approx(1)


def test_nothing_found_and_nothing_there() -> None:
    empty = Segments(np.zeros((1, 40, 40), np.int32), ())
    assert math.isnan(one_class([], [], empty).mask.ap)
    assert math.isnan(one_class([square(0, 0, 4)], [0.5], empty).box.ap)
    assert one_class([], [], from_masks([square(0, 0, 4)], [Segment(1, 0)], (40, 40))).mask.ap == 0


def test_equal_scores_rank_by_image_id() -> None:
    truth = from_masks([square(0, 0, 10)], [Segment(1, 0)], (40, 40))
    right, wrong = [encode(square(0, 0, 10))], [encode(square(25, 25, 10))]
    parts = []
    for image_id, masks in ((7, right), (2, wrong)):
        part = InstanceScore(1)
        part.update(masks, [0], [0.5], truth, image_id)
        parts.append(part)
    answers = []
    for order in (parts, parts[::-1]):
        total = InstanceScore(1)
        for part in order:
            total.merge(part)
        answers.append(total.compute().mask.ap)
    assert answers == pytest.approx([51 / 101 / 2] * 2)  # the wrong one, of image 2, comes first either way


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    truth = Segments(np.zeros((1, 40, 40), np.int32), ())
    counted = InstanceScore(2)
    mask = encode(square(0, 0, 4))
    for masks, class_ids, scores, text in (
        ([mask], [0, 1], [0.5], "pred_masks, class_ids, scores: wanted as many of each, got 1, 2 and 1"),
        ([mask], [2], [0.5], r"class_ids: wanted 0\.\.1, got 2"),
        ([mask], [0], [math.nan], "scores: wanted finite numbers, got nan"),
        ([Rle((2, 3), np.array([6]))], [0], [0.5], "prediction is 3x2 px but truth is 40x40 px"),
    ):
        with pytest.raises(InputError, match=text):
            counted.update(masks, class_ids, scores, truth)
    with pytest.raises(InputError, match=r"merge: scores must agree in \(num_classes, boundary\), got"):
        counted.merge(InstanceScore(2, boundary=True))
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(InputError, match=r"needs the package faster-coco-eval, .*; pip install faster-coco-eval"):
        InstanceScore(1)
