"""Pictures of labels: colours over an image, a legend, a contact sheet."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from denselab.classes import VOID, Classes
from denselab.errors import InputError

_PIXELS_PER_BAND = 1 << 20
_MIN_FONT_PX = 12
_SMALLEST_SHARE = 0.001
_PAPER, _INK, _FRAME = (250, 250, 250), (30, 30, 30), (120, 120, 120)


def blend(
    image: NDArray[np.uint8],
    class_ids: NDArray[np.uint8],
    classes: Classes,
    void: int = VOID,
    opacity: float = 0.55,
) -> NDArray[np.uint8]:
    """Class colours [K] laid over `image` uint8 [H, W, 3] where `class_ids` uint8 [H, W] says; void stays as it is."""
    _check_sizes(image, class_ids)
    image_weight, colour_part = _blend_tables(classes, void, opacity)
    blended = np.empty_like(image)
    for band in _bands(class_ids.shape):
        blended[band] = _blend_band(image[band], class_ids[band], image_weight, colour_part)
    return blended


def overlay(
    image: NDArray[np.uint8],
    class_ids: NDArray[np.uint8],
    classes: Classes,
    shares: NDArray[np.float64] | None,
    void: int = VOID,
    opacity: float = 0.55,
) -> Image.Image:
    """`blend` as a picture; with `shares` [K], a legend lies below it. Holds no second copy of the image."""
    _check_sizes(image, class_ids)
    height, width = class_ids.shape
    panel = None if shares is None else legend(classes, shares, width, _font_px(height, width))
    size = (width, height) if panel is None else (max(width, panel.width), height + panel.height)
    picture = Image.new("RGB", size, _PAPER)
    if panel is not None:
        picture.paste(panel, (0, height))
    image_weight, colour_part = _blend_tables(classes, void, opacity)
    for band in _bands(class_ids.shape):
        pixels = _blend_band(image[band], class_ids[band], image_weight, colour_part)
        picture.paste(Image.fromarray(pixels), (0, band.start))
    return picture


def legend(classes: Classes, shares: NDArray[np.float64], width_px: int, font_px: int = _MIN_FONT_PX) -> Image.Image:
    """Colour, name and area of every class with at least 0.1 % of the pixels, largest first, in columns.

    shares: fractions of the area [K]. The panel is `width_px` wide, or wider where one entry needs it.
    """
    order = [int(i) for i in np.argsort(-shares, kind="stable") if shares[i] >= _SMALLEST_SHARE]
    font = ImageFont.load_default(font_px)
    row_px, gap_px = round(1.6 * font_px), round(0.6 * font_px)
    names = [classes.names[i] for i in order]
    areas = [f"{100 * shares[i]:.1f} %" for i in order]
    name_px = max((font.getlength(name) for name in names), default=0)
    area_px = max((font.getlength(area) for area in areas), default=0)
    column_px = round(font_px + name_px + area_px + 3.5 * gap_px)
    columns = max(1, min(len(order), (width_px - gap_px) // column_px))
    rows = -(-len(order) // columns)
    panel = Image.new("RGB", (max(width_px, column_px + gap_px), rows * row_px + (gap_px if rows else 0)), _PAPER)
    draw = ImageDraw.Draw(panel)
    pitch_px = (panel.width - gap_px) // columns
    for place, (index, name, area) in enumerate(zip(order, names, areas, strict=True)):
        left, top = gap_px + place // rows * pitch_px, gap_px // 2 + place % rows * row_px
        middle = top + row_px // 2
        box = (left, middle - font_px // 2, left + font_px, middle + font_px - font_px // 2)
        draw.rectangle(box, classes.colours[index], _FRAME)
        draw.text((left + font_px + gap_px, middle), name, _INK, font, anchor="lm")
        draw.text((left + column_px - 2 * gap_px, middle), area, _INK, font, anchor="rm")
    return panel


def contact_sheet(
    tiles: Sequence[tuple[Image.Image | NDArray[np.uint8], str]], columns: int = 4, tile_px: int = 320
) -> Image.Image:
    """Pictures with captions in a grid, each fitted into a square of `tile_px`."""
    font_px = max(_MIN_FONT_PX, tile_px // 24)
    font = ImageFont.load_default(font_px)
    pictures = [_fitted(picture, tile_px) for picture, _ in tiles]
    columns = max(1, min(columns, len(tiles)))
    gap_px, caption_px = font_px // 2, round(1.6 * font_px)
    rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    heights_px = [max(picture.height for picture in row) + caption_px + gap_px for row in rows]
    sheet = Image.new("RGB", (columns * (tile_px + gap_px) + gap_px, sum(heights_px) + gap_px), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for place, (picture, (_, caption)) in enumerate(zip(pictures, tiles, strict=True)):
        row, column = divmod(place, columns)
        left, top = gap_px + column * (tile_px + gap_px), gap_px + sum(heights_px[:row])
        sheet.paste(picture, (left + (tile_px - picture.width) // 2, top))
        text_top = top + heights_px[row] - gap_px - caption_px // 2
        draw.text((left + tile_px // 2, text_top), _cut(caption, font, tile_px), _INK, font, anchor="mm")
    return sheet


def _check_sizes(image: NDArray[np.uint8], class_ids: NDArray[np.uint8]) -> None:
    if image.dtype != np.uint8 or image.shape != (*class_ids.shape, 3):
        wanted = f"uint8 {[*class_ids.shape, 3]} like the labels"
        raise InputError(
            f"image: wanted {wanted}, got {image.dtype} {list(image.shape)}; give the image that was labelled"
        )


def _bands(shape: tuple[int, ...]) -> list[slice]:
    rows = max(1, _PIXELS_PER_BAND // shape[1])
    return [slice(top, min(top + rows, shape[0])) for top in range(0, shape[0], rows)]


def _blend_tables(classes: Classes, void: int, opacity: float) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    """Per id: the weight of the image [256] and the colour times its weight [256, 3], in 1/256."""
    weight = round(256 * opacity)
    image_weight = np.full((256, 1), 256, np.uint16)
    image_weight[: len(classes)] = 256 - weight
    colour_part = np.zeros((256, 3), np.uint16)
    colour_part[: len(classes)] = np.array(classes.colours, np.uint16) * weight
    image_weight[void], colour_part[void] = 256, 0
    return image_weight, colour_part


def _blend_band(
    image: NDArray[np.uint8],
    class_ids: NDArray[np.uint8],
    image_weight: NDArray[np.uint16],
    colour_part: NDArray[np.uint16],
) -> NDArray[np.uint8]:
    mixed = image * image_weight[class_ids] + colour_part[class_ids]
    return (mixed >> 8).astype(np.uint8)


def _font_px(height_px: int, width_px: int) -> int:
    """Text grows with the picture, so that it stays readable when a large one is shown whole on a screen."""
    return max(_MIN_FONT_PX, round(min(width_px / 55, height_px / 35)))


def _fitted(picture: Image.Image | NDArray[np.uint8], tile_px: int) -> Image.Image:
    picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    scale = tile_px / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def _cut(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width_px: int) -> str:
    if font.getlength(text) <= width_px:
        return text
    while text and font.getlength("…" + text) > width_px:
        text = text[1:]
    return "…" + text
