"""Depth as colours: near is light, far is dark, on a logarithmic scale."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from denselab.drawing import oklab
from denselab.drawing.canvas import FRAME, INK, PAPER, check_image, font_px, mix, paint

_FEWEST_TICKS = 3
_ENDS = ("near", "far")


def depth_overlay(
    image: NDArray[np.uint8],
    hw: tuple[int, int],
    depth_m: Callable[[slice], NDArray[np.float32]],
    range_m: tuple[float, float],
    legend: bool = True,
    opacity: float = 0.8,
    metric: bool = True,
) -> Image.Image:
    """`image` uint8 [H, W, 3] under the colours of its depth, with a scale in metres below; unknown stays as it is.

    depth_m(rows): metres float32 [rows, W] of some rows of the image, 0 unknown. range_m: the depths of the lightest
    and the darkest colour. metric: False where the depths are in no unit; then the scale says near and far.
    """
    check_image(image, hw)
    table = oklab.colour_map()[::-1]

    def band(rows: slice) -> NDArray[np.uint8]:
        metres = depth_m(rows)
        colours = table[_steps(metres, range_m, len(table))]
        return np.where((metres > 0)[:, :, None], mix(image[rows], colours, opacity), image[rows])

    return paint(hw, band, scale_bar(range_m, hw[1], font_px(hw), metric) if legend else None)


def scale_bar(range_m: tuple[float, float], width_px: int, font_px: int, metric: bool = True) -> Image.Image:
    """The colours from near to far, with ticks in metres, or with those two words where there is no unit."""
    font = ImageFont.load_default(font_px)
    gap_px, bar_px, tick_px = font_px, round(0.9 * font_px), round(0.35 * font_px)
    length_px = max(2, width_px - 2 * gap_px)
    panel = Image.new("RGB", (length_px + 2 * gap_px, bar_px + tick_px + round(2.4 * font_px)), PAPER)
    draw = ImageDraw.Draw(panel)
    colours = oklab.colour_map(length_px)[::-1]
    top = font_px // 2
    panel.paste(Image.fromarray(np.broadcast_to(colours, (bar_px, length_px, 3)).copy()), (gap_px, top))
    draw.rectangle((gap_px, top, gap_px + length_px - 1, top + bar_px - 1), outline=FRAME)
    free = 0.0
    marks = [(each, f"{each:.3g} m") for each in ticks(range_m)] if metric else zip(range_m, _ENDS, strict=True)
    for depth, text in marks:
        share = np.log(depth / range_m[0]) / np.log(range_m[1] / range_m[0])
        half = font.getlength(text) / 2
        at = gap_px + share * (length_px - 1)
        left = min(max(at - half, 2), panel.width - 2 - 2 * half)
        if left < free:
            continue
        free = left + 2 * half + gap_px / 2
        draw.line((at, top + bar_px, at, top + bar_px + tick_px), INK, max(1, font_px // 12))
        draw.text((left, top + bar_px + tick_px + font_px // 4), text, INK, font, anchor="la")
    return panel


def ticks(range_m: tuple[float, float]) -> Sequence[float]:
    """Round metres (1, 2, 5, 10, ...) within a range, or a few in equal steps where it holds less than three."""
    near, far = range_m
    powers = range(int(np.floor(np.log10(near))), int(np.ceil(np.log10(far))) + 1)
    found = [step * 10.0**power for power in powers for step in (1, 2, 5) if near <= step * 10.0**power <= far]
    return found if len(found) >= _FEWEST_TICKS else [float(metres) for metres in np.geomspace(near, far, 4)]


def _steps(metres: NDArray[np.float32], range_m: tuple[float, float], count: int) -> NDArray[np.uint8]:
    near, far = np.log(np.array(range_m, np.float32))
    shares = (np.log(np.maximum(metres, np.float32(range_m[0]))) - near) / (far - near)
    return (shares.clip(0, 1) * (count - 1)).round().astype(np.uint8)
