"""Surface normals: which way every pixel faces."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from denselab import drawing
from denselab.drawing.canvas import row_bands
from denselab.errors import InputError
from denselab.results.enlarge import image_hw, linear_unit
from denselab.results.result import Result

if TYPE_CHECKING:
    from PIL.Image import Image

_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class NormalMap(Result):
    """A unit vector for every pixel, in camera axes: x right, y down, z forward; what faces the camera has z < 0.

    cells: float32 [h, w, 3], zeros unknown. source_hw: size of the image in px where the model saw it smaller than it
    is; pixels lie bilinear between cells. Raises InputError for another type or shape, and for other lengths.
    """

    task: ClassVar[str] = "normals"

    cells: NDArray[np.float32]
    model: str = ""
    timing_ms: Mapping[str, float] = field(default_factory=dict[str, float])
    source_hw: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        """Check lengths."""
        cells = self.cells
        if cells.dtype != np.float32 or cells.ndim != 3 or cells.shape[2] != 3 or not cells.size:
            raise InputError(f"xyz: wanted float32 [H, W, 3] with H, W >= 1, got {cells.dtype} {list(cells.shape)}")
        image_hw(cells.shape, self.source_hw)
        for rows in row_bands((cells.shape[0], cells.shape[1])):
            square = np.einsum("hwc,hwc->hw", cells[rows], cells[rows])
            if not ((np.abs(square - 1) < 2 * _TOLERANCE) | (square == 0)).all():
                raise InputError("xyz: wanted unit vectors, or zeros where unknown, got other lengths; normalise them")

    @property
    def hw(self) -> tuple[int, int]:
        """Height and width of the image in px."""
        return image_hw(self.cells.shape, self.source_hw)

    @cached_property
    def xyz(self) -> NDArray[np.float32]:
        """Unit vectors float32 [H, W, 3], zeros unknown."""
        return self._rows(slice(None))

    def to_image(self) -> "Image":
        """An RGB picture with n = rgb / 127.5 - 1, exact to 0.4 degrees; (0, 0, 0) unknown."""
        return drawing.paint(self.hw, lambda rows: drawing.normal_colours(self._rows(rows)))

    def to_array(self) -> NDArray[np.float32]:
        """The vectors."""
        return self.xyz

    def overlay(self, image: NDArray[np.uint8], *, legend: bool = True, opacity: float = 0.75) -> "Image":
        """The image [H, W, 3] uint8 under the colours of its normals, with a legend of directions below."""
        return drawing.normals_overlay(image, self.hw, self._rows, legend, opacity)

    def figures(self) -> dict[str, Any]:
        """How much is known of what the model saw, and how the label PNG is coded."""
        return {
            "known_share": float(self.cells.any(axis=-1).mean()),
            "labels": {"normal": "rgb / 127.5 - 1", "axes": "x right, y down, z forward", "unknown": [0, 0, 0]},
        }

    def _rows(self, rows: slice) -> NDArray[np.float32]:
        return linear_unit(self.cells, self.hw, rows)
