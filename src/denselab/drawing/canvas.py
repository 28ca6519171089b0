"""What every picture shares: bands of rows, a canvas with a panel below, the size of text."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from denselab.errors import InputError

PAPER, INK, FRAME = (250, 250, 250), (30, 30, 30), (120, 120, 120)
MIN_FONT_PX = 12
_PIXELS_PER_BAND = 1 << 20


def row_bands(hw: tuple[int, int]) -> list[slice]:
    """All rows of an image in slices of about a million pixels, so that no step holds a second copy of a huge one."""
    rows = max(1, _PIXELS_PER_BAND // hw[1])
    return [slice(top, min(top + rows, hw[0])) for top in range(0, hw[0], rows)]


def font_px(hw: tuple[int, int]) -> int:
    """Text grows with the picture, so that it stays readable when a large one is shown whole on a screen."""
    return max(MIN_FONT_PX, round(min(hw[1] / 55, hw[0] / 35)))


def check_image(image: NDArray[np.uint8], hw: tuple[int, int]) -> None:
    """Raise InputError unless `image` is uint8 [H, W, 3] of that height and width."""
    if image.dtype != np.uint8 or image.shape != (*hw, 3):
        wanted = f"uint8 {[*hw, 3]} like the labels"
        raise InputError(
            f"image: wanted {wanted}, got {image.dtype} {list(image.shape)}; give the image that was labelled"
        )


def paint(
    hw: tuple[int, int], band: Callable[[slice], NDArray[np.uint8]], panel: Image.Image | None = None
) -> Image.Image:
    """A picture whose rows `band(rows)` uint8 [rows, W, 3] gives, with a panel below it."""
    height, width = hw
    size = (width, height) if panel is None else (max(width, panel.width), height + panel.height)
    picture = Image.new("RGB", size, PAPER)
    for rows in row_bands(hw):
        picture.paste(Image.fromarray(band(rows)), (0, rows.start))
    if panel is not None:
        picture.paste(panel, (0, height))
    return picture


def mix(image: NDArray[np.uint8], colours: NDArray[np.uint8], opacity: float) -> NDArray[np.uint8]:
    """`colours` laid over `image`, both uint8 [..., 3], in steps of 1/256."""
    weight = round(256 * opacity)
    below = np.multiply(image, 256 - weight, dtype=np.uint16)
    above = np.multiply(colours, weight, dtype=np.uint16)
    return ((below + above) >> 8).astype(np.uint8)
