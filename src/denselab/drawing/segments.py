"""Segments over an image: a shade for each, thin lines between them, names on objects."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from denselab.classes import Classes, Colour
from denselab.drawing import oklab
from denselab.drawing.canvas import check_image, font_px, mix, paint

Slots = NDArray[np.integer[Any]]
Box = tuple[int, int, int, int]

_LINE = (255, 255, 255)
_LINE_OPACITY = 0.65
_SIDE_PER_LINE_PX = 700
_SMALLEST_TEXT_PX = 10


@dataclass(frozen=True)
class Tag:
    """A text for an object. box: x0, y0, x1, y1 of the object in px, the last two exclusive."""

    text: str
    colour: Colour
    box: Box


def shades(class_ids: Sequence[int], classes: Classes) -> tuple[Colour, ...]:
    """A colour for every segment: its class's, varied from one segment of the class to the next."""
    seen: dict[int, int] = {}
    colours: list[Colour] = []
    for class_id in class_ids:
        number = seen.get(class_id, 0)
        seen[class_id] = number + 1
        colours.append(oklab.shade(classes.colours[class_id], number))
    return tuple(colours)


def segments_overlay(
    image: NDArray[np.uint8],
    hw: tuple[int, int],
    slots: Callable[[slice], Slots],
    colours: Sequence[Colour],
    tags: Sequence[Tag] = (),
    panel: Image.Image | None = None,
    opacity: float = 0.55,
) -> Image.Image:
    """`image` uint8 [H, W, 3] under the colours of its segments, with lines between them, tags, and a panel below.

    slots(rows): integers [rows, W] of some rows of the image: 0 where it stays as it is, s for colours[s - 1].
    tags: the first come first; one that would be larger than its object, or finds no free place at it, is left out.
    """
    height = hw[0]
    check_image(image, hw)
    table = np.array([(0, 0, 0), *colours], np.uint8)
    line_px = max(1, round(min(hw) / _SIDE_PER_LINE_PX))

    def band(rows: slice) -> NDArray[np.uint8]:
        top, bottom = max(0, rows.start - line_px), min(height, rows.stop + line_px)
        seen = slots(slice(top, bottom))
        lines = _lines(seen, line_px)[rows.start - top : rows.stop - top]
        inner = seen[rows.start - top : rows.stop - top]
        mixed = np.where((inner > 0)[:, :, None], mix(image[rows], table[inner], opacity), image[rows])
        mixed[lines] = mix(mixed[lines], np.array(_LINE, np.uint8), _LINE_OPACITY)
        return mixed

    picture = paint(hw, band, panel)
    _draw_tags(picture, hw, tags)
    return picture


def _lines(slots: Slots, width_px: int) -> NDArray[np.bool_]:
    """Where a segment ends: the last pixel before another one, to the right or below, and so many px around."""
    lines = np.zeros(slots.shape, bool)
    lines[:, :-1] |= slots[:, 1:] != slots[:, :-1]
    lines[:-1] |= slots[1:] != slots[:-1]
    for step in range(1, width_px):
        thin = lines.copy()
        if step % 2:
            lines[1:] |= thin[:-1]
            lines[:, 1:] |= thin[:, :-1]
        else:
            lines[:-1] |= thin[1:]
            lines[:, :-1] |= thin[:, 1:]
    return lines


def _draw_tags(picture: Image.Image, hw: tuple[int, int], tags: Sequence[Tag]) -> None:
    draw = ImageDraw.Draw(picture)
    size_px = max(_SMALLEST_TEXT_PX, round(0.8 * font_px(hw)))
    font = ImageFont.load_default(size_px)
    taken: list[Box] = []
    for tag in tags:
        width_px, height_px = round(font.getlength(tag.text) + 0.6 * size_px), round(1.3 * size_px)
        x0, y0, x1, y1 = tag.box
        if (x1 - x0) * (y1 - y0) < height_px * width_px:
            continue
        box = _free_place(tag.box, (height_px, width_px), hw, taken)
        if box is None:
            continue
        taken.append(box)
        ink = (0, 0, 0) if oklab.from_rgb(np.array(tag.colour, np.uint8))[0] > 0.62 else (255, 255, 255)
        draw.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), tag.colour, _LINE)
        draw.text(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), tag.text, ink, font, anchor="mm")


def _free_place(object_box: Box, size_hw: tuple[int, int], hw: tuple[int, int], taken: Sequence[Box]) -> Box | None:
    """Above the object, else at its top, its middle, its bottom, or below: the first place that nothing takes."""
    height_px, width_px = size_hw
    x0, y0, x1, y1 = object_box
    left = min(max(0, (x0 + x1 - width_px) // 2), max(0, hw[1] - width_px))
    for top in (y0 - height_px, y0, (y0 + y1 - height_px) // 2, y1 - height_px, y1):
        box = (left, top, left + width_px, top + height_px)
        inside = top >= 0 and box[3] <= hw[0] and box[2] <= hw[1]
        if inside and not any(_meet(box, other) for other in taken):
            return box
    return None


def _meet(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
