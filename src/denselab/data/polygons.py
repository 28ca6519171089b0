"""Polygons as masks, pixel for pixel as COCO's own tools draw them.

COCO's masks are defined by its rasteriser, so another rule (Pillow's, or pixel centres) gives other areas, boxes and
scores along every outline. The rule: corners are rounded to fifths of a px; edges are walked in steps of a fifth along
their longer axis, always from the end with the smaller coordinate on it; where the walk crosses the middle of a column
of pixels, the column changes between out and in at the first row whose centre is not above the crossing.
Source: cocodataset/cocoapi common/maskApi.c rleFrPoly, of which this is a vectorised account in integers; equal on
every pixel to pycocotools 2.0.11 (tests).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_FIFTHS = 5
_MIDDLE = 2  # of five fifths, counted from 0


def polygons_mask(polygons: Sequence[NDArray[np.float64]], hw: tuple[int, int]) -> NDArray[np.bool_]:
    """The union of polygons, each [N, 2] of x, y in px (0, 0: the corner of the image), as bool [H, W]."""
    mask = np.zeros(hw, np.bool_)
    for polygon in polygons:
        _fill(mask, polygon)
    return mask


def _fill(mask: NDArray[np.bool_], polygon: NDArray[np.float64]) -> None:
    height, width = mask.shape
    x, y = _outline(np.trunc(_FIFTHS * polygon + 0.5).astype(np.int64))
    crossing = np.flatnonzero(x[1:] != x[:-1])
    left = np.minimum(x[crossing], x[crossing + 1])
    upper = np.minimum(y[crossing], y[crossing + 1])
    column = (left - _MIDDLE) // _FIFTHS
    row = np.clip(-((_MIDDLE - upper) // _FIFTHS), 0, height)
    seen = ((left - _MIDDLE) % _FIFTHS == 0) & (column >= 0) & (column < width)
    if not seen.any():
        return
    first, last = int(column[seen].min()), int(column[seen].max())
    # Down the columns one after the other, as COCO's runs go: a change at row H is one at the top of the next column.
    changes = np.bincount((column[seen] - first) * height + row[seen], minlength=(last - first + 1) * height + 1)
    inside = (np.cumsum(changes[: (last - first + 1) * height]) % 2).astype(np.bool_)
    mask[:, first : last + 1] |= inside.reshape(-1, height).T


def _outline(corners: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """x and y of the walk along all edges, in fifths of a px."""
    start, end = corners, np.roll(corners, -1, axis=0)
    span = np.abs(end - start)
    longer = np.where(span[:, 0] >= span[:, 1], 0, 1)
    edges = np.arange(len(corners))
    steps = span[edges, longer]
    backwards = (start > end)[edges, longer]
    low = np.where(backwards[:, None], end, start)
    high = np.where(backwards[:, None], start, end)
    slope = (high - low)[edges, 1 - longer] / np.maximum(steps, 1)
    edge = np.repeat(edges, steps + 1)
    step = np.arange(len(edge)) - np.repeat(np.cumsum(steps + 1) - (steps + 1), steps + 1)
    step = np.where(backwards[edge], steps[edge] - step, step)
    along = low[edge, longer[edge]] + step
    across = np.trunc(low[edge, 1 - longer[edge]] + slope[edge] * step + 0.5).astype(np.int64)
    is_x = longer[edge] == 0
    return np.where(is_x, along, across), np.where(is_x, across, along)
