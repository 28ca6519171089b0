"""How far a model's confidence is from its accuracy, pixel by pixel (Guo et al. 2017, arXiv:1706.04599, section 2).

Pixels fall into M bins of equal width by the probability of their most likely class. With n_m pixels in bin m, accuracy
acc_m and mean confidence conf_m: ECE = sum_m n_m / n |acc_m - conf_m| (eq. 3), MCE = max_m |acc_m - conf_m| (eq. 5).
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from denselab.errors import InputError
from denselab.metrics.checks import check_same_size
from denselab.metrics.headline import Headline
from denselab.metrics.table import Counts, Floats, aligned, number, or_none, percent, ratio

_SUM_TOLERANCE = 1e-3
_LEAST_PROB = 1e-12


@dataclass(frozen=True, eq=False)
class CalibrationFigures:
    """Per bin m of confidence (m / M, (m + 1) / M]: pixels, and mean confidence and accuracy, nan where it is empty.

    nll: mean -ln of the probability of the true class, never below 1e-12. brier: mean over pixels of the squared
    distance between the class probabilities and the truth, summed over classes (0..2). Both are over the pixels of
    which all class probabilities were given. nan where nothing was counted.
    """

    ece: float
    mce: float
    nll: float
    brier: float
    confidence: Floats
    accuracy: Floats
    pixels: Counts

    @property
    def headline(self) -> Headline:
        """Expected calibration error."""
        return Headline("ECE", self.ece, higher_is_better=False)

    def to_dict(self, class_names: Sequence[str] | None = None) -> dict[str, object]:
        """Every figure as plain data for JSON; nan becomes None. Classes are not told apart: names are not used."""
        bins = zip(self.confidence.tolist(), self.accuracy.tolist(), self.pixels.tolist(), strict=True)
        return {
            "ece": or_none(self.ece),
            "mce": or_none(self.mce),
            "nll": or_none(self.nll),
            "brier": or_none(self.brier),
            "bins": [
                {"confidence": or_none(confidence), "accuracy": or_none(accuracy), "pixels": pixels}
                for confidence, accuracy, pixels in bins
            ],
        }

    def to_text(self, class_names: Sequence[str] | None = None) -> str:
        """Aligned tables: a line per bin in percent, then the figures. Classes are not told apart."""
        rows = [("confidence", "mean", "accuracy", "pixels")]
        count = len(self.pixels)
        for m in range(count):
            span = f"{m / count:.2f}-{(m + 1) / count:.2f}"
            rows.append((span, percent(self.confidence[m]), percent(self.accuracy[m]), str(self.pixels[m])))
        means = [("ECE (%)", percent(self.ece)), ("MCE (%)", percent(self.mce))]
        means += [("NLL", number(self.nll, 4)), ("Brier", number(self.brier, 4))]
        return f"{aligned(rows)}\n\n{aligned(means)}"


class CalibrationScore:
    """Confidence and accuracy of a dataset's pixels: `update` or `update_confidence` per image, `merge`, `compute`.

    ignore: truth ids that are not scored.
    """

    def __init__(self, bins: int = 15, ignore: int | Collection[int] = 255) -> None:
        if bins < 1:
            raise InputError(f"bins: must be at least 1, got {bins}")
        self.bins = bins
        self.ignore = tuple(sorted(set(ignore))) if isinstance(ignore, Collection) else (ignore,)
        self._pixels, self._hits = np.zeros((2, bins), np.int64)
        self._confidence_sum = np.zeros(bins)
        self._with_all_probs = 0
        self._nll_sum = self._brier_sum = 0.0

    def update(self, class_probs: NDArray[np.floating[Any]], truth_ids: NDArray[np.integer[Any]]) -> None:
        """Count one image: probabilities [K, H, W] that sum to 1 over classes, and true class ids [H, W].

        Raises InputError for other shapes, sizes and types, for logits, and for truth outside 0..K-1 and the ignored.
        """
        if class_probs.ndim != 3 or class_probs.dtype.kind != "f":
            got = f"{class_probs.dtype} {list(class_probs.shape)}"
            raise InputError(f"class_probs: wanted probabilities as floats [K, H, W], got {got}")
        _check_ids("truth", truth_ids)
        check_same_size(class_probs.shape[1:], truth_ids.shape)
        known = ~np.isin(truth_ids, self.ignore)
        probs, truth = class_probs[:, known].astype(np.float64), truth_ids[known].astype(np.int64)
        if not truth.size:
            return
        if truth.min() < 0 or truth.max() >= len(probs):
            raise InputError(
                f"truth has class ids from {truth.min()} to {truth.max()}; wanted 0..{len(probs) - 1} or ignored "
                f"({', '.join(map(str, self.ignore))})"
            )
        if not np.allclose(probs.sum(axis=0), 1, atol=_SUM_TOLERANCE) or probs.min() < 0:
            raise InputError(
                f"class_probs: wanted probabilities that sum to 1 over the classes, got values from {probs.min():g} to "
                f"{probs.max():g}; take the softmax first"
            )
        self._bin(probs.max(axis=0), probs.argmax(axis=0) == truth)
        self._with_all_probs += truth.size
        of_truth = np.take_along_axis(probs, truth[None], axis=0)[0]
        self._nll_sum -= float(np.log(np.maximum(of_truth, _LEAST_PROB)).sum())
        self._brier_sum += float(((probs**2).sum(axis=0) - 2 * of_truth + 1).sum())

    def update_confidence(
        self,
        confidence: NDArray[np.floating[Any]],
        pred_ids: NDArray[np.integer[Any]],
        truth_ids: NDArray[np.integer[Any]],
    ) -> None:
        """Count one image of which only the probability of the predicted class is known: all [H, W], 0..1 and ids.

        Raises InputError for other shapes, sizes and types, and for confidences that are no probabilities.
        """
        if confidence.ndim != 2 or confidence.dtype.kind != "f":
            got = f"{confidence.dtype} {list(confidence.shape)}"
            raise InputError(f"confidence: wanted probabilities as floats [H, W], got {got}")
        _check_ids("prediction", pred_ids)
        _check_ids("truth", truth_ids)
        check_same_size(pred_ids.shape, truth_ids.shape)
        check_same_size(confidence.shape, truth_ids.shape)
        known = ~np.isin(truth_ids, self.ignore)
        sure = confidence[known].astype(np.float64)
        if not ((sure >= 0) & (sure <= 1)).all():
            raise InputError(
                f"confidence: wanted probabilities 0..1, got values from {sure.min():g} to {sure.max():g}; "
                "give the probability of the predicted class"
            )
        self._bin(sure, pred_ids[known] == truth_ids[known])

    def _bin(self, confidence: Floats, hit: NDArray[np.bool_]) -> None:
        # Bins are open below and closed above, as in the paper.
        bin_ids = np.clip(np.ceil(confidence * self.bins).astype(np.int64) - 1, 0, self.bins - 1)
        self._pixels += np.bincount(bin_ids, minlength=self.bins)
        self._hits += np.bincount(bin_ids[hit], minlength=self.bins)
        self._confidence_sum += np.bincount(bin_ids, confidence, self.bins)

    def merge(self, other: "CalibrationScore") -> None:
        """Add what another score with the same settings has counted."""
        mine, theirs = ((s.bins, s.ignore) for s in (self, other))
        if mine != theirs:
            raise InputError(f"merge: scores must agree in (bins, ignore), got {mine} and {theirs}")
        self._pixels += other._pixels
        self._hits += other._hits
        self._confidence_sum += other._confidence_sum
        self._with_all_probs += other._with_all_probs
        self._nll_sum += other._nll_sum
        self._brier_sum += other._brier_sum

    def compute(self) -> CalibrationFigures:
        """The figures of everything counted so far."""
        total, with_all = int(self._pixels.sum()), self._with_all_probs
        confidence, accuracy = ratio(self._confidence_sum, self._pixels), ratio(self._hits, self._pixels)
        gaps = np.abs(np.nan_to_num(accuracy - confidence))
        return CalibrationFigures(
            ece=float((gaps * self._pixels).sum()) / total if total else math.nan,
            mce=float(gaps.max()) if total else math.nan,
            nll=self._nll_sum / with_all if with_all else math.nan,
            brier=self._brier_sum / with_all if with_all else math.nan,
            confidence=confidence,
            accuracy=accuracy,
            pixels=self._pixels.copy(),
        )


def _check_ids(name: str, ids: NDArray[Any]) -> None:
    if ids.ndim != 2 or ids.dtype.kind not in "iu":
        raise InputError(f"{name}: must be integer class ids [H, W], got {ids.dtype} {list(ids.shape)}")
