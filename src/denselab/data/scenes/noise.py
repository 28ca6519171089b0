"""Smooth random textures that repeat, made once and looked up."""

from functools import cache

import numpy as np
from numpy.typing import NDArray

from denselab.data.scenes.solids import Map

SIZE = 512
_OCTAVES = ((8, 0.4), (16, 0.3), (32, 0.2), (64, 0.12), (128, 0.08))


@cache
def texture() -> NDArray[np.float32]:
    """Value noise of several octaves [SIZE * SIZE], spread evenly over 0..1, the same every time."""
    rng = np.random.default_rng(20_241)
    total = np.zeros((SIZE, SIZE))
    for cells, strength in _OCTAVES:
        total += strength * _smooth(rng.random((cells, cells)))
    ranks = np.empty(total.size, np.float32)
    ranks[np.argsort(total, axis=None, kind="stable")] = np.linspace(0, 1, total.size, dtype=np.float32)
    ranks.setflags(write=False)
    return ranks


def sample(u: Map, v: Map) -> Map:
    """Noise in 0..1 at texel coordinates (any finite value; wraps)."""
    return texture()[(np.floor(u).astype(np.int32) & SIZE - 1) << 9 | np.floor(v).astype(np.int32) & SIZE - 1]


def cell_hash(u: Map, v: Map, salt: Map) -> Map:
    """An unrelated number in 0..1 for every whole-numbered cell that holds (u, v); salt in 0..1."""
    cell = np.floor(u).astype(np.int32).view(np.uint32) * np.uint32(0x9E3779B1)
    cell ^= np.floor(v).astype(np.int32).view(np.uint32) * np.uint32(0x85EBCA77)
    cell ^= (salt * 65536).astype(np.uint32) * np.uint32(0xC2B2AE3D)
    cell ^= cell >> np.uint32(15)
    cell *= np.uint32(0x2C1B3C6D)
    return (cell >> np.uint32(8)).astype(np.float32) * np.float32(2**-24)


def _smooth(grid: NDArray[np.float64]) -> NDArray[np.float64]:
    """A periodic grid enlarged to SIZE by smooth interpolation."""
    position = np.arange(SIZE) * (len(grid) / SIZE)
    cell = position.astype(int)
    weight = position - cell
    weight = weight * weight * (3 - 2 * weight)
    following = (cell + 1) % len(grid)
    rows = grid[cell] * (1 - weight)[:, None] + grid[following] * weight[:, None]
    return rows[:, cell] * (1 - weight) + rows[:, following] * weight
