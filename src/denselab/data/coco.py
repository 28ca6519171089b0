"""COCO's JSON files: where they lie, what their images are called, and which classes they name."""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from denselab.classes import Classes
from denselab.data.dataset import Item, Labels, LeftOut
from denselab.data.description import Description
from denselab.data.splits import split_named
from denselab.errors import InputError

ROBOFLOW = "_annotations.coco.json"
_SHOWN = 4


@dataclass(frozen=True)
class CocoFile:
    """One parsed JSON of a split. annotations: by image id; class_of: category id -> class id."""

    path: Path
    images: Sequence[Mapping[str, Any]]
    annotations: Mapping[int, Sequence[Mapping[str, Any]]]
    categories: Sequence[Mapping[str, Any]]
    class_of: Mapping[int, int]


def find_coco_files(described: Description, prefix: str) -> dict[str, Path]:
    """The JSON of each split: `annotations:` of the descriptor, or `PREFIX_train2017.json` and the like.

    Searched in the root, in annotations/ and in */annotations/; for instances also SPLIT/_annotations.coco.json.
    """
    given = described.values.get("annotations")
    if isinstance(given, str):
        return {"train": described.resolve("annotations", given)}
    if isinstance(given, dict):
        return {str(split): described.resolve("annotations", str(path)) for split, path in given.items()}
    if given is not None:
        raise described.refusal("annotations", "a JSON file, or a mapping of split to one", given)
    found: dict[str, Path] = {}
    for pattern in ("", "annotations/", "*/annotations/"):
        for path in sorted(described.root.glob(f"{pattern}{prefix}*.json")):
            split = split_named(path.stem.removeprefix(prefix).strip("_- ") or "train")
            if split and split in found:
                raise InputError(
                    f"{described.root}: wanted one file of {prefix} for {split}, got {found[split]} and {path}; say "
                    f"which in {described.source} (annotations: {{{split}: {path.relative_to(described.root)}}})"
                )
            if split:
                found[split] = path
    if not found and prefix == "instances":
        for path in sorted(described.root.glob(f"*/{ROBOFLOW}")):
            if split := split_named(path.parent.name):
                found[split] = path
    return found


def read_coco(path: Path) -> CocoFile:
    """Parse and check one file. Raises InputError where it is not COCO's, naming what is missing."""
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: wanted COCO annotations in JSON, got {error}; download or export it again"
        ) from error
    keys = ("images", "annotations", "categories")
    if not isinstance(data, dict) or not all(isinstance(data.get(key), list) for key in keys):
        got = ", ".join(map(str, list(data)[:8])) if isinstance(data, dict) else type(data).__name__
        raise InputError(f"{path}: wanted a COCO file with lists of {', '.join(keys)}, got {got}; export it as COCO")
    categories = sorted(_checked(path, data["categories"], "category", ("id", "name")), key=lambda each: each["id"])
    images = _checked(path, data["images"], "image", ("id", "file_name"))
    by_image: defaultdict[int, list[Mapping[str, Any]]] = defaultdict(list)
    known = {image["id"] for image in images}
    for annotation in _checked(path, data["annotations"], "annotation", ("image_id",)):
        if annotation["image_id"] not in known:
            raise InputError(
                f"{path}: wanted annotations of listed images, got image_id {annotation['image_id']}, which images "
                "lacks; add the image, or remove the annotation"
            )
        by_image[annotation["image_id"]].append(annotation)
    class_of = {int(category["id"]): place for place, category in enumerate(categories)}
    return CocoFile(path, images, by_image, categories, class_of)


def coco_classes(
    files: Sequence[CocoFile], described: Description, is_thing: Callable[[Mapping[str, Any]], bool]
) -> Classes:
    """The classes of all splits, in the order of their category ids; raises InputError where the splits differ."""
    first = files[0]
    named = [(category["id"], category["name"]) for category in first.categories]
    for other in files[1:]:
        theirs = [(category["id"], category["name"]) for category in other.categories]
        if theirs != named:
            differ = [pair for pair in (*named, *theirs) if (pair in named) != (pair in theirs)]
            raise InputError(
                f"{other.path}: wanted the categories of {first.path}, got others, such as "
                f"{', '.join(f'{number} {name}' for number, name in differ[:_SHOWN])}; export both with one list"
            )
    things = [place for place, category in enumerate(first.categories) if is_thing(category)]
    return described.with_things(Classes.named([str(category["name"]) for category in first.categories]), things)


def class_id_of(file: CocoFile, category_id: Any, owner: str) -> int:
    """The class id; raises InputError for a category that the file does not list. owner: for the message."""
    found = file.class_of.get(category_id)
    if found is None:
        known = ", ".join(map(str, list(file.class_of)[:8]))
        raise InputError(
            f"{file.path}: {owner}: wanted a category_id out of {known}{', ...' if len(file.class_of) > 8 else ''}, "
            f"got {category_id}; add it to categories"
        )
    return found


def coco_items(
    file: CocoFile, split: str, described: Description, labels: Callable[[Mapping[str, Any]], Labels | LeftOut]
) -> tuple[tuple[Item, ...], list[LeftOut]]:
    """An item per image of the file, in the order of their names; and those without a file or labels."""
    folder = _image_folder(file, split, described)
    items: list[Item] = []
    left_out: list[LeftOut] = []
    for image in sorted(file.images, key=lambda image: str(image["file_name"])):
        path = folder / image["file_name"]
        if not path.is_file():
            left_out.append(LeftOut(path, "image"))
            continue
        found = labels(image)
        if isinstance(found, LeftOut):
            left_out.append(found)
        else:
            items.append(Item(Path(image["file_name"]).with_suffix("").as_posix(), path, found))
    if not items:
        raise InputError(f"{file.path}: wanted an image with annotations, got none of {len(file.images)} in {folder}")
    return tuple(items), left_out


def notes_of(left_out: Sequence[LeftOut]) -> list[str]:
    """How many files are missing, for the user."""
    notes: list[str] = []
    for missing in dict.fromkeys(each.missing for each in left_out):
        lone = [each.path for each in left_out if each.missing == missing]
        what = "image files that are not there" if missing == "image" else f"images without a {missing}"
        notes.append(f"{what} are left out: {len(lone)}, such as {lone[0]}")
    return notes


def _image_folder(file: CocoFile, split: str, described: Description) -> Path:
    """The folder in which the first image of the file lies."""
    root = described.root
    named = described.folder("images")
    year_and_all = file.path.stem.split("_", 1)[-1]  # train2017
    bases = [root / named] if named else [root / "images", root, file.path.parent]
    candidates = [base / below for base in bases for below in (year_and_all, split, ".")]
    present = [image["file_name"] for image in file.images[:: max(1, len(file.images) // 16)]]
    for folder in candidates:
        if any((folder / name).is_file() for name in present):
            return folder
    looked = ", ".join(str(folder) for folder in dict.fromkeys(candidates) if folder.is_dir())
    raise InputError(
        f"{file.path}: wanted the images it lists, such as {present[0] if present else 'none at all'}, "
        f"got none of them in {looked or root}; say where they are in {described.source} (images: FOLDER)"
    )


def _checked(path: Path, entries: Sequence[Any], what: str, keys: Sequence[str]) -> Sequence[Mapping[str, Any]]:
    for entry in entries:
        if not isinstance(entry, dict) or not all(key in entry for key in keys):
            raise InputError(
                f"{path}: wanted every {what} with {' and '.join(keys)}, got {str(entry)[:200]}; export it as COCO"
            )
    return entries
