"""Which truth belongs to which image, and in which split: folders and file names only, no pixel is read."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from denselab.data.dataset import LeftOut
from denselab.data.depth import DEPTH_SUFFIXES
from denselab.data.description import FROM_DEPTH, Description
from denselab.data.splits import SPLITS, split_named
from denselab.errors import InputError
from denselab.files import IMAGE_SUFFIXES

MASK_SUFFIXES = frozenset({".png", ".bmp", ".tif", ".tiff"})
"""Formats that keep ids exactly; a JPEG changes them."""

_MASK_ENDINGS = ("", "_mask", "_L", "_label", "_labels", "_labelIds", "_gt", "_seg")


@dataclass(frozen=True)
class FileKind:
    """What a file may be of an image.

    key: in the descriptor; word: for messages; folders: the usual names of its folder; endings: what may follow the
    image's stem in its name.
    """

    key: str
    word: str
    folders: tuple[str, ...]
    suffixes: frozenset[str]
    endings: tuple[str, ...]


IMAGES = FileKind("images", "image", ("images", "image", "imgs", "rgb", "JPEGImages"), IMAGE_SUFFIXES, ("",))
MASKS = FileKind(
    "masks",
    "mask",
    ("masks", "mask", "labels", "label", "annotations", "gt", "SegmentationClass"),
    MASK_SUFFIXES,
    _MASK_ENDINGS,
)
INSTANCES = FileKind(
    "instances",
    "instance map",
    ("instances", "instance_ids", "instanceIds"),
    MASK_SUFFIXES,
    (*_MASK_ENDINGS, "_instances", "_instanceIds"),
)
DEPTH = FileKind("depth", "depth map", ("depth", "depths"), DEPTH_SUFFIXES, ("", "_depth"))
NORMALS = FileKind("normals", "normal map", ("normals", "normal"), DEPTH_SUFFIXES, ("", "_normal", "_normals"))
TRUTHS = (MASKS, INSTANCES, DEPTH, NORMALS)


@dataclass(frozen=True)
class Files:
    """An image file and the files of its truths. name: its path below the image folder, without suffix."""

    name: str
    image: Path
    truths: Mapping[FileKind, Path]


@dataclass(frozen=True)
class FoundFiles:
    """Files per split in order of their names, those left out, and remarks for the user."""

    splits: Mapping[str, tuple[Files, ...]]
    kinds: frozenset[FileKind]
    left_out: tuple[LeftOut, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Place:
    """A folder; before, after: what a pattern wants before and after the name of a file in it."""

    folder: Path
    before: str = ""
    after: str | None = None

    def __str__(self) -> str:
        return str(self.folder if self.after is None else self.folder / f"{self.before}*{self.after}")


_Places = dict[FileKind, _Place]


def find_files(described: Description) -> FoundFiles:
    """Match the files of `images/{split}` + `masks/{split}`, `{split}/images` + `{split}/masks`, or `images` + `masks`.

    The same for instances, depth and normals. A folder is named in the descriptor (also as a pattern with one *,
    `data/*.color.jpg`), or has one of the usual names; where some truths are named, no others are looked for. Splits
    are train, val (also valid, validation) and test, each with or without a year (val2017); subfolders below are
    followed. A truth has the image's stem, or that followed by one of the endings of its kind. Images that lack a
    truth which others have are left out. Raises InputError where no image has one.
    """
    places, notes = _places_by_split(described)
    splits: dict[str, tuple[Files, ...]] = {}
    left_out: list[LeftOut] = []
    for split, of_kind in places.items():
        found, without_partner = _match(of_kind)
        left_out += without_partner
        if found:
            splits[split] = found
    if not splits:
        raise InputError(_nothing_matches(described.root, places, left_out))
    for missing in dict.fromkeys(lone.missing for lone in left_out):
        lone = [each.path for each in left_out if each.missing == missing]
        what = "truths without an image" if missing == IMAGES.word else f"images without a {missing}"
        notes.append(f"{what} are left out: {len(lone)}, such as {lone[0]}")
    kinds = frozenset(kind for of_kind in places.values() for kind in of_kind if kind is not IMAGES)
    return FoundFiles(splits, kinds, tuple(left_out), tuple(notes))


def _places_by_split(described: Description) -> tuple[dict[str, _Places], list[str]]:
    """Where each kind of file of each split lies."""
    root = described.root
    outer = {split: folder for split, folder in splits_in(root).items() if _pick(folder, IMAGES, described)}
    if outer:
        return {split: _places(folder, described) for split, folder in outer.items()}, []
    places = _places(root, described)
    image_place = places[IMAGES]
    inner = splits_in(image_place.folder) if image_place.after is None else {}
    if not inner:
        return {"train": places}, []
    by_split: dict[str, _Places] = {}
    for split, folder in inner.items():
        by_split[split] = {kind: _below(place, split) for kind, place in places.items()} | {IMAGES: _Place(folder)}
    stray = sum(path.suffix.lower() in IMAGE_SUFFIXES for path in image_place.folder.iterdir())
    folder = image_place.folder
    return by_split, [f"images outside the split folders of {folder} are left out: {stray}"] if stray else []


def splits_in(folder: Path) -> dict[str, Path]:
    """The folders in a folder that are named like splits, in the order train, val, test."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        split = split_named(path.name)
        if split is None or not path.is_dir():
            continue
        if split in found:
            raise InputError(
                f"{folder}: wanted one {split} folder, got {found[split].name} and {path.name}; merge them"
            )
        found[split] = path
    return {split: found[split] for split in SPLITS if split in found}


def _below(place: _Place, split: str) -> _Place:
    if place.after is not None:
        return place
    return _Place(splits_in(place.folder).get(split, place.folder / split))


def _places(base: Path, described: Description) -> _Places:
    found = {kind: place for kind in (IMAGES, *TRUTHS) if (place := _pick(base, kind, described))}
    missing = IMAGES if IMAGES not in found else next((kind for kind in _named(described) if kind not in found), None)
    if missing is None and len(found) == 1:
        missing = MASKS
    if missing is None:
        return found
    name = described.folder(missing.key) or missing.folders[0]
    holds = ", ".join(sorted(path.name for path in base.iterdir())[:8]) or "nothing"
    raise InputError(
        f"{base}: wanted a folder of {missing.key} ({name}/, or {name}/train and so on, or train/{name}), got {holds}; "
        f"move the files there, or name the folder in {described.source} ({missing.key}: FOLDER)"
    )


def _named(described: Description) -> list[FileKind]:
    """The kinds of truth whose folders the descriptor names."""
    return [kind for kind in TRUTHS if described.folder(kind.key) not in (None, FROM_DEPTH)]


def _pick(base: Path, kind: FileKind, described: Description) -> _Place | None:
    given = described.folder(kind.key)
    if given is not None and "*" in given:
        folder, _, pattern = given.rpartition("/")
        before, _, after = pattern.partition("*")
        return _Place(base / folder, before, after) if (base / folder).is_dir() else None
    if given is None and kind is not IMAGES and _named(described):
        return None
    names = (given,) if given is not None else kind.folders
    found = [base / name for name in names if (base / name).is_dir()]
    if len(found) > 1:
        raise InputError(
            f"{base}: wanted one {kind.word} folder, got {' and '.join(path.name for path in found)}; "
            f"say which in {described.source} ({kind.key}: {found[0].name})"
        )
    return _Place(found[0]) if found else None


def _match(places: _Places) -> tuple[tuple[Files, ...], list[LeftOut]]:
    """Images with all their truths, and the files without a partner."""
    images = _by_name(places[IMAGES], IMAGES)
    truths: dict[FileKind, dict[str, Path]] = {}
    left_out: list[LeftOut] = []
    for kind, place in places.items():
        if kind is IMAGES:
            continue
        files = _by_name(place, kind)
        truths[kind] = {name: path for name in images if (path := _partner(name, files, kind))}
        left_out += [LeftOut(image, kind.word) for name, image in images.items() if name not in truths[kind]]
        used = set(truths[kind].values())
        left_out += [LeftOut(path, IMAGES.word) for path in files.values() if path not in used]
    whole = [name for name in images if all(name in of_kind for of_kind in truths.values())]
    return (
        tuple(Files(name, images[name], {kind: of_kind[name] for kind, of_kind in truths.items()}) for name in whole),
        left_out,
    )


def _partner(name: str, files: Mapping[str, Path], kind: FileKind) -> Path | None:
    return next((files[name + ending] for ending in kind.endings if name + ending in files), None)


def _by_name(place: _Place, kind: FileKind) -> dict[str, Path]:
    if place.after is None:
        return files_below(place.folder, kind.suffixes)
    cut = slice(len(place.before), -len(place.after) or None)
    return {path.name[cut]: path for path in sorted(place.folder.glob(f"{place.before}*{place.after}"))}


def files_below(folder: Path, suffixes: frozenset[str]) -> dict[str, Path]:
    """Files below a folder by their relative path without suffix, in order of it; hidden ones are left out."""
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.suffix.lower() not in suffixes or any(part.startswith(".") for part in relative.parts):
            continue
        name = relative.with_suffix("").as_posix()
        if name in found:
            raise InputError(f"{folder}: wanted one file per name, got {found[name].name} and {path.name}; remove one")
        found[name] = path
    return found


def _nothing_matches(root: Path, places: Mapping[str, _Places], left_out: list[LeftOut]) -> str:
    where = ", ".join(" + ".join(str(place) for place in of_kind.values()) for of_kind in places.values())
    kinds = [kind for kind in next(iter(places.values())) if kind is not IMAGES]
    images = [lone for lone in left_out if lone.missing != IMAGES.word]
    if not images:
        return f"{root}: wanted images, got an empty dataset: no image in {where}; put images and {kinds[0].key} there"
    suffixes = " ".join(sorted(kinds[0].suffixes))
    truths = [lone.path for lone in left_out if lone.missing == IMAGES.word]
    first_truth = f", the first {kinds[0].word} {truths[0].name}: give both one stem" if truths else ""
    return (
        f"{root}: wanted a {kinds[0].word} ({suffixes}) for every image, got none for any of "
        f"{len({lone.path for lone in images})} in {where}; the first image is {images[0].path.name}{first_truth}"
    )
