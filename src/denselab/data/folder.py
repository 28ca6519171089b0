"""Which mask belongs to which image, and in which split: folders and file names only, no pixel is read."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from denselab.errors import InputError
from denselab.files import IMAGE_SUFFIXES

SPLIT_OF_FOLDER = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
IMAGE_FOLDERS = ("images", "image", "imgs", "JPEGImages")
MASK_FOLDERS = ("masks", "mask", "labels", "label", "annotations", "gt", "SegmentationClass")
MASK_SUFFIXES = frozenset({".png", ".bmp", ".tif", ".tiff"})
"""Formats that keep ids exactly; a JPEG changes them."""

MASK_STEM_ENDINGS = ("", "_mask", "_L", "_label", "_labels", "_labelIds", "_gt", "_seg")
"""What may follow the image's stem in the name of its mask."""

VAL_SHARE = 0.1


@dataclass(frozen=True)
class Pair:
    """An image file and the mask file that labels it."""

    image: Path
    mask: Path


@dataclass(frozen=True)
class Layout:
    """Pairs per split in order of their names, the files without a partner, and remarks for the user."""

    pairs: Mapping[str, tuple[Pair, ...]]
    images_without_mask: tuple[Path, ...]
    masks_without_image: tuple[Path, ...]
    notes: tuple[str, ...]


def find_layout(root: Path, images: str | None = None, masks: str | None = None) -> Layout:
    """Pair the files of `images/{split}` + `masks/{split}`, `{split}/images` + `{split}/masks`, or `images` + `masks`.

    images, masks: the folders' names; without them IMAGE_FOLDERS and MASK_FOLDERS are tried. Splits are train, val
    (also valid, validation) and test, each with or without a year (val2017); subfolders below are followed. An
    image's mask has the image's stem, or that followed by one of MASK_STEM_ENDINGS. Without a val split (or without
    any split folder) 10 % of the train images become val, see `carve_validation`. Raises InputError where no pair is
    found.
    """
    if not root.is_dir():
        raise InputError(f"{root}: wanted a data folder, got {'a file' if root.exists() else 'no such folder'}")
    folders, notes = _split_folders(root, images, masks)
    pairs: dict[str, tuple[Pair, ...]] = {}
    lone_images: list[Path] = []
    lone_masks: list[Path] = []
    for split, (image_folder, mask_folder) in folders.items():
        found, without_mask, without_image = _pair_files(image_folder, mask_folder)
        lone_images += without_mask
        lone_masks += without_image
        if found:
            pairs[split] = found
    if not pairs:
        raise InputError(_no_pairs(root, folders, lone_images, lone_masks))
    if "train" in pairs and "val" not in pairs and len(pairs["train"]) > 1:
        pairs = carve_validation(pairs, folders["train"][0])
        notes.append(
            f"no val split: {len(pairs['val'])} of {len(pairs['train']) + len(pairs['val'])} train images, "
            "chosen by a hash of their names, are held out as val"
        )
    if lone_images:
        notes.append(f"images without a mask are left out: {len(lone_images)}, such as {lone_images[0]}")
    if lone_masks:
        notes.append(f"masks without an image are left out: {len(lone_masks)}, such as {lone_masks[0]}")
    return Layout(pairs, tuple(lone_images), tuple(lone_masks), tuple(notes))


def carve_validation(pairs: Mapping[str, tuple[Pair, ...]], image_folder: Path) -> dict[str, tuple[Pair, ...]]:
    """Move about 10 % of train into val: the images whose name hashes low, at least one, never all.

    The name is the path below `image_folder` without its suffix (in a flat folder: the stem), hashed with SHA-1, so
    every machine chooses the same ones and an added image moves no other (while at least one hashes below 10 %).
    Neighbouring frames of one video land on both sides: give such data split folders of its own.
    """

    def place(pair: Pair) -> float:
        name = pair.image.relative_to(image_folder).with_suffix("").as_posix()
        return int.from_bytes(hashlib.sha1(name.encode(), usedforsecurity=False).digest()[:8]) / 2**64

    train = sorted(pairs["train"], key=place)
    count = min(max(1, sum(place(pair) < VAL_SHARE for pair in train)), len(train) - 1)
    val = set(train[:count])
    kept = tuple(pair for pair in pairs["train"] if pair not in val)
    held_out = tuple(pair for pair in pairs["train"] if pair in val)
    return {"train": kept, "val": held_out, **{split: pairs[split] for split in pairs if split != "train"}}


def _split_folders(root: Path, images: str | None, masks: str | None) -> tuple[dict[str, tuple[Path, Path]], list[str]]:
    """The image folder and the mask folder of each split."""
    outer = {
        split: folder for split, folder in _splits_in(root).items() if _pick(folder, images, IMAGE_FOLDERS, "image")
    }
    if outer:
        return {split: _image_and_mask_folder(folder, images, masks) for split, folder in outer.items()}, []
    image_folder, mask_folder = _image_and_mask_folder(root, images, masks)
    inner = _splits_in(image_folder)
    if not inner:
        return {"train": (image_folder, mask_folder)}, []
    mask_splits = _splits_in(mask_folder)
    folders = {split: (folder, mask_splits.get(split, mask_folder / split)) for split, folder in inner.items()}
    stray = sum(path.suffix.lower() in IMAGE_SUFFIXES for path in image_folder.iterdir())
    return folders, [f"images outside the split folders of {image_folder} are left out: {stray}"] if stray else []


def _splits_in(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        split = SPLIT_OF_FOLDER.get(path.name.lower().rstrip("0123456789"))
        if split is None or not path.is_dir():
            continue
        if split in found:
            raise InputError(
                f"{folder}: wanted one {split} folder, got {found[split].name} and {path.name}; merge them"
            )
        found[split] = path
    return {split: found[split] for split in ("train", "val", "test") if split in found}


def _image_and_mask_folder(root: Path, images: str | None, masks: str | None) -> tuple[Path, Path]:
    image_folder = _pick(root, images, IMAGE_FOLDERS, "image")
    mask_folder = _pick(root, masks, MASK_FOLDERS, "mask")
    if image_folder and mask_folder:
        return image_folder, mask_folder
    kind, names = ("masks", masks or MASK_FOLDERS[0]) if image_folder else ("images", images or IMAGE_FOLDERS[0])
    holds = ", ".join(sorted(path.name for path in root.iterdir())[:8]) or "nothing"
    raise InputError(
        f"{root}: wanted a folder of {kind} ({names}/, or {names}/train and so on, or train/{names}), got {holds}; "
        f"move the files there, or name the folder in {root / 'dataset.yaml'} ({kind}: FOLDER)"
    )


def _pick(root: Path, given: str | None, usual: tuple[str, ...], kind: str) -> Path | None:
    found = [root / name for name in ((given,) if given else usual) if (root / name).is_dir()]
    if len(found) > 1:
        raise InputError(
            f"{root}: wanted one {kind} folder, got {' and '.join(path.name for path in found)}; "
            f"say which in {root / 'dataset.yaml'} ({kind}s: {found[0].name})"
        )
    return found[0] if found else None


def _pair_files(image_folder: Path, mask_folder: Path) -> tuple[tuple[Pair, ...], list[Path], list[Path]]:
    """Pairs, images without a mask, masks without an image."""
    images = _by_name(image_folder, IMAGE_SUFFIXES)
    masks = _by_name(mask_folder, MASK_SUFFIXES)
    mask_of = {name: mask for name in images if (mask := _mask_of(name, masks))}
    used = set(mask_of.values())
    return (
        tuple(Pair(images[name], mask) for name, mask in mask_of.items()),
        [image for name, image in images.items() if name not in mask_of],
        [mask for mask in masks.values() if mask not in used],
    )


def _mask_of(name: str, masks: Mapping[str, Path]) -> Path | None:
    return next((masks[name + ending] for ending in MASK_STEM_ENDINGS if name + ending in masks), None)


def _by_name(folder: Path, suffixes: frozenset[str]) -> dict[str, Path]:
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


def _no_pairs(
    root: Path, folders: Mapping[str, tuple[Path, Path]], lone_images: list[Path], lone_masks: list[Path]
) -> str:
    where = ", ".join(f"{images} + {masks}" for images, masks in folders.values())
    if not lone_images:
        return f"{root}: wanted images, got an empty dataset: no image in {where}; put images and masks there"
    kinds = " ".join(sorted(MASK_SUFFIXES))
    first_mask = f", the first mask {lone_masks[0].name}: give both one stem" if lone_masks else ""
    return (
        f"{root}: wanted a mask ({kinds}) for every image, got none for any of {len(lone_images)} in {where}; "
        f"the first image is {lone_images[0].name}{first_mask}"
    )
