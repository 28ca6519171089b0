"""Panoptic segmentation: every pixel in one segment, every object a segment of its own."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from denselab import drawing
from denselab.classes import VOID, Classes
from denselab.drawing.canvas import font_px, row_bands
from denselab.errors import InputError
from denselab.results.enlarge import image_hw, nearest, nearest_cells
from denselab.results.result import Result
from denselab.results.semantic import SemanticMap
from denselab.segments import Segment, Segments

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_ID = (1 << 24) - 1
"""What COCO's coding of ids as colours can hold."""

Box = tuple[int, int, int, int]


@dataclass(frozen=True, eq=False)
class PanopticMap(Result):
    """A segment for every pixel.

    cells: int32 [h, w], ids of segments, 0 void. segments: all that occur; their ids are 1..2^24-1. source_hw: size of
    the image in px where the model saw it smaller than it is; each pixel is as the cell that it lies in.
    Raises InputError for another type or shape, and for ids and classes that do not belong together.
    """

    task: ClassVar[str] = "panoptic"

    cells: NDArray[np.int32]
    segments: tuple[Segment, ...]
    classes: Classes
    model: str = ""
    timing_ms: Mapping[str, float] = field(default_factory=dict[str, float])
    source_hw: tuple[int, int] | None = None
    _slot_of_id: NDArray[np.int32] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check ids and classes."""
        cells = self.cells
        if cells.dtype != np.int32 or cells.ndim != 2 or not cells.size:
            raise InputError(f"ids: wanted int32 [H, W] with H, W >= 1, got {cells.dtype} {list(cells.shape)}")
        image_hw(cells.shape, self.source_hw)
        ids = [segment.id for segment in self.segments]
        if len(set(ids)) != len(ids) or not all(1 <= number <= MAX_ID for number in ids):
            raise InputError(f"segments: wanted distinct ids in 1..{MAX_ID}, got {sorted(ids)[:8]}")
        for segment in self.segments:
            if not 0 <= segment.class_id < len(self.classes):
                wanted = f"a class in 0..{len(self.classes) - 1}"
                raise InputError(f"segments: wanted {wanted} for segment {segment.id}, got {segment.class_id}")
        largest = max(ids, default=0)
        slots = np.full(largest + 1, -1, np.int32)
        slots[[0, *ids]] = range(len(ids) + 1)
        strange = sorted({i for rows in row_bands(cells.shape) for i in _strangers(cells[rows], slots)})
        if strange:
            raise InputError(f"ids: wanted 0 (void) or the id of a segment, got {strange[:5]}; list their segments")
        object.__setattr__(self, "_slot_of_id", slots)

    @property
    def hw(self) -> tuple[int, int]:
        """Height and width of the image in px."""
        return image_hw(self.cells.shape, self.source_hw)

    @cached_property
    def ids(self) -> NDArray[np.int32]:
        """Ids of segments int32 [H, W], 0 void."""
        return nearest(self.cells, self.hw)

    def mask(self, segment: Segment) -> NDArray[np.bool_]:
        """Where one segment is, bool [H, W]."""
        return nearest(self.cells == segment.id, self.hw)

    def areas_px(self) -> NDArray[np.int64]:
        """Pixels of every segment, in their order; int64 [S]."""
        return self._areas_px[1:].copy()

    def boxes(self) -> tuple[Box, ...]:
        """x0, y0, x1, y1 of every segment in px, the last two exclusive; zeros for one without pixels."""
        height, width = self.cells.shape
        in_row = np.zeros((len(self.segments) + 1, height), bool)
        in_column = np.zeros((len(self.segments) + 1, width), bool)
        for rows in row_bands(self.cells.shape):
            slots = self._slot_of_id[self.cells[rows]]
            in_row[slots, np.arange(height)[rows, None]] = True
            in_column[slots, np.arange(width)] = True
        spans = (_spans(in_column[1:], self.hw[1]), _spans(in_row[1:], self.hw[0]))
        return tuple((x0, y0, x1, y1) for (x0, x1), (y0, y1) in zip(*spans, strict=True))

    def semantic(self) -> SemanticMap:
        """The classes of the segments; what is void stays void."""
        class_of_slot = np.array([VOID, *(segment.class_id for segment in self.segments)], np.uint8)
        class_of_id = class_of_slot[self._slot_of_id]
        return SemanticMap(
            nearest(class_of_id[self.cells], self.hw), self.classes, model=self.model, timing_ms=self.timing_ms
        )

    def to_segments(self) -> Segments:
        """What metrics take."""
        return Segments(self.ids[None], self.segments)

    def to_image(self) -> "Image":
        """COCO's panoptic PNG: id = red + 256 green + 65536 blue, 0 void."""
        return drawing.paint(self.hw, lambda rows: _coded(nearest(self.cells, self.hw, rows)))

    def to_array(self) -> NDArray[np.int32]:
        """The ids."""
        return self.ids

    def overlay(self, image: NDArray[np.uint8], *, legend: bool = True, opacity: float = 0.6) -> "Image":
        """The image [H, W, 3] uint8 under a shade of its class colour for every segment, and lines between them.

        The legend below it holds areas of classes and, of things, how many there are.
        """
        colours = drawing.shades([segment.class_id for segment in self.segments], self.classes)
        slots = self._slot_of_id
        panel = None
        if legend:
            counts, areas = self._by_class()
            panel = drawing.legend(
                self.classes, areas / (self.hw[0] * self.hw[1]), self.hw[1], font_px(self.hw), counts
            )
        return drawing.segments_overlay(
            image,
            self.hw,
            lambda rows: slots[nearest(self.cells, self.hw, rows)],
            colours,
            panel=panel,
            opacity=opacity,
        )

    def figures(self) -> dict[str, Any]:
        """Classes with their segments and areas, and COCO's segments_info."""
        pixels = self.hw[0] * self.hw[1]
        counts, areas = self._by_class()
        return {
            "classes": [
                {
                    "id": i,
                    "name": name,
                    "colour": list(colour),
                    "isthing": int(i in self.classes.things),
                    "segments": int(counts[i]),
                    "pixels": int(areas[i]),
                    "share": float(areas[i] / pixels),
                }
                for i, (name, colour) in enumerate(zip(self.classes.names, self.classes.colours, strict=True))
            ],
            "void": {"id": 0, "pixels": int(self._areas_px[0]), "share": float(self._areas_px[0] / pixels)},
            "segments_info": [
                {
                    "id": segment.id,
                    "category_id": segment.class_id,
                    "category": self.classes.names[segment.class_id],
                    "isthing": int(segment.class_id in self.classes.things),
                    "iscrowd": int(segment.is_crowd),
                    "area": int(area),
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "score": round(segment.score, 4),
                }
                for segment, area, (x0, y0, x1, y1) in zip(self.segments, self.areas_px(), self.boxes(), strict=True)
            ],
        }

    @cached_property
    def _areas_px(self) -> NDArray[np.int64]:
        """Pixels of void and of every segment; int64 [S + 1]."""
        down, across = (
            np.bincount(nearest_cells(length, count), minlength=count)
            for length, count in zip(self.hw, self.cells.shape, strict=True)
        )
        areas = np.zeros(len(self.segments) + 1)
        for rows in row_bands(self.cells.shape):
            weights = np.multiply.outer(down[rows], across).ravel()
            slots = self._slot_of_id[self.cells[rows]].ravel()
            areas += np.bincount(slots, weights, minlength=len(areas))
        return areas.astype(np.int64)

    def _by_class(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Segments and pixels of every class; int64 [K]."""
        class_ids = np.array([segment.class_id for segment in self.segments], np.int64)
        counts = np.bincount(class_ids, minlength=len(self.classes))
        areas = np.bincount(class_ids, self.areas_px(), minlength=len(self.classes))
        return counts, areas.astype(np.int64)


def _strangers(cells: NDArray[np.int32], slots: NDArray[np.int32]) -> set[int]:
    """Ids in some cells that no slot explains."""
    beyond = (cells < 0) | (cells >= len(slots))
    known = np.where(beyond, 0, cells)
    return set(np.unique(cells[beyond | (slots[known] < 0)]).tolist())


def _spans(present: NDArray[np.bool_], length_px: int) -> list[tuple[int, int]]:
    """First and, exclusive, last px along one side of every segment, of bool [S, cells]."""
    cells = present.shape[1]
    starts = np.searchsorted(nearest_cells(length_px, cells), np.arange(cells + 1))
    first, last = present.argmax(axis=1), cells - present[:, ::-1].argmax(axis=1)
    occurs = present.any(axis=1)
    return list(zip((starts[first] * occurs).tolist(), (starts[last] * occurs).tolist(), strict=True))


def _coded(ids: NDArray[np.int32]) -> NDArray[np.uint8]:
    return np.stack([ids & 255, ids >> 8 & 255, ids >> 16], axis=-1).astype(np.uint8)
