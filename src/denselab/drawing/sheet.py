"""Many small pictures as one."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from denselab.drawing.canvas import INK, MIN_FONT_PX, PAPER


def contact_sheet(
    tiles: Sequence[tuple[Image.Image | NDArray[np.uint8], str]], columns: int = 4, tile_px: int = 320
) -> Image.Image:
    """Pictures with captions in a grid, each fitted into a square of `tile_px`."""
    font_px = max(MIN_FONT_PX, tile_px // 24)
    font = ImageFont.load_default(font_px)
    pictures = [_fitted(picture, tile_px) for picture, _ in tiles]
    columns = max(1, min(columns, len(tiles)))
    gap_px, caption_px = font_px // 2, round(1.6 * font_px)
    rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    heights_px = [max(picture.height for picture in row) + caption_px + gap_px for row in rows]
    sheet = Image.new("RGB", (columns * (tile_px + gap_px) + gap_px, sum(heights_px) + gap_px), PAPER)
    draw = ImageDraw.Draw(sheet)
    for place, (picture, (_, caption)) in enumerate(zip(pictures, tiles, strict=True)):
        row, column = divmod(place, columns)
        left, top = gap_px + column * (tile_px + gap_px), gap_px + sum(heights_px[:row])
        sheet.paste(picture, (left + (tile_px - picture.width) // 2, top))
        text_top = top + heights_px[row] - gap_px - caption_px // 2
        draw.text((left + tile_px // 2, text_top), _cut(caption, font, tile_px), INK, font, anchor="mm")
    return sheet


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
