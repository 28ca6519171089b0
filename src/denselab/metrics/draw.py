"""A confusion matrix as a picture."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from denselab.errors import InputError

INK, ABSENT = (30, 30, 30), (236, 236, 236)
MAX_DRAWN_CLASSES = 500
LIGHT, DARK = np.array((255, 255, 255)), np.array((8, 64, 129))


def confusion_picture(confusion: NDArray[np.int64], names: Sequence[str]) -> Image.Image:
    """RGB picture of pixel counts [K, K] or [K, K+1] (rows truth), each row as percent of its true pixels.

    The extra column, "other", is drawn if anything was predicted outside the classes. Rows of absent classes are
    grey. Numbers appear where cells are large enough, up to about 60 classes. Raises InputError for a matrix that
    does not fit the names and for more than 500 classes.
    """
    rows, columns = len(names), confusion.shape[-1]
    if confusion.shape not in ((rows, rows), (rows, rows + 1)):
        raise InputError(
            f"confusion: wanted {[rows, rows]} or {[rows, rows + 1]} for {rows} names, got {list(confusion.shape)}"
        )
    if rows > MAX_DRAWN_CLASSES:
        raise InputError(f"confusion: wanted at most {MAX_DRAWN_CLASSES} classes to draw, got {rows}; use the numbers")
    if columns > rows and not confusion[:, rows].any():
        columns = rows
    titles = [title if len(title) <= 28 else f"{title[:27]}…" for title in [*names, "other"][:columns]]
    total = confusion.sum(axis=1, keepdims=True)
    shares = confusion[:, :columns] / np.maximum(total, 1)

    cell_px = int(np.clip(2000 // rows, 12, 46))
    font = ImageFont.load_default(min(15, cell_px - 1))
    small = ImageFont.load_default(13)
    margin_px = 12
    label_px = round(max(font.getlength(title) for title in titles)) + 2 * margin_px
    caption = "rows: truth, columns: prediction, in % of the true pixels"
    left, top = label_px, label_px + 18
    width = max(left + columns * cell_px, round(small.getlength(caption)) + margin_px) + margin_px
    size = (width, top + rows * cell_px + margin_px)
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    draw.text((margin_px, margin_px // 2), caption, INK, small)

    for index, title in enumerate(titles):
        middle = index * cell_px + cell_px // 2
        _paste_rotated(picture, title, (left + index * cell_px, top - margin_px // 2), font, cell_px)
        if index < rows:
            draw.text((left - margin_px // 2, top + middle), title, INK, font, anchor="rm")
    for row in range(rows):
        for column in range(columns):
            share = float(shares[row, column])
            x, y = left + column * cell_px, top + row * cell_px
            red, green, blue = (int(v) for v in LIGHT + (DARK - LIGHT) * share)
            fill = (red, green, blue) if total[row] else ABSENT
            draw.rectangle((x, y, x + cell_px - 2, y + cell_px - 2), fill, outline=ABSENT)
            if cell_px >= 30 and share >= 0.0005:
                ink = (255, 255, 255) if share > 0.5 else INK
                text = f"{100 * share:.1f}" if share < 0.9995 else "100"
                draw.text((x + cell_px // 2, y + cell_px // 2), text, ink, small, anchor="mm")
    return picture


def _paste_rotated(
    picture: Image.Image,
    text: str,
    foot: tuple[int, int],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    width_px: int,
) -> None:
    """Write upwards; `foot` is the left bottom corner of a strip of `width_px`."""
    strip = Image.new("L", (round(font.getlength(text)) + 2, width_px), 0)
    ImageDraw.Draw(strip).text((0, width_px // 2), text, 255, font, anchor="lm")
    upright = strip.transpose(Image.Transpose.ROTATE_90)
    picture.paste(INK, (foot[0], foot[1] - upright.height), upright)
