"""One description of a data set for every layout: its classes, its splits, and how a mask value becomes a class id."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import yaml
from numpy.typing import NDArray

from denselab.classes import MAX_CLASSES, STREET, VOID, Classes
from denselab.data.folder import Layout, Pair, find_layout
from denselab.errors import InputError

DESCRIPTOR_NAMES = ("dataset.yaml", "dataset.yml", "dataset.json")
SCAN_LIMIT = 1000
"""Without a descriptor at most so many masks, evenly spread, are read to learn the class count."""

CAMVID_SEQUENCES = ("0001TP_", "0006R0_", "0016E5_", "Seq05VD_")
CAMVID_VOID = 11
_KEYS = ("names", "colours", "ignore", "images", "masks", "rgb_masks")
_BAND_ROWS = 64
_T = TypeVar("_T")


@dataclass(frozen=True)
class Dataset:
    """Images with masks, and what the masks mean.

    pairs: per split. class_of: mask value -> class id, or `ignore` for void; a mask value is the number in the mask
    file, or 0xRRGGBB where `rgb_masks`. notes: what was assumed, in words for the user.
    """

    root: Path
    classes: Classes
    ignore: int
    pairs: Mapping[str, tuple[Pair, ...]]
    class_of: Mapping[int, int]
    rgb_masks: bool = False
    images_without_mask: tuple[Path, ...] = ()
    masks_without_image: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()

    def split(self, name: str) -> tuple[Pair, ...]:
        """The pairs of a split; raises InputError that lists the splits there are."""
        if name not in self.pairs:
            raise InputError(f"{self.root}: wanted split {name}, got only {', '.join(self.pairs)}; choose one of these")
        return self.pairs[name]


class SizeMismatchError(InputError):
    """A mask of another size than its image."""


class UnknownLabelError(InputError):
    """A mask value that no class and no ignored id explains."""


def open_dataset(root: str | Path) -> Dataset:
    """Find the pairs (layouts: `find_layout`) and the classes of a data folder.

    Classes come from `dataset.yaml`, `.yml` or `.json` in the folder; all keys may be left out:
    `names`: list of class names, or mapping mask id -> name; `colours`: one [red, green, blue] per name, list or
    mapping like `names`; `ignore`: mask ids that are void (255 always is, unless named); `images`, `masks`: names of
    the folders; `rgb_masks: true`: masks are coloured, `colours` says what a colour means and `ignore` lists colours.
    Classes are numbered 0.. in order of their mask ids, named ids in `ignore` left out.

    Without `names`, files named like CamVid's sequences with ids 0..11 get SegNet's eleven classes (11 is void), and
    other masks are scanned: highest id + 1 classes, class_0, class_1, ... Raises InputError for data it cannot use.
    """
    root = Path(root)
    described, source = _read_descriptor(root)
    folders = {key: _typed(described, key, str, "a folder's name", source) for key in ("images", "masks")}
    layout = find_layout(root, **folders)
    rgb_masks = bool(_typed(described, "rgb_masks", bool, "true or false", source))
    notes = layout.notes
    if "names" in described:
        classes, class_of = _described_classes(described, rgb_masks, source)
    elif rgb_masks:
        raise InputError(f"{source}: rgb_masks needs names and colours, one colour per class; add them")
    else:
        ignored = _values(described.get("ignore", []), "ignore", False, source)
        classes, class_of, note = _scanned_classes(root, layout, ignored)
        notes = (*notes, note)
    return Dataset(
        root,
        classes,
        VOID,
        layout.pairs,
        class_of,
        rgb_masks,
        layout.images_without_mask,
        layout.masks_without_image,
        notes,
    )


def read_pair(pair: Pair, dataset: Dataset) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Image uint8 [H, W, 3] and class ids uint8 [H, W], void = 255.

    Raises InputError where a file cannot be read, SizeMismatchError and UnknownLabelError.
    """
    from denselab.runtime.images import open_image

    table = class_table(dataset)
    image = open_image(pair.image)
    values = read_mask_values(pair.mask, dataset.rgb_masks)
    if image.shape[:2] != values.shape:
        raise SizeMismatchError(_size_mismatch(pair, image.shape[:2], values.shape))
    class_ids = np.empty(values.shape, np.int16)
    for top in range(0, len(values), _BAND_ROWS):  # in bands: numpy widens what it looks up to 8 bytes a pixel
        class_ids[top : top + _BAND_ROWS] = table[values[top : top + _BAND_ROWS]]
    if class_ids.min() < 0:
        raise UnknownLabelError(_unknown_labels(pair.mask, values[class_ids < 0], dataset))
    return image, class_ids.astype(np.uint8)


def read_mask_values(path: Path, rgb: bool) -> NDArray[np.integer[Any]]:
    """What the mask file holds per pixel [H, W]: ids, or 0xRRGGBB where `rgb`."""
    from denselab.runtime.images import open_image, open_labels

    if not rgb:
        return open_labels(path)
    colours = open_image(path).astype(np.int32)
    return colours[..., 0] << 16 | colours[..., 1] << 8 | colours[..., 2]


def class_table(dataset: Dataset) -> NDArray[np.int16]:
    """Class id by mask value, -1 where the value means nothing; int16 [65536], or [2**24] for colours."""
    return _table(tuple(dataset.class_of.items()), 1 << (24 if dataset.rgb_masks else 16))


@lru_cache(maxsize=4)
def _table(class_of: tuple[tuple[int, int], ...], size: int) -> NDArray[np.int16]:
    table = np.full(size, -1, np.int16)
    for value, class_id in class_of:
        table[value] = class_id
    table.setflags(write=False)
    return table


def _size_mismatch(pair: Pair, image_hw: tuple[int, ...], mask_hw: tuple[int, ...]) -> str:
    from denselab.runtime.images import read_size

    mend = "make them the same size (resize the mask with nearest neighbour)"
    if read_size(pair.image) == mask_hw:
        mend = "the mask fits the image before its EXIF rotation: rotate the mask too, or drop the image's EXIF tag"
    return (
        f"{pair.mask}: wanted the size of its image {pair.image}, {image_hw[1]}x{image_hw[0]} px, "
        f"got {mask_hw[1]}x{mask_hw[0]} px; {mend}"
    )


def _unknown_labels(mask: Path, unknown: NDArray[np.integer[Any]], dataset: Dataset) -> str:
    values, counts = np.unique(unknown, return_counts=True)
    shown = ", ".join(
        f"{_value_text(int(value), dataset.rgb_masks)} ({count} px)"
        for value, count in zip(values[:8], counts[:8], strict=True)
    )
    more = f" and {len(values) - 8} more" if len(values) > 8 else ""
    kind = "colours" if dataset.rgb_masks else "ids"
    known = [_value_text(value, dataset.rgb_masks) for value in sorted(dataset.class_of)]
    wanted = f"{', '.join(known[:12])}{', ...' if len(known) > 12 else ''}"
    return (
        f"{mask}: wanted {kind} {wanted}, got {kind} {shown}{more}; "
        f"add them to ignore: or names: in {dataset.root / DESCRIPTOR_NAMES[0]}, or mend the mask"
    )


def _value_text(value: int, rgb: bool) -> str:
    return str([value >> 16, value >> 8 & 255, value & 255]) if rgb else str(value)


def _scanned_classes(root: Path, layout: Layout, ignored: Sequence[int]) -> tuple[Classes, dict[int, int], str]:
    """Classes of masks that nothing describes, from the ids in them."""
    pairs = [pair for pairs in layout.pairs.values() for pair in pairs]
    scanned = pairs[:: -(-len(pairs) // SCAN_LIMIT)]
    ids = _ids_in([pair.mask for pair in scanned]) - set(ignored)
    void_of = dict.fromkeys((*ignored, VOID), VOID)
    named = ids - {VOID}
    named_like_camvid = all(pair.image.name.startswith(CAMVID_SEQUENCES) for pair in pairs)
    if named_like_camvid and not ignored and max(named, default=0) <= CAMVID_VOID:
        class_of = {class_id: class_id for class_id in range(len(STREET))}
        note = f"classes are CamVid's (recognised by its sequence names): {len(STREET)}, {CAMVID_VOID} is void"
        return STREET, {**class_of, CAMVID_VOID: VOID, **void_of}, note
    if not named or (VOID in ids and named == {0}):
        raise InputError(
            f"{root}: wanted masks that hold class ids 0, 1, ..., got only {sorted(ids)}; if {VOID} is a class here, "
            f"say so in {root / DESCRIPTOR_NAMES[0]} (names: {{0: background, {VOID}: object}})"
        )
    if max(named) >= MAX_CLASSES:
        raise InputError(
            f"{root}: wanted class ids 0..{MAX_CLASSES - 1}, got ids up to {max(named)} (instance ids?); "
            f"list the class of each id in {root / DESCRIPTOR_NAMES[0]} (names: {{id: name}})"
        )
    count = max(named) + 1
    class_of = {class_id: class_id for class_id in range(count)}
    source = f"from the ids in {len(scanned)} of {len(pairs)} masks"
    note = f"no class names given: class_0 to class_{count - 1}, {source}; {DESCRIPTOR_NAMES[0]} can name them"
    return Classes.named([f"class_{class_id}" for class_id in range(count)]), {**class_of, **void_of}, note


def _ids_in(masks: Sequence[Path]) -> set[int]:
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
        raise InputError(f"{unreadable} (for coloured masks: rgb_masks, names and colours in {DESCRIPTOR_NAMES[0]})")
    return set(np.flatnonzero(seen).tolist())


def _read_descriptor(root: Path) -> tuple[Mapping[str, Any], Path]:
    """What the descriptor file says, and its path; nothing where there is no such file."""
    found = [root / name for name in DESCRIPTOR_NAMES if (root / name).is_file()]
    if len(found) > 1:
        raise InputError(f"{root}: wanted one descriptor, got {' and '.join(path.name for path in found)}; remove one")
    if not found:
        return {}, root / DESCRIPTOR_NAMES[0]
    source = found[0]
    try:
        text = source.read_text("utf-8")
        described = json.loads(text) if source.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{source}: wanted YAML or JSON, got text that does not parse: {error}") from error
    if not isinstance(described, dict):
        raise InputError(f"{source}: wanted keys out of {', '.join(_KEYS)}, got {described!r}")
    unknown = [str(key) for key in described if key not in _KEYS]
    if unknown:
        raise InputError(f"{source}: wanted keys out of {', '.join(_KEYS)}, got {', '.join(unknown)}; rename or remove")
    return cast("dict[str, Any]", described), source


def _typed(described: Mapping[str, Any], key: str, kind: type[_T], wanted: str, source: Path) -> _T | None:
    value = described.get(key)
    if value is not None and not isinstance(value, kind):
        raise InputError(f"{source}: {key}: wanted {wanted}, got {value!r}")
    return value


def _described_classes(described: Mapping[str, Any], rgb_masks: bool, source: Path) -> tuple[Classes, dict[int, int]]:
    names = _by_id(described["names"], "names", source)
    if not all(isinstance(name, str) for name in names.values()):
        raise InputError(f"{source}: names: wanted texts (quote numbers, yes and no), got {list(names.values())}")
    colours = _by_id(described["colours"], "colours", source) if "colours" in described else {}
    if (colours or rgb_masks) and colours.keys() != names.keys():
        raise InputError(
            f"{source}: colours: wanted one for each of the {len(names)} names, got {len(colours)}; "
            "list them in the order of names, or under the same ids"
        )
    ignored = _values(described.get("ignore", []), "ignore", rgb_masks, source)
    value_of = {i: _packed(colours[i], "colours", source) if rgb_masks else i for i in names}
    if len(set(value_of.values())) < len(value_of):
        raise InputError(f"{source}: colours: wanted distinct ones for rgb_masks, got one colour twice")
    kept = [i for i in sorted(names) if value_of[i] not in ignored]
    classes = Classes.named([names[i] for i in kept])
    if colours:
        classes = Classes(classes.names, tuple(_colour(colours[i], "colours", source) for i in kept))
    void_of = dict.fromkeys((*ignored, *(() if rgb_masks else (VOID,))), VOID)
    return classes, void_of | {value_of[i]: class_id for class_id, i in enumerate(kept)}


def _by_id(given: Any, key: str, source: Path) -> dict[int, Any]:
    """A list by place, or a mapping by id."""
    if isinstance(given, list) and given:
        return dict(enumerate(given))
    if isinstance(given, dict) and given:
        return {_mask_id(mask_id, key, source): value for mask_id, value in given.items()}
    raise InputError(f"{source}: {key}: wanted a list, or a mapping of mask id to one, got {given!r}")


def _values(given: Any, key: str, rgb: bool, source: Path) -> list[int]:
    """Mask values: one or a list of ids, or with `rgb` a list of colours."""
    items = given if isinstance(given, list) else [given]
    return [_packed(item, key, source) if rgb else _mask_id(item, key, source) for item in items]


def _mask_id(given: Any, key: str, source: Path) -> int:
    text = str(given)
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise InputError(f"{source}: {key}: wanted mask ids in 0..65535, got {given!r}")
    return int(text)


def _packed(given: Any, key: str, source: Path) -> int:
    red, green, blue = _colour(given, key, source)
    return red << 16 | green << 8 | blue


def _colour(given: Any, key: str, source: Path) -> tuple[int, int, int]:
    match given:
        case [int(red), int(green), int(blue)] if all(0 <= channel <= 255 for channel in (red, green, blue)):
            return red, green, blue
        case _:
            raise InputError(f"{source}: {key}: wanted [red, green, blue] in 0..255, got {given!r}")
