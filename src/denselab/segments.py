"""The segments of one image: which pixels, which class, how sure."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from denselab.errors import InputError


@dataclass(frozen=True)
class Segment:
    """One segment. id: its value in the id map, above 0; score: 0..1, 1 for truth; is_crowd: not told apart."""

    id: int
    class_id: int
    score: float = 1.0
    is_crowd: bool = False


@dataclass(frozen=True, eq=False)
class Segments:
    """All segments of one image.

    layers: int32 [L, H, W], ids of segments, 0 where there is none; L is 1 unless segments overlap, and every id is
    in one layer only. Raises InputError for another type or shape, repeated ids, or ids below 1.
    """

    layers: NDArray[np.int32]
    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        """Check types and ids."""
        if self.layers.dtype != np.int32 or self.layers.ndim != 3 or not self.layers.size:
            raise InputError(f"layers: wanted int32 [L, H, W], got {self.layers.dtype} {list(self.layers.shape)}")
        ids = [segment.id for segment in self.segments]
        if len(set(ids)) != len(ids) or any(number < 1 for number in ids):
            raise InputError(f"segments: wanted distinct ids of 1 or more, got {sorted(ids)[:8]}")

    @property
    def hw(self) -> tuple[int, int]:
        """Height and width in px."""
        return self.layers.shape[1], self.layers.shape[2]

    def mask(self, segment: Segment) -> NDArray[np.bool_]:
        """bool [H, W]."""
        return (self.layers == segment.id).any(axis=0)

    def masks(self) -> Iterator[NDArray[np.bool_]]:
        """bool [H, W] of every segment in order."""
        return map(self.mask, self.segments)


def from_masks(masks: Iterable[NDArray[np.bool_]], segments: Iterable[Segment], hw: tuple[int, int]) -> Segments:
    """Lay masks bool [H, W] into as few layers as their order allows: each into the first where it covers nothing."""
    layers = [np.zeros(hw, np.int32)]
    kept = tuple(segments)
    for mask, segment in zip(masks, kept, strict=True):
        free = next((layer for layer in layers if not layer[mask].any()), None)
        if free is None:
            free = np.zeros(hw, np.int32)
            layers.append(free)
        free[mask] = segment.id
    return Segments(np.stack(layers), kept)
