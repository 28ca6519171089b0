"""Average precision and recall of instances, of their masks and of their boxes, as COCO defines them.

Lin et al. 2014 (arXiv:1405.0312) and the evaluation of pycocotools: IoU 0.50:0.05:0.95, 101 recalls, areas below
32^2 px, up to 96^2 px and above, 1, 10 and 100 detections per image and class. faster-coco-eval counts; a test holds it
to pycocotools. The one deviation: an annotation whose id is 0 is an ordinary one here, while pycocotools takes its
matches for misses.

Boundary AP is the same with min(mask IoU, boundary IoU) as the IoU, the mask's own IoU with crowds (Cheng et al. 2021,
arXiv:2103.16562, section 6; boundary-iou-api@8006aa9 coco_instance_api/cocoeval.py). A mask's boundary is what lies
within 2 % of the image diagonal of its edge or of the edge of the image.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np

from denselab.errors import InputError
from denselab.metrics.checks import check_same_size
from denselab.metrics.headline import Headline
from denselab.metrics.table import Floats, aligned, mean_of_known, names_or_numbers, or_none, percent
from denselab.rle import Rle
from denselab.segments import Segments

CompressedMask = Mapping[str, Any]
"""COCO's compressed runs: {"size": [H, W], "counts": text}."""


class Overlap(Enum):
    """What the IoU of two instances is taken of, as faster-coco-eval names it."""

    MASK = "segm"
    BOX = "bbox"
    BOUNDARY = "boundary"


_AREAS = {"all": 0, "small": 1, "medium": 2, "large": 3}
_DETECTIONS = {1: 0, 10: 1, 100: 2}
_IOU_50, _IOU_75 = 0, 5
_TITLES = {
    "ap": "AP",
    "ap50": "AP50",
    "ap75": "AP75",
    "ap_small": "AP small",
    "ap_medium": "AP medium",
    "ap_large": "AP large",
    "ar1": "AR1",
    "ar10": "AR10",
    "ar100": "AR100",
    "ar_small": "AR small",
    "ar_medium": "AR medium",
    "ar_large": "AR large",
}


@dataclass(frozen=True, eq=False)
class Instance:
    """One instance, true or predicted. box_px: x, y, width, height. area_px decides between small, medium and large."""

    mask: CompressedMask
    class_id: int
    area_px: float
    box_px: tuple[float, float, float, float]
    score: float = 1.0
    is_crowd: bool = False


@dataclass(frozen=True, eq=False)
class ImageInstances:
    """What is predicted and true in one image. image_id: its place among images, which decides between equal scores."""

    hw: tuple[int, int]
    predicted: tuple[Instance, ...]
    true: tuple[Instance, ...]
    image_id: int = 0


@dataclass(frozen=True, eq=False)
class AveragePrecision:
    """COCO's twelve figures in 0..1, and per class [K] the two that are asked for most; nan where no truth is."""

    ap: float
    ap50: float
    ap75: float
    ap_small: float
    ap_medium: float
    ap_large: float
    ar1: float
    ar10: float
    ar100: float
    ar_small: float
    ar_medium: float
    ar_large: float
    ap_per_class: Floats
    ap50_per_class: Floats

    def to_dict(self) -> dict[str, float | None]:
        """The twelve figures as plain data; nan becomes None."""
        return {name: or_none(getattr(self, name)) for name in _TITLES}


@dataclass(frozen=True, eq=False)
class InstanceFigures:
    """Average precision and recall with the IoU of masks, of boxes, and of boundaries (None: not counted)."""

    mask: AveragePrecision
    box: AveragePrecision
    images: int
    predicted: int
    true: int
    boundary: AveragePrecision | None = None

    @property
    def headline(self) -> Headline:
        """Mask AP."""
        return Headline("mask AP", self.mask.ap, higher_is_better=True)

    def to_dict(self, class_names: Sequence[str] | None = None) -> dict[str, object]:
        """Every figure as plain data for JSON; nan becomes None."""
        kinds = self._kinds()
        classes: list[dict[str, object]] = []
        for index, name in enumerate(names_or_numbers(class_names, len(self.mask.ap_per_class))):
            entry: dict[str, object] = {"name": name}
            for kind, figures in kinds.items():
                entry[f"{kind}_ap"] = or_none(figures.ap_per_class[index])
                entry[f"{kind}_ap50"] = or_none(figures.ap50_per_class[index])
            classes.append(entry)
        counts = {"images": self.images, "predicted": self.predicted, "true": self.true}
        return {**{kind: figures.to_dict() for kind, figures in kinds.items()}, **counts, "classes": classes}

    def to_text(self, class_names: Sequence[str] | None = None) -> str:
        """Aligned tables in percent: a line per class, then COCO's twelve figures; "-" where no truth is."""
        kinds = self._kinds()
        rows = [["class", *(f"{kind} {title}" for kind in kinds for title in ("AP", "AP50"))]]
        columns = [column for figures in kinds.values() for column in (figures.ap_per_class, figures.ap50_per_class)]
        for index, name in enumerate(names_or_numbers(class_names, len(self.mask.ap_per_class))):
            rows.append([name, *(percent(column[index]) for column in columns)])
        means = [["", *kinds]]
        for name, title in _TITLES.items():
            means.append([title, *(percent(getattr(figures, name)) for figures in kinds.values())])
        counts = f"{self.predicted} predicted, {self.true} true instances in {self.images} images"
        return f"{aligned(rows)}\n\n{aligned(means)}\n\n{counts}"

    def _kinds(self) -> dict[str, AveragePrecision]:
        kinds = {"mask": self.mask, "box": self.box}
        return kinds if self.boundary is None else {**kinds, "boundary": self.boundary}


class InstanceScore:
    """Instances of a dataset: `update` per image, `merge` across processes, `compute` the figures.

    Keeps every mask as compressed runs, for precision ranks the detections of all images together. Equal scores rank
    by image_id, then in the order of arrival, so give image ids where images arrive in any order.
    boundary: also count Boundary AP.
    Raises InputError where the package faster-coco-eval is missing.
    """

    def __init__(self, num_classes: int, boundary: bool = False) -> None:
        if num_classes < 1:
            raise InputError(f"num_classes: must be at least 1, got {num_classes}")
        _faster_coco_eval()
        self.num_classes = num_classes
        self.boundary = boundary
        self._images: list[ImageInstances] = []

    def update(
        self,
        pred_masks: Sequence[Rle],
        class_ids: Sequence[int],
        scores: Sequence[float],
        truth: Segments,
        image_id: int = 0,
    ) -> None:
        """Count one image: masks, classes and scores predicted, segments true (may overlap, may be crowds).

        Areas and boxes are those of the masks. Raises InputError for other sizes, unknown classes, scores that are
        not finite, and lists of different length.
        """
        if not len(pred_masks) == len(class_ids) == len(scores):
            raise InputError(
                f"pred_masks, class_ids, scores: wanted as many of each, "
                f"got {len(pred_masks)}, {len(class_ids)} and {len(scores)}"
            )
        for mask in pred_masks:
            check_same_size(mask.hw, truth.hw)
        runs = [from_runs(mask) for mask in pred_masks]
        true_runs = [_coco_mask().encode(np.asfortranarray(mask, np.uint8)) for mask in truth.masks()]
        predicted = [
            measured(run, int(class_id), float(score))
            for run, class_id, score in zip(runs, class_ids, scores, strict=True)
        ]
        true = [
            measured(run, segment.class_id, is_crowd=segment.is_crowd)
            for run, segment in zip(true_runs, truth.segments, strict=True)
        ]
        self.add(ImageInstances(truth.hw, tuple(predicted), tuple(true), image_id))

    def add(self, image: ImageInstances) -> None:
        """Count one image whose areas and boxes are given, as COCO's files give them."""
        for instance in (*image.predicted, *image.true):
            if not 0 <= instance.class_id < self.num_classes:
                raise InputError(f"class_ids: wanted 0..{self.num_classes - 1}, got {instance.class_id}")
            if not math.isfinite(instance.score):
                raise InputError(f"scores: wanted finite numbers, got {instance.score}")
        self._images.append(image)

    def merge(self, other: "InstanceScore") -> None:
        """Add the images of another score with the same settings."""
        mine, theirs = ((s.num_classes, s.boundary) for s in (self, other))
        if mine != theirs:
            raise InputError(f"merge: scores must agree in (num_classes, boundary), got {mine} and {theirs}")
        self._images += other._images

    def compute(self) -> InstanceFigures:
        """The figures of everything counted so far."""
        images = sorted(self._images, key=lambda image: image.image_id)
        predicted = sum(len(image.predicted) for image in images)
        true = sum(len(image.true) for image in images)
        mask, box = (average_precision(images, self.num_classes, by) for by in (Overlap.MASK, Overlap.BOX))
        boundary = average_precision(images, self.num_classes, Overlap.BOUNDARY) if self.boundary else None
        return InstanceFigures(mask, box, len(images), predicted, true, boundary)


def average_precision(images: Sequence[ImageInstances], num_classes: int, by: Overlap) -> AveragePrecision:
    """COCO's figures over images in their order, with the IoU of masks, boxes or boundaries."""
    if not any(image.true for image in images):
        nothing = np.full(num_classes, np.nan)
        return AveragePrecision(*[math.nan] * 12, ap_per_class=nothing, ap50_per_class=nothing)
    coco = _faster_coco_eval()
    truth, pred = (_dataset(coco, images, num_classes, predicted) for predicted in (False, True))
    evaluation = coco.COCOeval_faster(truth, pred, by.value, rle_iou_max_workers=1)
    evaluation.evaluate()
    evaluation.accumulate()
    # [IoU, recall, class, area, detections] and the same without recall; -1 where there is no truth
    precision = np.where(evaluation.eval["precision"] < 0, np.nan, evaluation.eval["precision"])
    recall = np.where(evaluation.eval["recall"] < 0, np.nan, evaluation.eval["recall"])
    every, most = _AREAS["all"], _DETECTIONS[100]
    ap = {area: mean_of_known(precision[..., index, most]) for area, index in _AREAS.items()}
    ar = {area: mean_of_known(recall[..., index, most]) for area, index in _AREAS.items()}
    ar_of = {count: mean_of_known(recall[..., every, index]) for count, index in _DETECTIONS.items()}
    return AveragePrecision(
        ap=ap["all"],
        ap50=mean_of_known(precision[_IOU_50, ..., every, most]),
        ap75=mean_of_known(precision[_IOU_75, ..., every, most]),
        ap_small=ap["small"],
        ap_medium=ap["medium"],
        ap_large=ap["large"],
        ar1=ar_of[1],
        ar10=ar_of[10],
        ar100=ar_of[100],
        ar_small=ar["small"],
        ar_medium=ar["medium"],
        ar_large=ar["large"],
        ap_per_class=precision[..., every, most].mean(axis=(0, 1)),
        ap50_per_class=precision[_IOU_50, ..., every, most].mean(axis=0),
    )


def measured(mask: CompressedMask, class_id: int, score: float = 1.0, is_crowd: bool = False) -> Instance:
    """An instance whose area and box are those of its mask."""
    x, y, width, height = (float(value) for value in _coco_mask().toBbox(mask))
    return Instance(mask, class_id, float(_coco_mask().area(mask)), (x, y, width, height), score, is_crowd)


def from_runs(mask: Rle) -> CompressedMask:
    """Our runs as COCO's compressed ones."""
    height, width = mask.hw
    return _coco_mask().frPyObjects({"size": [height, width], "counts": mask.counts.tolist()}, height, width)


def from_polygons(polygons: Sequence[Sequence[float]], hw: tuple[int, int]) -> CompressedMask:
    """The union of polygons [x, y, x, y, ...] in px, filled by COCO's rule."""
    return _coco_mask().merge(_coco_mask().frPyObjects([list(map(float, each)) for each in polygons], *hw))


def _dataset(coco: Any, images: Sequence[ImageInstances], num_classes: int, predicted: bool) -> Any:
    annotations: list[dict[str, Any]] = [
        {
            "image_id": number,
            "category_id": instance.class_id,
            "segmentation": dict(instance.mask),
            "bbox": list(instance.box_px),
            "area": instance.area_px,
            "score": instance.score,
            "iscrowd": int(instance.is_crowd),
        }
        for number, image in enumerate(images, 1)
        for instance in (image.predicted if predicted else image.true)
    ]
    for number, annotation in enumerate(annotations, 1):
        annotation["id"] = number
    sizes = [{"id": number, "height": image.hw[0], "width": image.hw[1]} for number, image in enumerate(images, 1)]
    categories = [{"id": class_id, "name": str(class_id)} for class_id in range(num_classes)]
    return coco.COCO({"images": sizes, "annotations": annotations, "categories": categories})


def _faster_coco_eval() -> Any:
    try:
        import faster_coco_eval
    except ImportError as error:
        raise InputError(
            "average precision needs the package faster-coco-eval, which is not installed; pip install faster-coco-eval"
        ) from error
    return faster_coco_eval


def _coco_mask() -> Any:
    return _faster_coco_eval().mask
