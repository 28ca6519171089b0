"""What a model saw small, at the size of the image: whole, or some rows of it."""

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from denselab.errors import InputError

Kind = TypeVar("Kind", bound=np.generic)

_SHORTEST = 1e-3


def image_hw(shape: tuple[int, ...], source_hw: tuple[int, int] | None) -> tuple[int, int]:
    """Size of the image of an answer of that shape. Raises InputError where the image is the smaller one."""
    hw = (shape[0], shape[1])
    if source_hw is None:
        return hw
    if source_hw[0] < hw[0] or source_hw[1] < hw[1]:
        raise InputError(f"source_hw: wanted at least the size of the answer, {hw}, got {source_hw}; results only grow")
    return source_hw


def nearest_cells(length_px: int, cells: int) -> NDArray[np.int64]:
    """The cell in which the centre of each of `length_px` pixels lies, int64 [length_px]."""
    return ((np.arange(length_px) + 0.5) * cells / length_px).astype(np.int64).clip(0, cells - 1)


def nearest(cells: NDArray[Kind], hw: tuple[int, int], rows: slice = slice(None)) -> NDArray[Kind]:
    """Cells [h, w, ...] at H, W (only those rows), each pixel as the cell that it lies in."""
    if cells.shape[:2] == hw:
        return cells[rows]
    down, across = (nearest_cells(length, count) for length, count in zip(hw, cells.shape[:2], strict=True))
    down = down[rows]
    top = int(down[0])
    return cells[top : int(down[-1]) + 1][:, across][down - top]


def linear(cells: NDArray[np.float32], hw: tuple[int, int], rows: slice = slice(None)) -> NDArray[np.float32]:
    """Cells [h, w] or [h, w, C] at H, W (only those rows), bilinear between the centres of cells."""
    if cells.shape[:2] == hw:
        return cells[rows]
    (top, bottom, down), (left, right, across) = (
        _neighbours(length, count) for length, count in zip(hw, cells.shape[:2], strict=True)
    )
    beyond = (1,) * (cells.ndim - 2)
    down = down[rows].reshape(-1, 1, *beyond)
    across = across.reshape(-1, *beyond)
    tall = cells[top[rows]] * (1 - down) + cells[bottom[rows]] * down
    wide = tall[:, left] * (1 - across) + tall[:, right] * across
    return wide.astype(np.float32, copy=False)


def linear_depth(
    cells_m: NDArray[np.float32], known: NDArray[np.bool_], hw: tuple[int, int], rows: slice = slice(None)
) -> NDArray[np.float32]:
    """Metres [h, w] at H, W, bilinear between known cells only; 0 where the nearest cell is unknown."""
    if known.all():
        return linear(cells_m, hw, rows)
    weight = linear(known.astype(np.float32), hw, rows)
    metres = linear(np.where(known, cells_m, np.float32(0)), hw, rows)
    return np.where(nearest(known, hw, rows), metres / np.maximum(weight, np.float32(0.25)), np.float32(0))


def linear_unit(cells: NDArray[np.float32], hw: tuple[int, int], rows: slice = slice(None)) -> NDArray[np.float32]:
    """Unit vectors [h, w, 3] at H, W, bilinear and of unit length again; zeros where the nearest cell is zeros.

    Where neighbours cancel out, the nearest one stands.
    """
    if cells.shape[:2] == hw:
        return cells[rows]
    closest, mixed = nearest(cells, hw, rows), linear(cells, hw, rows)
    length = np.sqrt(np.einsum("hwc,hwc->hw", mixed, mixed))[:, :, None]
    known = closest.any(axis=-1, keepdims=True)
    return np.where(known & (length > _SHORTEST), mixed / np.maximum(length, np.float32(_SHORTEST)), closest)


def _neighbours(length_px: int, cells: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """The two cells between whose centres each pixel's centre lies, and how far it is on the way to the second."""
    at = ((np.arange(length_px) + 0.5) * cells / length_px - 0.5).clip(0, cells - 1)
    first = at.astype(np.int64)
    return first, np.minimum(first + 1, cells - 1), (at - first).astype(np.float32)
