"""Masks whose pixel values are classes: read through a table from mask value to class id."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from denselab.classes import MAX_CLASSES, STREET, VOID, Classes
from denselab.data.truth import Truth, UnknownLabelError, check_size
from denselab.errors import InputError

SCAN_LIMIT = 1000
"""Without a descriptor at most so many masks, evenly spread, are read to learn the class count."""

CAMVID_SEQUENCES = ("0001TP_", "0006R0_", "0016E5_", "Seq05VD_")
CAMVID_VOID = 11
_BAND_ROWS = 64


@dataclass(frozen=True)
class MaskCoding:
    """What the values of masks mean.

    class_of: (mask value, class id), 255 for void; a mask value is the number in the mask file, or 0xRRGGBB where
    `rgb`. source: the descriptor in which values can be explained.
    """

    class_of: tuple[tuple[int, int], ...]
    rgb: bool
    source: Path


@dataclass(frozen=True)
class ClassMask:
    """A mask file of classes."""

    path: Path
    coding: MaskCoding

    def read(self, image: Path, hw: tuple[int, int], tasks: Collection[str]) -> Truth:
        """Class ids. Raises InputError, SizeMismatchError, UnknownLabelError."""
        return Truth(class_ids=self.class_ids(image, hw))

    def class_ids(self, image: Path, hw: tuple[int, int]) -> NDArray[np.uint8]:
        """uint8 [H, W], void 255."""
        values = read_mask_values(self.path, self.coding.rgb)
        check_size(self.path, values.shape, image, hw)
        table = class_table(self.coding)
        class_ids = np.empty(values.shape, np.int16)
        for top in range(0, len(values), _BAND_ROWS):  # in bands: numpy widens what it looks up to 8 bytes a pixel
            class_ids[top : top + _BAND_ROWS] = table[values[top : top + _BAND_ROWS]]
        if class_ids.min() < 0:
            raise UnknownLabelError(_unknown_labels(self.path, values[class_ids < 0], self.coding))
        return class_ids.astype(np.uint8)


def read_mask_values(path: Path, rgb: bool) -> NDArray[np.integer[Any]]:
    """What the mask file holds per pixel [H, W]: ids, or 0xRRGGBB where `rgb`."""
    from denselab.runtime.images import open_image, open_labels

    if not rgb:
        return open_labels(path)
    colours = open_image(path).astype(np.int32)
    return colours[..., 0] << 16 | colours[..., 1] << 8 | colours[..., 2]


@lru_cache(maxsize=4)
def class_table(coding: MaskCoding) -> NDArray[np.int16]:
    """Class id by mask value, -1 where the value means nothing; int16 [65536], or [2**24] for colours."""
    table = np.full(1 << (24 if coding.rgb else 16), -1, np.int16)
    for value, class_id in coding.class_of:
        table[value] = class_id
    table.setflags(write=False)
    return table


def scanned_classes(
    masks: Sequence[Path], image_names: Sequence[str], ignored: Sequence[int], root: Path, source: Path
) -> tuple[Classes, dict[int, int], str]:
    """Classes of masks that nothing describes, from the ids in them; class id by mask value; a note for the user.

    Images named like CamVid's sequences with ids 0..11 have SegNet's eleven classes. Raises InputError where the ids
    cannot be classes.
    """
    scanned = masks[:: -(-len(masks) // SCAN_LIMIT)]
    ids = _ids_in(scanned, source) - set(ignored)
    void_of = dict.fromkeys((*ignored, VOID), VOID)
    named = ids - {VOID}
    named_like_camvid = all(name.startswith(CAMVID_SEQUENCES) for name in image_names)
    if named_like_camvid and not ignored and max(named, default=0) <= CAMVID_VOID:
        class_of = {class_id: class_id for class_id in range(len(STREET))}
        note = f"classes are CamVid's (recognised by its sequence names): {len(STREET)}, {CAMVID_VOID} is void"
        return STREET, {**class_of, CAMVID_VOID: VOID, **void_of}, note
    if not named or (VOID in ids and named == {0}):
        raise InputError(
            f"{root}: wanted masks that hold class ids 0, 1, ..., got only {sorted(ids)}; if {VOID} is a class here, "
            f"say so in {source} (names: {{0: background, {VOID}: object}})"
        )
    if max(named) >= MAX_CLASSES:
        raise InputError(
            f"{root}: wanted class ids 0..{MAX_CLASSES - 1}, got ids up to {max(named)} (instance ids?); "
            f"list the class of each id in {source} (names: {{id: name}}), or say instances: FOLDER there"
        )
    count = max(named) + 1
    class_of = {class_id: class_id for class_id in range(count)}
    seen = f"from the ids in {len(scanned)} of {len(masks)} masks"
    note = f"no class names given: class_0 to class_{count - 1}, {seen}; {source.name} can name them"
    return Classes.named([f"class_{class_id}" for class_id in range(count)]), {**class_of, **void_of}, note


def _ids_in(masks: Sequence[Path], source: Path) -> set[int]:
    """The ids that occur; masks that cannot be read are passed over while any can."""
    seen = np.zeros(1 << 16, np.bool_)
    unreadable: InputError | None = None
    for mask in masks:
        try:
            values = read_mask_values(mask, rgb=False)
            for top in range(0, len(values), _BAND_ROWS):
                seen[values[top : top + _BAND_ROWS]] = True
        except InputError as error:
            unreadable = error
    if unreadable and not seen.any():
        raise InputError(f"{unreadable} (for coloured masks: rgb_masks, names and colours in {source.name})")
    return set(np.flatnonzero(seen).tolist())


def _unknown_labels(mask: Path, unknown: NDArray[np.integer[Any]], coding: MaskCoding) -> str:
    values, counts = np.unique(unknown, return_counts=True)
    shown = ", ".join(
        f"{_value_text(int(value), coding.rgb)} ({count} px)"
        for value, count in zip(values[:8], counts[:8], strict=True)
    )
    more = f" and {len(values) - 8} more" if len(values) > 8 else ""
    kind = "colours" if coding.rgb else "ids"
    known = [_value_text(value, coding.rgb) for value, _ in sorted(coding.class_of)]
    wanted = f"{', '.join(known[:12])}{', ...' if len(known) > 12 else ''}"
    return (
        f"{mask}: wanted {kind} {wanted}, got {kind} {shown}{more}; "
        f"add them to ignore: or names: in {coding.source}, or mend the mask"
    )


def _value_text(value: int, rgb: bool) -> str:
    return str([value >> 16, value >> 8 & 255, value & 255]) if rgb else str(value)
