"""Semantic segmentation scores from dataset-level pixel counts, never from means over images."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from denselab.errors import InputError
from denselab.metrics.boundary import boundary_width_px, inner_boundary
from denselab.metrics.checks import check_same_size
from denselab.metrics.headline import Headline
from denselab.metrics.table import Counts, Floats, aligned, mean_of_known, names_or_numbers, or_none, percent, ratio

Ids = NDArray[np.integer[Any]]


def confusion(pred_ids: Ids, truth_ids: Ids, num_classes: int, ignore: int | Collection[int] = 255) -> Counts:
    """Pixel counts int64 [K, K+1]: rows truth, columns prediction; the last column is predictions outside 0..K-1.

    pred_ids, truth_ids: integers [H, W]. Pixels whose truth is ignored are not counted.
    Raises InputError for other sizes, for types that are no integers, and for truth ids that are neither in
    0..K-1 nor ignored.
    """
    rows, columns = _codes(pred_ids, truth_ids, num_classes, ignore)
    side = num_classes + 1
    rows *= side
    rows += columns
    return np.bincount(rows.ravel(), minlength=side**2).reshape(side, side)[:-1]


def joint_counts(pred_ids: Ids, truth_ids: Ids, num_classes: int, ignore: int | Collection[int] = 255) -> Counts:
    """The confusion split by boundary: int64 [2, 2, K+1, K+1].

    Index 0: the pixel lies on the inner boundary of its predicted class; 1: of its true class; 2: truth;
    3: prediction. Row and column K hold what counts for no class: ignored truth, predictions outside 0..K-1.
    Ignored pixels belong to no mask, of the truth or of the prediction, so both meet a boundary there.
    """
    rows, columns = _codes(pred_ids, truth_ids, num_classes, ignore)
    width_px = boundary_width_px(*rows.shape)
    codes = inner_boundary(columns, width_px).astype(rows.dtype)
    shape = (2, 2, num_classes + 1, num_classes + 1)
    for size, digit in zip(shape[1:], (inner_boundary(rows, width_px), rows, columns), strict=True):
        codes *= size
        codes += digit
    return np.bincount(codes.ravel(), minlength=math.prod(shape)).reshape(shape)


@dataclass(frozen=True, eq=False)
class SemanticFigures:
    """Scores in 0..1. With n[t, p] the pixels of true class t predicted as p, over the whole dataset:

    iou[c] = n[c, c] / (sum_p n[c, p] + sum_t n[t, c] - n[c, c]); nan where class c is in neither.
    miou = mean of iou over the classes that are in either.
    pixel_accuracy = sum_c n[c, c] / sum n.
    mean_accuracy = mean over classes in the truth of n[c, c] / sum_p n[c, p].
    fw_iou = sum over classes in the truth of share[c] * iou[c], share[c] = sum_p n[c, p] / sum n.
    boundary_iou_per_class[c] = |Gd and Pd| / |Gd or Pd| of the inner boundaries (width d = 2 % of the diagonal) of
    class c in truth and prediction, counted over the dataset (Cheng et al. 2021, eq. 1, there per object);
    boundary_iou is its mean as in miou. Both are None where they were not counted.
    A figure of no pixels is nan. Pixels with ignored truth count nowhere; predictions outside the classes are wrong.
    """

    miou: float
    pixel_accuracy: float
    mean_accuracy: float
    fw_iou: float
    boundary_iou: float | None
    iou: Floats
    accuracy: Floats
    boundary_iou_per_class: Floats | None
    share: Floats
    confusion: Counts

    @property
    def headline(self) -> Headline:
        """Mean IoU."""
        return Headline("mIoU", self.miou, higher_is_better=True)

    def to_dict(self, class_names: Sequence[str] | None = None) -> dict[str, object]:
        """Every figure as plain data for JSON; nan becomes None."""
        boundary = self.boundary_iou_per_class
        classes: list[dict[str, object]] = [
            {
                "name": name,
                "iou": or_none(self.iou[index]),
                "boundary_iou": None if boundary is None else or_none(boundary[index]),
                "accuracy": or_none(self.accuracy[index]),
                "share": or_none(self.share[index]),
                "pixels": int(self.confusion[index].sum()),
            }
            for index, name in enumerate(names_or_numbers(class_names, len(self.iou)))
        ]
        return {
            "miou": or_none(self.miou),
            "boundary_iou": None if self.boundary_iou is None else or_none(self.boundary_iou),
            "pixel_accuracy": or_none(self.pixel_accuracy),
            "mean_accuracy": or_none(self.mean_accuracy),
            "fw_iou": or_none(self.fw_iou),
            "classes": classes,
            "confusion": self.confusion.tolist(),
        }

    def to_text(self, class_names: Sequence[str] | None = None) -> str:
        """An aligned table in percent, one line per class, and the totals; "-" for an absent class."""
        names = names_or_numbers(class_names, len(self.iou))
        boundary = self.boundary_iou_per_class
        columns: list[tuple[str, Floats, float | None]] = [("IoU", self.iou, self.miou)]
        if boundary is not None:
            columns.append(("boundary IoU", boundary, self.boundary_iou))
        columns.append(("share", self.share, None))
        rows = [("class", *(title for title, _, _ in columns))]
        rows += [(name, *(percent(values[i]) for _, values, _ in columns)) for i, name in enumerate(names)]
        rows.append(("mean", *("" if mean is None else percent(mean) for _, _, mean in columns)))
        totals = (
            ("pixel accuracy", self.pixel_accuracy),
            ("mean class accuracy", self.mean_accuracy),
            ("frequency-weighted IoU", self.fw_iou),
        )
        return f"{aligned(rows)}\n\n{aligned([(title, percent(value)) for title, value in totals])}"


class SemanticScore:
    """Pixel counts of a dataset: `update` per image, `merge` across processes, `compute` the figures.

    ignore: truth ids that are not scored. boundary: also count boundary IoU, which takes about as long again.
    """

    def __init__(self, num_classes: int, ignore: int | Collection[int] = 255, boundary: bool = True) -> None:
        if num_classes < 1:
            raise InputError(f"num_classes: must be at least 1, got {num_classes}")
        self.num_classes = num_classes
        self.ignore = tuple(sorted(set(_as_tuple(ignore))))
        self.boundary = boundary
        side = num_classes + 1
        self._counts = np.zeros((2, 2, side, side) if boundary else (num_classes, side), np.int64)

    def update(self, pred_ids: Ids, truth_ids: Ids) -> None:
        """Count one image: class ids [H, W] predicted and true."""
        count = joint_counts if self.boundary else confusion
        self._counts += count(pred_ids, truth_ids, self.num_classes, self.ignore)

    def merge(self, other: "SemanticScore") -> None:
        """Add what another score with the same settings has counted."""
        mine, theirs = ((s.num_classes, s.ignore, s.boundary) for s in (self, other))
        if mine != theirs:
            raise InputError(f"merge: scores must agree in (num_classes, ignore, boundary), got {mine} and {theirs}")
        self._counts += other._counts

    def compute(self) -> SemanticFigures:
        """The figures of everything counted so far."""
        counted = self._counts.sum(axis=(0, 1))[:-1] if self.boundary else self._counts.copy()
        hits, truth, predicted = counted.diagonal(), counted.sum(axis=1), counted.sum(axis=0)[:-1]
        iou = ratio(hits, truth + predicted - hits)
        accuracy, share = ratio(hits, truth), ratio(truth, truth.sum())
        boundary_iou = self._boundary_iou() if self.boundary else None
        return SemanticFigures(
            miou=mean_of_known(iou),
            pixel_accuracy=float(ratio(hits.sum(), truth.sum())),
            mean_accuracy=mean_of_known(accuracy),
            fw_iou=float((share * iou)[truth > 0].sum()) if truth.any() else math.nan,
            boundary_iou=None if boundary_iou is None else mean_of_known(boundary_iou),
            iou=iou,
            accuracy=accuracy,
            boundary_iou_per_class=boundary_iou,
            share=share,
            confusion=counted,
        )

    def _boundary_iou(self) -> Floats:
        overlap = self._counts[1, 1].diagonal()[:-1]
        truth = self._counts[:, 1].sum(axis=(0, 2))[:-1]
        predicted = self._counts[1].sum(axis=(0, 1))[:-1]
        return ratio(overlap, truth + predicted - overlap)


def _codes(pred_ids: Ids, truth_ids: Ids, num_classes: int, ignore: int | Collection[int]) -> tuple[Ids, Ids]:
    """Checked truth and prediction with what counts for no class set to K, in a type that holds 4 (K+1)^2 codes."""
    for name, ids in (("prediction", pred_ids), ("truth", truth_ids)):
        if ids.ndim != 2 or ids.dtype.kind not in "iu":
            raise InputError(f"{name}: must be integer class ids [H, W], got {ids.dtype} {list(ids.shape)}")
    check_same_size(pred_ids.shape, truth_ids.shape)
    ignored = _as_tuple(ignore)
    void = np.zeros(truth_ids.shape, np.bool_)
    for each in ignored:
        void |= truth_ids == each
    unknown = _outside(truth_ids, num_classes) & ~void
    if unknown.any():
        found = [int(i) for i in np.unique(truth_ids[unknown])]
        shown = ", ".join(map(str, found[:8])) + (", ..." if len(found) > 8 else "")
        raise InputError(
            f"truth has class ids {shown}; wanted 0..{num_classes - 1} or ignored ({', '.join(map(str, ignored))}): "
            f"ignore them too (--ignore) or raise the number of classes (--num-classes)"
        )
    dtype = np.min_scalar_type(4 * (num_classes + 1) ** 2)
    rows, columns = truth_ids.astype(dtype), pred_ids.astype(dtype)
    rows[void] = num_classes
    columns[void | _outside(pred_ids, num_classes)] = num_classes
    return rows, columns


def _as_tuple(ignore: int | Collection[int]) -> tuple[int, ...]:
    return tuple(ignore) if isinstance(ignore, Collection) else (ignore,)


def _outside(ids: Ids, num_classes: int) -> NDArray[np.bool_]:
    outside = ids >= num_classes
    return outside | (ids < 0) if ids.dtype.kind == "i" else outside
