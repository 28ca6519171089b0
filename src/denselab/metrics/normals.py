"""Angles between predicted and true surface normals (Fouhey et al. 2013; Eigen & Fergus 2015, arXiv:1411.4734).

All known pixels of the dataset are pooled, each alike: mean, median and root mean square of the angle in degrees, and
the shares of pixels under 11.25, 22.5 and 30 degrees.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from denselab.errors import InputError
from denselab.metrics.checks import check_same_size
from denselab.metrics.headline import Headline
from denselab.metrics.table import aligned, number, or_none, percent

Normals = NDArray[np.floating[Any]]

LIMITS_DEG = (11.25, 22.5, 30.0)
WORST_DEG = 180.0
_BINS_PER_DEG = 100
_TINY = 1e-6


def known_normals(truth: Normals) -> NDArray[np.bool_]:
    """Where the truth [H, W, 3] is known: finite and not the zero vector."""
    return np.isfinite(truth).all(axis=2) & (np.abs(truth).max(axis=2) > _TINY)


def angles_deg(pred: NDArray[np.float64], truth: NDArray[np.float64]) -> NDArray[np.float64]:
    """Angles float64 [N] in 0..180 between vectors [N, 3] of any length; 180 where the prediction has no direction."""
    lengths = np.linalg.norm(pred, axis=1) * np.linalg.norm(truth, axis=1)
    directed = np.isfinite(lengths) & (lengths > _TINY**2)
    cosine = np.divide((pred * truth).sum(axis=1), lengths, out=np.full(len(pred), -1.0), where=directed)
    return np.degrees(np.arccos(np.clip(cosine, -1, 1)))


@dataclass(frozen=True)
class NormalFigures:
    """Angles in degrees over `known_pixels`, shares in 0..1; nan where nothing was known.

    median_deg: within 0.01 degree. bad_pixels: predictions that are zero or not finite, which count as 180 degrees.
    """

    mean_deg: float
    median_deg: float
    rmse_deg: float
    under_11_25: float
    under_22_5: float
    under_30: float
    known_pixels: int
    bad_pixels: int
    images: int
    skipped_images: int

    @property
    def headline(self) -> Headline:
        """Mean angle."""
        return Headline("mean angle", self.mean_deg, higher_is_better=False)

    def to_dict(self, class_names: Sequence[str] | None = None) -> dict[str, object]:
        """Every figure as plain data for JSON; nan becomes None. Normals have no classes: the names are not used."""
        return {name: or_none(value) if isinstance(value, float) else value for name, value in vars(self).items()}

    def to_text(self, class_names: Sequence[str] | None = None) -> str:
        """An aligned table, and what was bad. Normals have no classes: the names are not used."""
        angles = (("mean", self.mean_deg), ("median", self.median_deg), ("RMSE", self.rmse_deg))
        shares = zip(LIMITS_DEG, (self.under_11_25, self.under_22_5, self.under_30), strict=True)
        rows = [(f"{title} angle (degrees)", number(value, 2)) for title, value in angles]
        rows += [(f"under {limit:g} degrees (%)", percent(share)) for limit, share in shares]
        notes = [f"over {self.known_pixels} pixels of {self.images} images"]
        if self.skipped_images:
            notes.append(f"{self.skipped_images} images without known normals left out")
        if self.bad_pixels:
            notes.append(f"{self.bad_pixels} pixels predicted without a direction: counted as 180 degrees")
        return f"{aligned(rows)}\n\n{'; '.join(notes)}"


class NormalScore:
    """Angles of a dataset: `update` per image, `merge` across processes, `compute` the figures.

    The median comes from counts in bins of 0.01 degree, so memory does not grow; everything else is exact.
    """

    def __init__(self) -> None:
        self._histogram = np.zeros(round(WORST_DEG * _BINS_PER_DEG), np.int64)
        self._under = np.zeros(len(LIMITS_DEG), np.int64)
        self._sum_deg = self._sum_deg2 = 0.0
        self._images = self._skipped = self._bad = 0

    def update(self, pred: Normals, truth: Normals) -> None:
        """Count one image: vectors [H, W, 3] of any length, predicted and true; zero or not finite truth is unknown.

        Raises InputError for other sizes and types.
        """
        for name, normals in (("prediction", pred), ("truth", truth)):
            if normals.ndim != 3 or normals.shape[2] != 3 or normals.dtype.kind != "f":
                raise InputError(f"{name}: wanted floats [H, W, 3], got {normals.dtype} {list(normals.shape)}")
        check_same_size(pred.shape, truth.shape)
        known = known_normals(truth)
        if not known.any():
            self._skipped += 1
            return
        chosen = pred[known].astype(np.float64)
        angles = angles_deg(chosen, truth[known].astype(np.float64))
        bins = np.minimum((angles * _BINS_PER_DEG).astype(np.int64), self._histogram.size - 1)
        self._histogram += np.bincount(bins, minlength=self._histogram.size)
        self._under += [int((angles < limit).sum()) for limit in LIMITS_DEG]
        self._sum_deg += float(angles.sum())
        self._sum_deg2 += float((angles**2).sum())
        self._images += 1
        self._bad += int((~known_normals(chosen[None])).sum())

    def merge(self, other: "NormalScore") -> None:
        """Add what another score has counted."""
        self._histogram += other._histogram
        self._under += other._under
        self._sum_deg += other._sum_deg
        self._sum_deg2 += other._sum_deg2
        self._images += other._images
        self._skipped += other._skipped
        self._bad += other._bad

    def compute(self) -> NormalFigures:
        """The figures of everything counted so far."""
        pixels = int(self._histogram.sum())
        mean_deg, mean_square = (total / pixels if pixels else math.nan for total in (self._sum_deg, self._sum_deg2))
        under_11_25, under_22_5, under_30 = (float(count) / pixels if pixels else math.nan for count in self._under)
        return NormalFigures(
            mean_deg=mean_deg,
            median_deg=self._median_deg(pixels) if pixels else math.nan,
            rmse_deg=math.sqrt(mean_square),
            under_11_25=under_11_25,
            under_22_5=under_22_5,
            under_30=under_30,
            known_pixels=pixels,
            bad_pixels=self._bad,
            images=self._images,
            skipped_images=self._skipped,
        )

    def _median_deg(self, pixels: int) -> float:
        """The mean of the two middle pixels, each taken to lie at the lower edge of its bin."""
        below = np.cumsum(self._histogram)
        middle = np.searchsorted(below, ((pixels - 1) // 2, pixels // 2), side="right")
        return float(middle.mean()) / _BINS_PER_DEG
