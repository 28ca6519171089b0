"""Huge images: class ids by overlapping tiles whose grid is that of the whole image.

Only class ids, for they depend on what is near. Objects are cut by the borders of tiles, and depth and normals depend
on the whole view, so for those tasks a larger image is shrunk to WHOLE_PX pixels (see runtime.predictor).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from denselab.errors import InputError
from denselab.runtime.session import Session

WHOLE_PX = 2048 * 1536
"""Up to this many pixels an image is run whole."""
TILE_PX = 1536
OVERLAP_PX = 192


@dataclass(frozen=True)
class Span:
    """One side of a tile, in px of the image: the engine sees start..stop, the answer keeps keep_start..keep_stop."""

    start: int
    stop: int
    keep_start: int
    keep_stop: int


@dataclass(frozen=True)
class Tile:
    """A window of the image and the part of its answer that is kept."""

    rows: Span
    columns: Span


def tile_plan(hw: tuple[int, int], tile_px: int, overlap_px: int, multiple: int) -> list[Tile]:
    """Tiles of at most tile_px a side (rounded down to the multiple) that keep every pixel of hw exactly once.

    overlap_px: how far at least a tile sees beyond what it keeps, except at the border of the image. Tiles start
    on multiples of `multiple`, so a network samples them as it samples the whole image: where nothing further than
    overlap_px away matters to a pixel, its class is the same. Tiles of one plan are of nearly one size.
    Raises InputError where a tile has no room between its overlaps.
    """
    rows, columns = (_spans(length, tile_px, overlap_px, multiple) for length in hw)
    return [Tile(row, column) for row in rows for column in columns]


def _spans(length: int, tile_px: int, overlap_px: int, multiple: int) -> list[Span]:
    most = (tile_px - 2 * overlap_px) // multiple * multiple
    if most < multiple:
        raise InputError(
            f"tile_px: wanted {2 * overlap_px + multiple} or more (two overlaps + {multiple}), got {tile_px}"
        )
    inner = length - 2 * overlap_px  # what is kept beyond the two overlaps that the image's border gives back
    if inner <= most:
        return [Span(0, length, 0, length)]
    count = -(-inner // most)
    step = -(-inner // (count * multiple)) * multiple
    starts = range(0, inner, step)
    cuts = [0, *(start + overlap_px for start in starts[1:]), length]
    stops = [min(start + step + 2 * overlap_px, length) for start in starts]
    return [Span(*span) for span in zip(starts, stops, cuts[:-1], cuts[1:], strict=True)]


def run_tiled(
    session: Session, image: NDArray[np.uint8], multiple: int, tile_px: int | None = None, overlap_px: int = OVERLAP_PX
) -> NDArray[np.uint8]:
    """Class ids [H, W] of an image [H, W, 3]: whole if it is small, else by tiles.

    tile_px: None runs images of up to WHOLE_PX pixels whole and larger ones by tiles of TILE_PX.
    """
    height, width = image.shape[:2]
    if tile_px is None and height * width <= WHOLE_PX:
        return session.run(image)["class_ids"]
    class_ids = np.empty((height, width), np.uint8)
    for tile in tile_plan((height, width), tile_px or TILE_PX, overlap_px, multiple):
        r, c = tile.rows, tile.columns
        ids = session.run(image[r.start : r.stop, c.start : c.stop])["class_ids"]
        class_ids[r.keep_start : r.keep_stop, c.keep_start : c.keep_stop] = ids[
            r.keep_start - r.start : r.keep_stop - r.start, c.keep_start - c.start : c.keep_stop - c.start
        ]
    return class_ids
