"""Surface normals as colours: red for right, green for down, blue for away from the camera."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from denselab.drawing.canvas import check_image, font_px, mix, paint
from denselab.drawing.legend import Entry, panel

_DIRECTIONS = {
    "faces right": (1, 0, 0),
    "faces left": (-1, 0, 0),
    "faces up": (0, -1, 0),
    "faces down": (0, 1, 0),
    "faces the camera": (0, 0, -1),
}


def normal_colours(normals: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Unit vectors [..., 3] as uint8 rgb = 127.5 (n + 1), so n = rgb / 127.5 - 1; unknown ones (0, 0, 0) are black."""
    known = normals.any(axis=-1, keepdims=True)
    return np.where(known, np.rint((normals + 1) * 127.5), 0).astype(np.uint8)


def normals_overlay(
    image: NDArray[np.uint8],
    hw: tuple[int, int],
    normals: Callable[[slice], NDArray[np.float32]],
    legend: bool = True,
    opacity: float = 0.75,
) -> Image.Image:
    """`image` uint8 [H, W, 3] under the colours of its normals, with a legend below; unknown stays as it is.

    normals(rows): unit vectors float32 [rows, W, 3] of some rows of the image, zeros unknown.
    """
    check_image(image, hw)

    def band(rows: slice) -> NDArray[np.uint8]:
        vectors = normals(rows)
        known = vectors.any(axis=-1, keepdims=True)
        return np.where(known, mix(image[rows], normal_colours(vectors), opacity), image[rows])

    return paint(hw, band, _key(hw) if legend else None)


def _key(hw: tuple[int, int]) -> Image.Image:
    entries: list[Entry] = []
    for name, direction in _DIRECTIONS.items():
        red, green, blue = normal_colours(np.array(direction, np.float32)).tolist()
        entries.append(Entry((red, green, blue), name))
    return panel(entries, hw[1], font_px(hw))
