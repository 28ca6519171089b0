"""The inner boundary of every region of a label map (Boundary IoU, Cheng et al. 2021, arXiv:2103.16562)."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray


def boundary_width_px(height_px: int, width_px: int, ratio: float = 0.02) -> int:
    """The paper's d: 2 % of the image diagonal, rounded half to even as the authors do, at least 1 px."""
    return max(1, round(ratio * math.hypot(height_px, width_px)))


def inner_boundary(ids: NDArray[np.integer[Any]], width_px: int) -> NDArray[np.bool_]:
    """Pixels [H, W] within Chebyshev distance `width_px` (>= 1) of another label or of the outside of the image.

    For every class at once, these are the pixels that `width_px` erosions of its mask by a 3x3 square remove, the
    image border counting as background (boundary-iou-api@8006aa9 boundary_iou/utils/boundary_utils.py:12).
    A (2d+1)^2 window holds one label iff none of its (2d)^2 blocks of 2x2 pixels is mixed.
    """
    height, width = ids.shape
    boundary = np.ones((height, width), np.bool_)
    if min(height, width) > 2 * width_px:
        differs_right = ids[:, 1:] != ids[:, :-1]
        mixed = differs_right[1:] | differs_right[:-1] | (ids[1:, 1:] != ids[:-1, 1:])
        inside = slice(width_px, -width_px)
        boundary[inside, inside] = _any_of_next(_any_of_next(mixed, 2 * width_px).T, 2 * width_px).T
    return boundary


def _any_of_next(mask: NDArray[np.bool_], count: int) -> NDArray[np.bool_]:
    """Row i of the result: OR of rows i .. i + count - 1; by doubling, so log2(count) passes."""
    have = 1
    while have < count:
        step = min(have, count - have)
        mask = mask[:-step] | mask[step:]
        have += step
    return mask
