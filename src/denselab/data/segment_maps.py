"""From maps of segment ids to class ids, to things alone, and to the pixels that are void."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from denselab.classes import VOID
from denselab.data.truth import Truth, UnknownLabelError
from denselab.segments import Segment, Segments

_SHOWN = 8


def truth_of_segments(
    segments: Segments,
    tasks: Collection[str],
    things: Sequence[int],
    void: NDArray[np.bool_] | None = None,
    background: int | None = None,
    class_ids: NDArray[np.uint8] | None = None,
) -> Truth:
    """What the tasks need of all known segments, things and stuff.

    void: bool [H, W], pixels of which nothing is known, also none in particular that no segment is there.
    background: class of the pixels that are in no segment and not void; they become a segment of it.
    class_ids: semantic truth where it is known by itself; otherwise it is painted, later layers over earlier ones.
    """
    if background is not None:
        segments = _with_background(segments, void, background)
    crowds = by_id(segments.layers, segments.segments, [segment.is_crowd for segment in segments.segments], False)
    unknown: NDArray[np.bool_] = np.logical_or.reduce(crowds, axis=0)
    if void is not None:
        unknown |= void
    if "semantic" in tasks and class_ids is None:
        class_ids = painted(segments)
    if "panoptic" in tasks:
        unknown |= ~segments.layers.any(axis=0)
        return Truth(class_ids, segments, void=unknown)
    if "instance" in tasks:
        return Truth(class_ids, things_of(segments, things), void=unknown)
    return Truth(class_ids)


def by_id(
    layers: NDArray[np.int32], segments: Sequence[Segment], values: Sequence[Any], otherwise: Any
) -> NDArray[Any]:
    """Replace every id in layers by the value of its segment, and ids of none (0 too) by `otherwise`."""
    if not segments:
        return np.full(layers.shape, otherwise)
    order = np.argsort([segment.id for segment in segments])
    ids = np.array([segments[i].id for i in order], np.int32)
    table = np.array([*(values[i] for i in order), otherwise])
    places = np.minimum(np.searchsorted(ids, layers), len(ids) - 1)
    return table[np.where(ids[places] == layers, places, len(ids))]


def painted(segments: Segments) -> NDArray[np.uint8]:
    """Class ids uint8 [H, W], 255 in no segment; later layers lie over earlier ones."""
    class_ids = by_id(segments.layers, segments.segments, [segment.class_id for segment in segments.segments], VOID)
    picture = class_ids[0].astype(np.uint8)
    for layer in class_ids[1:]:
        np.copyto(picture, layer.astype(np.uint8), where=layer != VOID)
    return picture


def things_of(segments: Segments, things: Sequence[int]) -> Segments:
    """Without the segments of other classes, nor their pixels."""
    kept = tuple(segment for segment in segments.segments if segment.class_id in things)
    if len(kept) == len(segments.segments):
        return segments
    is_thing = by_id(segments.layers, kept, [True] * len(kept), False)
    layers = np.where(is_thing, segments.layers, 0)
    return Segments(layers[is_thing.any(axis=(1, 2))] if is_thing.any() else layers[:1], kept)


def with_stuff(
    ids: NDArray[np.int32], segments: Sequence[Segment], class_ids: NDArray[np.uint8], things: Sequence[int]
) -> Segments:
    """One layer of things, and what class ids say of the pixels in none: one segment per class.

    Of a thing class it is a crowd: objects that nobody told apart.
    """
    counts = np.bincount(class_ids[ids == 0], minlength=VOID + 1)
    present = [int(class_id) for class_id in np.flatnonzero(counts[:VOID])]
    first = max((segment.id for segment in segments), default=0) + 1
    new = {class_id: first + place for place, class_id in enumerate(present)}
    table = np.zeros(VOID + 1, np.int32)
    table[present] = list(new.values())
    rest = [Segment(number, class_id, is_crowd=class_id in things) for class_id, number in new.items()]
    return Segments(np.where(ids == 0, table[class_ids], ids)[None], (*segments, *rest))


def check_ids(
    ids: NDArray[np.int32], wanted: Sequence[int], path: Path, where: str, may_lack: Collection[int] = ()
) -> None:
    """Raise UnknownLabelError unless the map [H, W] holds exactly 0 and the wanted ids.

    where: what lists the wanted ids, for the message. may_lack: ids that need no pixel.
    """
    known = np.array([0, *sorted(wanted)], np.int32)
    places = np.minimum(np.searchsorted(known, ids), len(known) - 1)
    strange = ids[known[places] != ids]
    if strange.size:
        values, counts = np.unique(strange, return_counts=True)
        shown = ", ".join(f"{v} ({c} px)" for v, c in zip(values[:_SHOWN], counts[:_SHOWN], strict=True))
        raise UnknownLabelError(
            f"{path}: wanted ids that {where} lists, got ids {shown}; add them there, or mend the map"
        )
    absent = known[np.bincount(places.ravel(), minlength=len(known)) == 0]
    missing = [int(i) for i in absent if i and int(i) not in may_lack]
    if missing:
        raise UnknownLabelError(
            f"{path}: wanted a pixel of every id that {where} lists, got none of {missing[:_SHOWN]}; "
            "remove them there, or mend the map"
        )


def _with_background(segments: Segments, void: NDArray[np.bool_] | None, class_id: int) -> Segments:
    empty = ~segments.layers.any(axis=0)
    if void is not None:
        empty &= ~void
    if not empty.any():
        return segments
    new = Segment(max((segment.id for segment in segments.segments), default=0) + 1, class_id)
    layers = segments.layers.copy()
    layers[0][empty] = new.id
    return Segments(layers, (*segments.segments, new))
