"""A confusion matrix and a reliability plot as pictures."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from denselab.errors import InputError
from denselab.metrics.calibration import CalibrationFigures
from denselab.metrics.table import percent

INK, ABSENT = (30, 30, 30), (236, 236, 236)
MAX_DRAWN_CLASSES = 500
BAR, GAP = (8, 64, 129), (232, 161, 152)
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


def reliability_picture(figures: CalibrationFigures, side_px: int = 480) -> Image.Image:
    """RGB picture of accuracy over confidence: a bar per bin, the gap to its mean confidence in red, the diagonal of a
    calibrated model, and below how the pixels are spread over the bins."""
    margin_px, spread_px, count = 46, side_px // 4, len(figures.pixels)
    font = ImageFont.load_default(13)
    picture = Image.new("RGB", (side_px + 2 * margin_px, side_px + spread_px + 3 * margin_px), "white")
    draw = ImageDraw.Draw(picture)
    left, top, bottom = margin_px, margin_px, margin_px + side_px
    floor = bottom + margin_px + spread_px
    most = max(int(figures.pixels.max()), 1)
    for m in range(count):
        if not figures.pixels[m]:
            continue
        x0, x1 = left + side_px * m // count, left + side_px * (m + 1) // count - 2
        accuracy_y, confidence_y = (round(bottom - side_px * v[m]) for v in (figures.accuracy, figures.confidence))
        draw.rectangle((x0, accuracy_y, x1, bottom), BAR)
        draw.rectangle((x0, min(accuracy_y, confidence_y), x1, max(accuracy_y, confidence_y)), GAP)
        draw.rectangle((x0, floor - round(spread_px * figures.pixels[m] / most), x1, floor), ABSENT, outline=INK)
    draw.line((left, bottom, left + side_px, top), INK)
    draw.rectangle((left, top, left + side_px, bottom), outline=INK)
    for share in (0.0, 0.5, 1.0):
        draw.text((left - 6, bottom - round(side_px * share)), f"{share:g}", INK, font, anchor="rm")
        draw.text((left + round(side_px * share), bottom + 6), f"{share:g}", INK, font, anchor="mt")
    draw.text((left, top - 12), f"accuracy over confidence; ECE {percent(figures.ece)} %", INK, font, anchor="ls")
    draw.text((left, floor + 8), "pixels by confidence", INK, font, anchor="lt")
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
