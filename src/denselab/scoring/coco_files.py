"""COCO's JSON for panoptic segments, instances and results, checked where it is used."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from denselab.errors import InputError

Key = int | str
T = TypeVar("T")


@dataclass(frozen=True)
class Categories:
    """Classes in the order of the truth's `categories`; ids[c] is the category id of class c."""

    ids: tuple[int, ...]
    names: tuple[str, ...]
    things: tuple[int, ...]

    def classes(self) -> dict[int, int]:
        """Class id by category id."""
        return {category_id: class_id for class_id, category_id in enumerate(self.ids)}


@dataclass(frozen=True)
class PanopticSegment:
    """One entry of `segments_info`."""

    id: int
    category_id: int
    is_crowd: bool


@dataclass(frozen=True)
class PanopticImage:
    """One entry of `annotations` in a panoptic file, with the path of its PNG."""

    image_id: Key
    png: Path
    segments: tuple[PanopticSegment, ...]


def read_json(option: str, path: Path) -> Any:
    """What a JSON file holds. Raises InputError naming the option and the file."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        got, cause = "which does not exist; check the path", error
    except OSError as error:
        got, cause = f"which cannot be read ({error.strerror}); check its kind and rights", error
    except ValueError as error:
        got, cause = f"which is not one ({error}); write it again", error
    raise InputError(f"{option}: wanted a JSON file, got {path}, {got}") from cause


def table(option: str, path: Path, data: Any, key: str) -> list[Any]:
    """The list `key` of a COCO file. Raises InputError if it is no such file."""
    given: Any = cast("dict[str, Any]", data).get(key) if isinstance(data, dict) else None
    if not isinstance(given, list):
        found = ", ".join(map(str, cast("dict[str, Any]", data))) if isinstance(data, dict) else type(data).__name__
        raise InputError(f"{option}: {path}: wanted a COCO file with a list '{key}', got {found or 'an empty object'}")
    return cast("list[Any]", given)


def parsed(option: str, path: Path, what: str, entries: Iterable[Any], parse: Callable[[Any], T]) -> list[T]:
    """Every entry parsed. Raises InputError naming the file and the entry that lacks something."""
    done: list[T] = []
    for index, entry in enumerate(entries):
        try:
            done.append(parse(entry))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
            known = cast("dict[str, Any]", entry) if isinstance(entry, dict) else {}
            shown = next((f"{key} {known[key]}" for key in ("id", "image_id") if key in known), f"number {index}")
            lack = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise InputError(f"{option}: {path}: {what} {shown}: wanted COCO's fields, got {lack}; mend it") from error
    return done


def read_categories(option: str, path: Path, data: Any) -> Categories:
    """The classes of a file with `categories`. Raises InputError for none, for repeated ids, and for other files."""

    def parse(entry: Mapping[str, Any]) -> tuple[int, str, bool]:
        return int(entry["id"]), str(entry["name"]), bool(entry.get("isthing", 1))

    entries = parsed(option, path, "category", table(option, path, data, "categories"), parse)
    refuse_repeated(option, path, "category", [category_id for category_id, _, _ in entries])
    if not entries:
        raise InputError(f"{option}: {path}: wanted at least one category, got none; list the classes in 'categories'")
    ids, names, is_thing = zip(*entries, strict=True)
    return Categories(ids, names, tuple(index for index, thing in enumerate(is_thing) if thing))


def check_same_categories(path: Path, data: Any, truth_path: Path, truth: Categories) -> None:
    """Raise InputError if a prediction names categories other than those of the truth; it need not name any."""
    if not isinstance(data, dict) or "categories" not in data:
        return
    given = read_categories("--pred", path, data)
    theirs, ours = (dict(zip(each.ids, each.names, strict=True)) for each in (given, truth))
    other = sorted(category_id for category_id in theirs if theirs[category_id] != ours.get(category_id))
    if other:
        shown = ", ".join(f"{category_id} {theirs[category_id]}" for category_id in other[:8])
        more = ", ..." if len(other) > 8 else ""
        raise InputError(
            f"--pred: {path}: wanted the categories of {truth_path}, got others: {shown}{more}; "
            "score it against the truth it was made for, or renumber its categories"
        )


def read_panoptic(option: str, path: Path, data: Any, masks: Path) -> dict[Key, PanopticImage]:
    """The images of a panoptic file, by id. Raises InputError for other files and for repeated images or segments."""
    if not masks.is_dir():
        raise InputError(f"{option}-masks: wanted the folder of the PNGs of {path}, got {masks}, which is no folder")

    def segment(entry: Mapping[str, Any]) -> PanopticSegment:
        return PanopticSegment(int(entry["id"]), int(entry["category_id"]), bool(entry.get("iscrowd", 0)))

    def image(entry: Mapping[str, Any]) -> PanopticImage:
        segments = tuple(map(segment, entry["segments_info"]))
        ids = [each.id for each in segments]
        if len(set(ids)) != len(ids) or any(number < 1 for number in ids):
            raise ValueError(f"segment ids that repeat or are below 1: {sorted(ids)[:8]}")
        return PanopticImage(entry["image_id"], masks / str(entry["file_name"]), segments)

    images = parsed(option, path, "annotation of", table(option, path, data, "annotations"), image)
    refuse_repeated(option, path, "image", [each.image_id for each in images])
    return {each.image_id: each for each in images}


def refuse_repeated(option: str, path: Path, what: str, ids: Sequence[Key]) -> None:
    """Raise InputError naming ids that occur twice."""
    seen: set[Key] = set()
    repeated: list[Key] = []
    for each in ids:
        if each in seen:
            repeated.append(each)
        seen.add(each)
    if repeated:
        shown = ", ".join(map(str, repeated[:8]))
        raise InputError(f"{option}: {path}: wanted every {what} once, got {shown} more than once; remove the others")
