"""Depth: how far every pixel is, in metres or relative to the others."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, assert_never

import numpy as np
from numpy.typing import NDArray

from denselab import drawing
from denselab.depth_unit import DepthUnit
from denselab.drawing.canvas import row_bands
from denselab.errors import InputError
from denselab.results.enlarge import image_hw, linear_depth, nearest
from denselab.results.result import Result

if TYPE_CHECKING:
    from PIL.Image import Image

METRES_PER_UNIT = 0.001
"""Of the 16-bit depth PNG of metres."""
LARGEST_UNIT = 65535

_PERCENTILES = {"near": 2, "median": 50, "far": 98}


@dataclass(frozen=True, eq=False)
class DepthMap(Result):
    """Depth along the camera's z axis for every pixel.

    cells: float32 [h, w], in `unit`, above 0 where known; known: bool [h, w]. source_hw: size of the image in px where
    the model saw it smaller than it is; pixels lie bilinear between known cells. Raises InputError for another type or
    shape, and for known depths that are not finite and above 0.
    """

    task: ClassVar[str] = "depth"

    cells: NDArray[np.float32]
    known: NDArray[np.bool_]
    model: str = ""
    timing_ms: Mapping[str, float] = field(default_factory=dict[str, float])
    source_hw: tuple[int, int] | None = None
    unit: DepthUnit = DepthUnit.METRES

    def __post_init__(self) -> None:
        """Check, and set what is unknown to 0."""
        cells, known = self.cells, self.known
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
            object.__setattr__(self, "cells", np.where(known, cells, np.float32(0)))

    @property
    def hw(self) -> tuple[int, int]:
        """Height and width of the image in px."""
        return image_hw(self.cells.shape, self.source_hw)

    @cached_property
    def depth(self) -> NDArray[np.float32]:
        """float32 [H, W] in `unit`, 0 unknown."""
        return self._rows(slice(None))

    @property
    def metres(self) -> NDArray[np.float32]:
        """float32 [H, W], 0 unknown. Raises InputError where the depth is relative."""
        if self.unit is not DepthUnit.METRES:
            raise InputError(
                f"metres: wanted depth in metres, got the {self.unit.value} depth of {self.model or 'a model'}; take "
                "`depth`, and fit scale and shift of its inverse before you compare it with metres"
            )
        return self.depth

    @cached_property
    def valid(self) -> NDArray[np.bool_]:
        """bool [H, W]: where the depth is known."""
        return nearest(self.known, self.hw)

    def to_image(self) -> "Image":
        """A 16-bit grey picture, 0 unknown: millimetres, where 65.535 m stands for all that is farther; of relative
        depth its inverse, 65535 for what is nearest."""
        from PIL import Image

        units = np.empty(self.hw, np.uint16)
        for rows in row_bands(self.hw):
            depth = self._rows(rows)
            # What is known never becomes 0.
            units[rows] = np.where(depth > 0, np.rint(self._units(depth)).clip(1, LARGEST_UNIT), 0)
        return Image.fromarray(units)

    def to_array(self) -> NDArray[np.float32]:
        """`depth`."""
        return self.depth

    def overlay(self, image: NDArray[np.uint8], *, legend: bool = True, opacity: float = 0.85) -> "Image":
        """The image [H, W, 3] uint8 under the colours of its depth, light is near, with a scale below."""
        percentiles = self._percentiles()
        near, far = percentiles.get("near", 1.0), percentiles.get("far", 1.0)
        if far < 1.1 * near:  # a scale of one depth would have no length
            near, far = near / 1.05, far * 1.05
        metric = self.unit is DepthUnit.METRES
        return drawing.depth_overlay(image, self.hw, self._rows, (near, far), legend, opacity, metric)

    def figures(self) -> dict[str, Any]:
        """Percentiles of what the model saw, how much is known, and how the label PNG is coded."""
        share = float(self.known.mean())
        return {
            self.unit.value: {name: float(f"{depth:.6g}") for name, depth in self._percentiles().items()},
            "percentiles": _PERCENTILES,
            "known_share": share,
            "labels": self._code(),
        }

    def _code(self) -> dict[str, Any]:
        """What the values of the label PNG mean."""
        match self.unit:
            case DepthUnit.METRES:
                saturates_at_m = LARGEST_UNIT * METRES_PER_UNIT
                return {"metres_per_unit": METRES_PER_UNIT, "unknown": 0, "saturates_at_m": saturates_at_m}
            case DepthUnit.RELATIVE:
                return {"code": "inverse depth", "nearest": LARGEST_UNIT, "unknown": 0}
            case _:
                assert_never(self.unit)

    def _units(self, depth: NDArray[np.float32]) -> NDArray[np.float32]:
        """Depths above 0 as values of the label PNG, before they are rounded; others as anything."""
        match self.unit:
            case DepthUnit.METRES:
                return depth / METRES_PER_UNIT
            case DepthUnit.RELATIVE:
                nearest = self.cells[self.known].min(initial=np.inf)
                return LARGEST_UNIT * np.divide(nearest, depth, out=np.zeros_like(depth), where=depth > 0)
            case _:
                assert_never(self.unit)

    def _rows(self, rows: slice) -> NDArray[np.float32]:
        return linear_depth(self.cells, self.known, self.hw, rows)

    def _percentiles(self) -> dict[str, float]:
        """Near, median and far; nothing where nothing is known."""
        known = self.cells[self.known]
        if not known.size:
            return {}
        values = np.percentile(known, list(_PERCENTILES.values()))
        return {name: float(value) for name, value in zip(_PERCENTILES, values, strict=True)}
