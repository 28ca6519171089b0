"""Class colours over an image."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from denselab.classes import VOID, Classes
from denselab.drawing.canvas import check_image, font_px, paint, row_bands
from denselab.drawing.legend import legend


def blend(
    image: NDArray[np.uint8],
    class_ids: NDArray[np.uint8],
    classes: Classes,
    void: int = VOID,
    opacity: float = 0.55,
) -> NDArray[np.uint8]:
    """Class colours [K] laid over `image` uint8 [H, W, 3] where `class_ids` uint8 [H, W] says; void stays as it is."""
    height, width = class_ids.shape
    check_image(image, (height, width))
    image_weight, colour_part = _blend_tables(classes, void, opacity)
    blended = np.empty_like(image)
    for rows in row_bands((height, width)):
        blended[rows] = _blend_band(image[rows], class_ids[rows], image_weight, colour_part)
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
    height, width = class_ids.shape
    check_image(image, (height, width))
    panel = None if shares is None else legend(classes, shares, width, font_px((height, width)))
    image_weight, colour_part = _blend_tables(classes, void, opacity)
    return paint(
        (height, width), lambda rows: _blend_band(image[rows], class_ids[rows], image_weight, colour_part), panel
    )


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
