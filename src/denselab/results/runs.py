"""Masks as runs, without ever drawing them whole: their boxes, their crops, their enlargement."""

import numpy as np
from numpy.typing import NDArray

from denselab.results.enlarge import nearest_cells
from denselab.rle import Rle

Box = tuple[int, int, int, int]


def box(mask: Rle) -> Box:
    """x0, y0, x1, y1 in px, the last two exclusive; zeros for an empty mask."""
    height = mask.hw[0]
    stops = np.cumsum(mask.counts)
    starts, ends = stops[:-1:2], stops[1::2]
    filled = ends > starts[: len(ends)]
    starts, ends = starts[: len(ends)][filled], ends[filled]
    if not len(starts):
        return 0, 0, 0, 0
    x0, x1 = int(starts[0]) // height, (int(ends[-1]) - 1) // height + 1
    if (starts // height != (ends - 1) // height).any():  # a run goes on in the next column: it fills both ends
        return x0, 0, x1, height
    return x0, int((starts % height).min()), x1, int(((ends - 1) % height).max()) + 1


def crop(mask: Rle) -> tuple[slice, slice, NDArray[np.bool_]]:
    """Rows and columns of the box of a mask, and what it is inside, bool [rows, columns]."""
    x0, y0, x1, y1 = box(mask)
    height = mask.hw[0]
    stops = np.cumsum(mask.counts).clip(x0 * height, x1 * height)
    lengths = np.diff(stops, prepend=x0 * height)
    inside = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths).reshape(x1 - x0, height).T
    return slice(y0, y1), slice(x0, x1), inside[y0:y1]


def enlarged(mask: NDArray[np.bool_], hw: tuple[int, int]) -> Rle:
    """The runs of a mask [h, w] at height and width hw, each pixel as the cell that it lies in.

    Works on the ends of runs: a large mask costs no more than its outline.
    """
    height, width = hw
    rows, columns = nearest_cells(height, mask.shape[0]), nearest_cells(width, mask.shape[1])
    framed = np.pad(mask.T, ((0, 0), (1, 1)))
    changes = framed[:, 1:] != framed[:, :-1]  # [w, h + 1]: the column is something else from this row on
    per_column = changes.sum(axis=1)
    change_rows = np.searchsorted(rows, np.nonzero(changes)[1])  # of all columns, one after the other
    first_change = np.cumsum(per_column) - per_column
    repeats = per_column[columns]
    nth = np.arange(repeats.sum()) - np.repeat(np.cumsum(repeats) - repeats, repeats)
    places = (
        np.repeat(np.arange(width), repeats) * height + change_rows[np.repeat(first_change[columns], repeats) + nth]
    )
    places, times = np.unique(places, return_counts=True)
    # A run that ends with its column and one that begins the next are one run.
    places = places[(times == 1) & (places < height * width)]
    return Rle(hw, np.diff(np.concatenate(([0], places, [height * width]))))
