"""Depth: how far every pixel is."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from denselab import drawing
from denselab.drawing.canvas import row_bands
from denselab.errors import InputError
from denselab.results.enlarge import image_hw, linear_depth, nearest
from denselab.results.result import Result

if TYPE_CHECKING:
    from PIL.Image import Image

METRES_PER_UNIT = 0.001
"""Of the 16-bit depth PNG."""
LARGEST_UNIT = 65535

_PERCENTILES = {"near": 2, "median": 50, "far": 98}


@dataclass(frozen=True, eq=False)
class DepthMap(Result):
    """Metres along the camera's z axis for every pixel.

    cells_m: float32 [h, w], above 0 where known; known: bool [h, w]. source_hw: size of the image in px where the
    model saw it smaller than it is; pixels lie bilinear between known cells. Raises InputError for another type or
    shape, and for known depths that are not finite and above 0.
    """

    task: ClassVar[str] = "depth"

    cells_m: NDArray[np.float32]
    known: NDArray[np.bool_]
    model: str = ""
    timing_ms: Mapping[str, float] = field(default_factory=dict[str, float])
    source_hw: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        """Check, and set what is unknown to 0."""
        cells, known = self.cells_m, self.known
        if cells.dtype != np.float32 or cells.ndim != 2 or not cells.size:
            raise InputError(f"metres: wanted float32 [H, W] with H, W >= 1, got {cells.dtype} {list(cells.shape)}")
        if known.dtype != np.bool_ or known.shape != cells.shape:
            raise InputError(f"valid: wanted bool {list(cells.shape)}, got {known.dtype} {list(known.shape)}")
        image_hw(cells.shape, self.source_hw)
        if not (np.isfinite(cells) & (cells > 0) | ~known).all():
            raise InputError(
                "metres: wanted finite depths above 0 where valid, got others; mark those pixels as not valid"
            )
        if (cells != 0)[~known].any():
            object.__setattr__(self, "cells_m", np.where(known, cells, np.float32(0)))

    @property
    def hw(self) -> tuple[int, int]:
        """Height and width of the image in px."""
        return image_hw(self.cells_m.shape, self.source_hw)

    @cached_property
    def metres(self) -> NDArray[np.float32]:
        """float32 [H, W], 0 unknown."""
        return self._rows_m(slice(None))

    @cached_property
    def valid(self) -> NDArray[np.bool_]:
        """bool [H, W]: where the depth is known."""
        return nearest(self.known, self.hw)

    def to_image(self) -> "Image":
        """A 16-bit grey picture of millimetres, 0 unknown; 65.535 m stands for all that is farther."""
        from PIL import Image

        units = np.empty(self.hw, np.uint16)
        for rows in row_bands(self.hw):
            metres = self._rows_m(rows)
            # What is known never becomes 0.
            units[rows] = np.where(metres > 0, np.rint(metres / METRES_PER_UNIT).clip(1, LARGEST_UNIT), 0)
        return Image.fromarray(units)

    def to_array(self) -> NDArray[np.float32]:
        """The metres."""
        return self.metres

    def overlay(self, image: NDArray[np.uint8], *, legend: bool = True, opacity: float = 0.85) -> "Image":
        """The image [H, W, 3] uint8 under the colours of its depth, light is near, with a scale in metres below."""
        percentiles = self._percentiles_m()
        near, far = percentiles.get("near", 1.0), percentiles.get("far", 1.0)
        if far < 1.1 * near:  # a scale of one depth would have no length
            near, far = near / 1.05, far * 1.05
        return drawing.depth_overlay(image, self.hw, self._rows_m, (near, far), legend, opacity)

    def figures(self) -> dict[str, Any]:
        """Percentiles of what the model saw, how much is known, and how the label PNG is coded."""
        share = float(self.known.mean())
        return {
            "metres": {name: round(metres, 4) for name, metres in self._percentiles_m().items()},
            "percentiles": _PERCENTILES,
            "known_share": share,
            "labels": {
                "metres_per_unit": METRES_PER_UNIT,
                "unknown": 0,
                "saturates_at_m": LARGEST_UNIT * METRES_PER_UNIT,
            },
        }

    def _rows_m(self, rows: slice) -> NDArray[np.float32]:
        return linear_depth(self.cells_m, self.known, self.hw, rows)

    def _percentiles_m(self) -> dict[str, float]:
        """Near, median and far; nothing where nothing is known."""
        known_m = self.cells_m[self.known]
        if not known_m.size:
            return {}
        values = np.percentile(known_m, list(_PERCENTILES.values()))
        return {name: float(value) for name, value in zip(_PERCENTILES, values, strict=True)}
