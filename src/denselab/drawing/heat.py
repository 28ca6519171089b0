"""Relevance as colours over a grey photo: orange where a pixel speaks for something, blue where against it."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from denselab.classes import Colour
from denselab.drawing.canvas import INK, PAPER, check_image, font_px, paint
from denselab.drawing.legend import Entry, panel

FOR: Colour = (240, 80, 0)
AGAINST: Colour = (20, 90, 255)

_FULL_COLOUR_SHARE = 0.2
_BLUR_SHARE = 1 / 320


def heat_overlay(
    image: NDArray[np.uint8],
    relevance: NDArray[np.float32],
    title: str,
    at_xy: tuple[int, int] | None = None,
) -> Image.Image:
    """`image` uint8 [H, W, 3] in grey under the colours of `relevance` float32 [H, W], with a title and legend below.

    Relevance is blurred a little, for single pixels are too small to see; the pixels that hold the largest fifth of it
    have full colour. at_xy: a pixel to mark. Raises InputError for an image of another size.
    """
    height, width = relevance.shape
    check_image(image, (height, width))
    heat = _blurred(relevance, max(1.0, _BLUR_SHARE * max(height, width)))
    heat /= full_colour_at(heat)

    def band(rows: slice) -> NDArray[np.uint8]:
        grey = 60 + 0.6 * image[rows].mean(axis=2, keepdims=True, dtype=np.float32)
        weight = heat[rows, :, None]
        colour = np.where(weight > 0, np.array(FOR, np.float32), np.array(AGAINST, np.float32))
        opacity = np.abs(weight).clip(0, 1)
        return np.rint(grey + opacity * (colour - grey)).astype(np.uint8)

    picture = paint((height, width), band, _caption(title, width, font_px((height, width))))
    if at_xy is not None:
        _mark(picture, at_xy, font_px((height, width)) // 2)
    return picture


def full_colour_at(relevance: NDArray[np.float32]) -> float:
    """The magnitude from which on pixels hold a fifth of all of it; 1 where there is none."""
    magnitudes = np.sort(np.abs(relevance), axis=None)[::-1]
    sums = np.cumsum(magnitudes, dtype=np.float64)
    if sums[-1] == 0:
        return 1.0
    return float(magnitudes[np.searchsorted(sums, _FULL_COLOUR_SHARE * sums[-1])])


def _blurred(values: NDArray[np.float32], sigma_px: float) -> NDArray[np.float32]:
    """By a Gaussian; beyond the border lies nothing."""
    reach = int(3 * sigma_px)
    taps = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma_px) ** 2).astype(np.float32)
    taps /= taps.sum()
    for axis in (0, 1):
        padding = [(reach, reach) if each == axis else (0, 0) for each in (0, 1)]
        padded, length = np.pad(values, padding), values.shape[axis]
        values = np.zeros_like(values)
        for place, tap in enumerate(taps):
            values += tap * padded.take(range(place, place + length), axis)
    return values


def _caption(title: str, width_px: int, size_px: int) -> Image.Image:
    entries = panel([Entry(FOR, "speaks for it"), Entry(AGAINST, "speaks against it")], width_px, size_px)
    font = ImageFont.load_default(size_px)
    lines = _wrapped(title, font, entries.width - 2 * size_px)
    row_px = round(1.5 * size_px)
    caption = Image.new("RGB", (entries.width, size_px // 2 + len(lines) * row_px + entries.height), PAPER)
    draw = ImageDraw.Draw(caption)
    for row, line in enumerate(lines):
        draw.text((round(0.6 * size_px), size_px // 2 + row * row_px), line, INK, font, anchor="la")
    caption.paste(entries, (0, size_px // 2 + len(lines) * row_px))
    return caption


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width_px: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width_px:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _mark(picture: Image.Image, at_xy: tuple[int, int], radius_px: int) -> None:
    draw = ImageDraw.Draw(picture)
    x, y = at_xy
    stroke_px = max(1, radius_px // 4)
    for radius, colour in ((radius_px + stroke_px, (0, 0, 0)), (radius_px, (255, 255, 255))):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=colour, width=stroke_px)
