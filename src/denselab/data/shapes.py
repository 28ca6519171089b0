"""Objects as polygons and runs, which stay encoded until an image is read."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from denselab.data.polygons import polygons_mask
from denselab.data.segment_maps import truth_of_segments
from denselab.data.truth import SizeMismatchError, Truth
from denselab.errors import InputError
from denselab.rle import Rle, from_string
from denselab.segments import Segment, Segments, from_masks

Polygons = tuple[NDArray[np.float64], ...]


@dataclass(frozen=True, eq=False, slots=True)
class Runs:
    """A mask as COCO's runs of height and width hw; text where they are compressed."""

    hw: tuple[int, int]
    counts: str | NDArray[np.int64]


@dataclass(frozen=True, eq=False, slots=True)
class Shape:
    """One object. number: its annotation id, or line; mask: polygons [N, 2] of x, y in px, or runs."""

    number: int
    class_id: int
    is_crowd: bool
    mask: Polygons | Runs


@dataclass(frozen=True, eq=False)
class Shapes:
    """The objects of one image. hw: its size where the file states it; source: that file."""

    shapes: tuple[Shape, ...]
    hw: tuple[int, int] | None
    things: tuple[int, ...]
    source: Path
    background: int | None = None

    def read(self, image: Path, hw: tuple[int, int], tasks: Collection[str]) -> Truth:
        """See `Labels.read`. Objects without a pixel inside the image are left out."""
        if self.hw is not None and self.hw != hw:
            raise SizeMismatchError(
                f"{self.source}: {image.name}: wanted the size of the image file, {hw[1]}x{hw[0]} px, "
                f"got {self.hw[1]}x{self.hw[0]} px; annotate the image at the size it has"
            )
        return truth_of_segments(self.segments(hw), tasks, self.things, background=self.background)

    def segments(self, hw: tuple[int, int]) -> Segments:
        """Every object with pixels, numbered from 1 in the order of the file; in layers where they overlap."""
        masks = [self._mask(shape, hw) for shape in self.shapes]
        kept = [
            (mask, Segment(place, shape.class_id, is_crowd=shape.is_crowd))
            for place, (shape, mask) in enumerate(zip(self.shapes, masks, strict=True), start=1)
            if mask.any()
        ]
        return from_masks([mask for mask, _ in kept], [segment for _, segment in kept], hw)

    def _mask(self, shape: Shape, hw: tuple[int, int]) -> NDArray[np.bool_]:
        match shape.mask:
            case Runs(size_hw, counts):
                try:
                    runs = from_string(counts, size_hw) if isinstance(counts, str) else Rle(size_hw, counts)
                except InputError as error:
                    raise InputError(f"{self.source}: annotation {shape.number}: {error}; export it again") from error
                if size_hw != hw:
                    raise SizeMismatchError(
                        f"{self.source}: annotation {shape.number}: wanted runs of the image's size, "
                        f"{hw[1]}x{hw[0]} px, got {size_hw[1]}x{size_hw[0]} px; export it again"
                    )
                return runs.to_mask()
            case polygons:
                return polygons_mask(polygons, hw)
