"""Colours by how they look: OKLab (Ottosson 2020, "A perceptual color space for image processing").

Lightness L is 0..1; a and b span hue and chroma. Equal steps in OKLab look about equally large.
"""

import numpy as np
from numpy.typing import NDArray

from denselab.classes import Colour

Floats = NDArray[np.float64]

_LMS_FROM_RGB = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_LAB_FROM_LMS = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


def from_rgb(rgb: NDArray[np.uint8]) -> Floats:
    """sRGB uint8 [..., 3] to OKLab [..., 3]."""
    value = rgb / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    return np.cbrt(linear @ _LMS_FROM_RGB.T) @ _LAB_FROM_LMS.T


def to_rgb(lab: Floats) -> NDArray[np.uint8]:
    """OKLab [..., 3] to sRGB uint8 [..., 3]; colours that a screen cannot show are clipped."""
    linear = (lab @ np.linalg.inv(_LAB_FROM_LMS).T) ** 3 @ np.linalg.inv(_LMS_FROM_RGB).T
    linear = linear.clip(0, 1)
    value = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.rint(255 * value).astype(np.uint8)


def colour_map(steps: int = 256) -> NDArray[np.uint8]:
    """Dark violet over red and orange to light yellow, uint8 [steps, 3]: lightness rises in equal steps."""
    at = np.linspace(0, 1, steps)
    lightness = 0.26 + 0.68 * at
    chroma = 0.10 + 0.09 * np.sin(np.pi * at)
    hue = np.radians(-70 + 175 * at)
    return to_rgb(np.stack([lightness, chroma * np.cos(hue), chroma * np.sin(hue)], axis=-1))


def shade(colour: Colour, number: int) -> Colour:
    """The colour of object `number` (from 0) of a class: the class colour first, then lighter, darker and turned ones.

    The golden ratio spreads them, so that objects of near numbers differ most.
    """
    if number == 0:
        return colour
    turn = (number * 0.618033988749895 + 0.5) % 1 - 0.5
    lightness, a, b = from_rgb(np.array(colour, np.uint8))
    lightness = np.clip(lightness + 0.40 * turn, 0.35, 0.92)
    angle = np.radians(70 * ((number * 0.754877666 + 0.5) % 1 - 0.5))
    turned = (a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle))
    red, green, blue = to_rgb(np.array([lightness, *turned])).tolist()
    return red, green, blue
