"""Depth errors as the field reports them (Eigen et al. 2014, arXiv:1406.2283, section 4.1; KITTI's benchmark).

Every figure is computed per image over its known pixels and then averaged over images, each image alike: the
convention of KITTI and of most published tables. With d the predicted and d* the true depth of a pixel and
e = ln d - ln d*: abs_rel = E[|d - d*| / d*], sq_rel = E[(d - d*)^2 / d*] in metres,
squared_relative_error_deeplab2 = E[((d - d*) / d*)^2] (DeepLab2's "SqErrorRel"), rmse_m = sqrt(E[(d - d*)^2]),
rmse_log = sqrt(E[e^2]), silog = 100 sqrt(E[e^2] - E[e]^2), log10 = E[|log10 d - log10 d*|],
delta_n = share of pixels with max(d / d*, d* / d) < 1.25^n.
"""

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from enum import Enum
from typing import Any, assert_never

import numpy as np
from numpy.typing import NDArray

from denselab.errors import InputError
from denselab.metrics.checks import check_same_size
from denselab.metrics.headline import Headline
from denselab.metrics.table import aligned, number, or_none, percent

Depths = NDArray[np.floating[Any]]


class Align(Enum):
    """What a prediction is fitted to its truth by, image by image, before errors are taken.

    NONE: metres are metres. MEDIAN: scaled so that the medians agree (Zhou et al. 2017). SCALE_SHIFT: scale and shift
    of least squares in metres (affine-invariant depth). INVERSE: predictions are inverse depths, as MiDaS and Depth
    Anything give them; scale and shift of least squares to the true inverse depths (Ranftl et al. 2020,
    arXiv:1907.01341, eq. 3), then inverted; what is fitted to 0 or less is infinitely far.
    """

    NONE = "none"
    MEDIAN = "median"
    SCALE_SHIFT = "scale_shift"
    INVERSE = "inverse"


@dataclass(frozen=True)
class DepthErrors:
    """Errors of one image, or their means; defined in the module's docstring."""

    abs_rel: float
    sq_rel: float
    squared_relative_error_deeplab2: float
    rmse_m: float
    rmse_log: float
    silog: float
    log10: float
    delta1: float
    delta2: float
    delta3: float


def known_pixels(truth_m: Depths, min_m: float, max_m: float) -> NDArray[np.bool_]:
    """Where the truth counts: finite and strictly between min_m and max_m."""
    return np.isfinite(truth_m) & (truth_m > min_m) & (truth_m < max_m)


def depth_errors(pred_m: NDArray[np.float64], truth_m: NDArray[np.float64]) -> DepthErrors:
    """Errors over pixels [N], N >= 1; all depths above 0."""
    difference_m, log_difference = pred_m - truth_m, np.log(pred_m) - np.log(truth_m)
    square_m2, log_square = difference_m**2, log_difference**2
    worse = np.exp(np.abs(log_difference))
    delta1, delta2, delta3 = (float((worse < 1.25**power).mean()) for power in (1, 2, 3))
    # E[e^2] - E[e]^2 is the variance, which cannot round below 0 when taken as such.
    return DepthErrors(
        abs_rel=float((np.abs(difference_m) / truth_m).mean()),
        sq_rel=float((square_m2 / truth_m).mean()),
        squared_relative_error_deeplab2=float((square_m2 / truth_m**2).mean()),
        rmse_m=math.sqrt(square_m2.mean()),
        rmse_log=math.sqrt(log_square.mean()),
        silog=100 * float(log_difference.std()),
        log10=float(np.abs(log_difference).mean()) / math.log(10),
        delta1=delta1,
        delta2=delta2,
        delta3=delta3,
    )


def align(pred_m: NDArray[np.float64], truth_m: NDArray[np.float64], how: Align) -> NDArray[np.float64]:
    """The prediction fitted to the truth over pixels [N] where it is finite (and above 0 for MEDIAN)."""
    match how:
        case Align.NONE:
            return pred_m
        case Align.MEDIAN:
            usable = np.isfinite(pred_m) & (pred_m > 0)
            if not usable.any():
                return pred_m
            return pred_m * (np.median(truth_m[usable]) / np.median(pred_m[usable]))
        case Align.SCALE_SHIFT:
            return _fitted(pred_m, truth_m)
        case Align.INVERSE:
            inverse = _fitted(pred_m, 1 / truth_m)
            return np.divide(1, inverse, out=np.full_like(inverse, np.inf), where=~(inverse <= 0))
        case _:
            assert_never(how)


def _fitted(pred: NDArray[np.float64], truth: NDArray[np.float64]) -> NDArray[np.float64]:
    """The prediction [N] under the scale and shift of least squares to the truth, over what is finite."""
    usable = np.isfinite(pred)
    if not usable.any():
        return pred
    basis = np.stack((pred[usable], np.ones(int(usable.sum()))), axis=1)
    scale, shift = np.linalg.lstsq(basis, truth[usable], rcond=None)[0]
    return scale * pred + shift


@dataclass(frozen=True)
class DepthFigures:
    """Errors averaged over `images`; nan where there are none. skipped_images had no known pixel.

    known_pixels were compared; bad_pixels of them were predicted 0, negative or not finite and were clipped.
    """

    errors: DepthErrors
    images: int
    skipped_images: int
    known_pixels: int
    bad_pixels: int

    @property
    def headline(self) -> Headline:
        """Absolute relative error."""
        return Headline("AbsRel", self.errors.abs_rel, higher_is_better=False)

    def to_dict(self, class_names: Sequence[str] | None = None) -> dict[str, object]:
        """Every figure as plain data for JSON; nan becomes None. Depth has no classes: the names are not used."""
        errors = {field.name: or_none(getattr(self.errors, field.name)) for field in fields(self.errors)}
        counts = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "errors"}
        return {**errors, **counts}

    def to_text(self, class_names: Sequence[str] | None = None) -> str:
        """An aligned table, and what was left out or clipped. Depth has no classes: the names are not used."""
        e = self.errors
        rows = [
            ("AbsRel", number(e.abs_rel, 4)),
            ("SqRel (m)", number(e.sq_rel, 4)),
            ("squared relative error (DeepLab2)", number(e.squared_relative_error_deeplab2, 4)),
            ("RMSE (m)", number(e.rmse_m, 4)),
            ("RMSE log", number(e.rmse_log, 4)),
            ("SILog", number(e.silog, 3)),
            ("log10", number(e.log10, 4)),
            *((f"delta < 1.25^{n} (%)", percent(v)) for n, v in ((1, e.delta1), (2, e.delta2), (3, e.delta3))),
        ]
        notes = [f"mean over {self.images} images"]
        if self.skipped_images:
            notes.append(f"{self.skipped_images} images without known depth left out")
        if self.bad_pixels:
            notes.append(
                f"{self.bad_pixels} of {self.known_pixels} pixels predicted 0, negative or not finite: clipped"
            )
        return f"{aligned(rows)}\n\n{'; '.join(notes)}"


class DepthScore:
    """Depth errors of a dataset: `update` per image, `merge` across processes, `compute` the figures.

    Only pixels with min_m < truth < max_m count (0 and nan are unknown). Predictions are aligned as `how` says, then
    clipped to [min_m, max_m], nan to min_m, as KITTI's evaluations do; those that were 0, negative or not finite are
    counted. An image without known pixels is skipped and counted. The defaults are KITTI's; NYUv2 takes 10 m.
    """

    def __init__(self, min_m: float = 1e-3, max_m: float = 80.0, how: Align = Align.NONE) -> None:
        if not 0 < min_m < max_m < math.inf:
            raise InputError(f"min_m, max_m: wanted 0 < min_m < max_m, both finite, got {min_m:g} and {max_m:g}")
        self.min_m, self.max_m, self.how = min_m, max_m, how
        self._error_sums = np.zeros(len(fields(DepthErrors)))
        self._images = self._skipped = self._known = self._bad = 0

    def update(self, pred_m: Depths, truth_m: Depths) -> None:
        """Count one image: metres [H, W] predicted and true. Raises InputError for other sizes and types."""
        for name, depth_m in (("prediction", pred_m), ("truth", truth_m)):
            if depth_m.ndim != 2 or depth_m.dtype.kind != "f":
                raise InputError(f"{name}: wanted metres as floats [H, W], got {depth_m.dtype} {list(depth_m.shape)}")
        check_same_size(pred_m.shape, truth_m.shape)
        known = known_pixels(truth_m, self.min_m, self.max_m)
        if not known.any():
            self._skipped += 1
            return
        truth = truth_m[known].astype(np.float64)
        pred = align(pred_m[known].astype(np.float64), truth, self.how)
        self._images += 1
        self._known += truth.size
        self._bad += int((~(pred > 0) | np.isinf(pred)).sum())
        clipped = np.clip(np.nan_to_num(pred, nan=self.min_m, posinf=self.max_m), self.min_m, self.max_m)
        self._error_sums += astuple(depth_errors(clipped, truth))

    def merge(self, other: "DepthScore") -> None:
        """Add what another score with the same settings has counted."""
        mine, theirs = ((s.min_m, s.max_m, s.how) for s in (self, other))
        if mine != theirs:
            raise InputError(f"merge: scores must agree in (min_m, max_m, how), got {mine} and {theirs}")
        self._error_sums += other._error_sums
        self._images += other._images
        self._skipped += other._skipped
        self._known += other._known
        self._bad += other._bad

    def compute(self) -> DepthFigures:
        """The figures of everything counted so far."""
        means = self._error_sums / self._images if self._images else np.full_like(self._error_sums, np.nan)
        return DepthFigures(DepthErrors(*means.tolist()), self._images, self._skipped, self._known, self._bad)
