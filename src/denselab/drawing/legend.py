"""Panels that say what colours mean."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from denselab.classes import Classes, Colour
from denselab.drawing.canvas import FRAME, INK, MIN_FONT_PX, PAPER

_SMALLEST_SHARE = 0.001


@dataclass(frozen=True)
class Entry:
    """One line of a legend: a colour, its name, and a figure at the right."""

    colour: Colour
    name: str
    figure: str = ""


def legend(
    classes: Classes,
    shares: NDArray[np.float64],
    width_px: int,
    font_px: int = MIN_FONT_PX,
    counts: NDArray[np.int64] | None = None,
) -> Image.Image:
    """Colour, name and area of every class with at least 0.1 % of the pixels, largest first, in columns.

    shares: fractions of the area [K]; counts: how many objects [K], shown for the things among the classes.
    The panel is `width_px` wide, or wider where one entry needs it.
    """
    order = [int(i) for i in np.argsort(-shares, kind="stable") if shares[i] >= _SMALLEST_SHARE]
    names = [
        f"{classes.names[i]} ({counts[i]})" if counts is not None and i in classes.things else classes.names[i]
        for i in order
    ]
    entries = [
        Entry(classes.colours[i], name, f"{100 * shares[i]:.1f} %") for i, name in zip(order, names, strict=True)
    ]
    return panel(entries, width_px, font_px)


def panel(entries: Sequence[Entry], width_px: int, font_px: int = MIN_FONT_PX) -> Image.Image:
    """Entries in columns, each from the top; `width_px` wide, or wider where one entry needs it."""
    font = ImageFont.load_default(font_px)
    row_px, gap_px = round(1.6 * font_px), round(0.6 * font_px)
    name_px = max((font.getlength(entry.name) for entry in entries), default=0)
    figure_px = max((font.getlength(entry.figure) for entry in entries), default=0)
    column_px = round(font_px + name_px + figure_px + 3.5 * gap_px)
    columns = max(1, min(len(entries), (width_px - gap_px) // column_px))
    rows = -(-len(entries) // columns)
    picture = Image.new("RGB", (max(width_px, column_px + gap_px), rows * row_px + (gap_px if rows else 0)), PAPER)
    draw = ImageDraw.Draw(picture)
    pitch_px = (picture.width - gap_px) // columns
    for place, entry in enumerate(entries):
        left, top = gap_px + place // rows * pitch_px, gap_px // 2 + place % rows * row_px
        middle = top + row_px // 2
        box = (left, middle - font_px // 2, left + font_px, middle + font_px - font_px // 2)
        draw.rectangle(box, entry.colour, FRAME)
        draw.text((left + font_px + gap_px, middle), entry.name, INK, font, anchor="lm")
        draw.text((left + column_px - 2 * gap_px, middle), entry.figure, INK, font, anchor="rm")
    return picture
