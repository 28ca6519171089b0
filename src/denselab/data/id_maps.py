"""Instances as id maps: every object has its number, 0 is none. Classes come from a mask, or there is only one."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from denselab.classes import VOID
from denselab.data.class_masks import ClassMask
from denselab.data.segment_maps import truth_of_segments, with_stuff
from denselab.data.truth import SEGMENT_TASKS, Truth, check_size
from denselab.errors import InputError
from denselab.runtime.images import open_labels
from denselab.segments import Segment, Segments

RECOGNISED_FROM = 8
"""So many masks, evenly spread, are read to recognise id maps that nothing describes."""


@dataclass(frozen=True)
class IdMapRule:
    """What the numbers mean. things: class ids; background: class of 0, if it is one; ignored: void numbers."""

    things: tuple[int, ...]
    background: int | None = None
    ignored: tuple[int, ...] = ()


@dataclass(frozen=True)
class IdMap:
    """A map of ids, of 8 or 16 bits.

    mask: the class of every pixel, so that an object has the class of most of its pixels and what is in none is
    stuff; without it all objects are of the only thing class.
    """

    path: Path
    rule: IdMapRule
    mask: ClassMask | None = None

    def read(self, image: Path, hw: tuple[int, int], tasks: Collection[str]) -> Truth:
        """See `Labels.read`."""
        class_ids = self.mask.class_ids(image, hw) if self.mask else None
        if class_ids is not None and not SEGMENT_TASKS.intersection(tasks):
            return Truth(class_ids)
        ids = open_labels(self.path).astype(np.int32)
        check_size(self.path, ids.shape, image, hw)
        void = np.isin(ids, self.rule.ignored) if self.rule.ignored else None
        if void is not None:
            ids[void] = 0
        if class_ids is None:
            only = self.rule.things[0]
            segments = Segments(ids[None], tuple(Segment(number, only) for number in _numbers(ids)))
            return truth_of_segments(segments, tasks, self.rule.things, void, self.rule.background)
        objects = tuple(Segment(n, c) for n, c in _majority(ids, class_ids) if c in self.rule.things)
        ids[~np.isin(ids, [segment.id for segment in objects])] = 0
        segments = with_stuff(ids, objects, class_ids, self.rule.things)
        return truth_of_segments(segments, tasks, self.rule.things, (class_ids == VOID) & (ids == 0), None, class_ids)


def are_id_maps(masks: Sequence[Path]) -> bool:
    """Whether 16-bit masks hold exactly 1..n, with another n in each, as id maps do and class masks do not."""
    tops: set[int] = set()
    for mask in masks[:: -(-len(masks) // RECOGNISED_FROM)]:
        try:
            values = open_labels(mask)
        except InputError:
            continue
        numbers = _numbers(values)
        if values.dtype != np.uint16 or numbers != list(range(1, len(numbers) + 1)):
            return False
        tops.add(len(numbers))
    return len(tops) > 1


def _numbers(ids: NDArray[np.integer]) -> list[int]:
    """The numbers above 0 that occur."""
    counts = np.bincount(ids.ravel())
    return [int(number) for number in np.flatnonzero(counts[1:]) + 1]


def _majority(ids: NDArray[np.int32], class_ids: NDArray[np.uint8]) -> list[tuple[int, int]]:
    """Every number with the class that most of its pixels have; void where all are void."""
    numbers = _numbers(ids)
    place = np.zeros(max(numbers, default=0) + 1, np.int64)
    place[numbers] = np.arange(len(numbers))
    inside = ids > 0
    counts = np.bincount(place[ids[inside]] * 256 + class_ids[inside], minlength=256 * len(numbers)).reshape(-1, 256)
    counts[:, VOID] = np.minimum(counts[:, VOID], 0)
    return [(n, int(c.argmax()) if c.any() else VOID) for n, c in zip(numbers, counts, strict=True)]
