"""Photos of a folder or an archive: those that a compression looks at, and those that a classifier is scored on."""

import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from denselab.errors import InputError
from denselab.files import IMAGE_SUFFIXES, find_images
from denselab.runtime.images import from_picture, open_image

TEST_SPLITS = ("test", "val", "validation")
"""Names of folders that hold what a score is measured on, in order of preference."""

_IMAGENET_CLASSES = 1000
_WORDNET_ID = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class PhotoFile:
    """A photo below `source`: a folder, an archive, or a folder inside of an archive. name: its path below it."""

    source: Path
    name: str

    def read(self) -> NDArray[np.uint8]:
        """RGB pixels [H, W, 3]. Raises InputError, naming the file."""
        place = _in_archive(self.source)
        if place is None:
            return open_image(self.source / self.name if self.source.is_dir() else self.source)
        try:
            archive = _archive(place.archive, place.archive.stat().st_mtime_ns)
            return from_picture(Image.open(BytesIO(archive.read(place.inside + self.name))))
        except (InputError, OSError, KeyError, UnidentifiedImageError, zipfile.BadZipFile) as error:
            raise InputError(f"{self}: wanted a photo, but it cannot be read; copy it again") from error

    def __str__(self) -> str:
        return str(self.source / self.name)


@dataclass(frozen=True)
class Labelled:
    """Photos of a classifier's data, each with the place of its class among the names."""

    source: Path
    split: str
    names: tuple[str, ...]
    photos: tuple[tuple[PhotoFile, int], ...]


def list_photos(source: Path) -> list[PhotoFile]:
    """All photos below a folder, in a .zip, or below a folder inside of one (FILE.zip/FOLDER), in order of name.

    Raises InputError where there are none.
    """
    place = _in_archive(source)
    if place is None:
        if not source.exists():
            raise InputError(
                f"{source}: wanted a folder of photos, FILE.zip or FILE.zip/FOLDER, got a path that does not exist; "
                "check it"
            )
        return [PhotoFile(source, found.relative.as_posix()) for found in find_images([source])]
    try:
        with zipfile.ZipFile(place.archive) as archive:
            names = sorted(name for name in archive.namelist() if _is_photo(name))
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{place.archive}: wanted a folder or a .zip of photos, but it cannot be read ({error}); make it again"
        ) from error
    if not names:
        raise InputError(f"{place.archive}: wanted at least one photo in the archive, got none; give another")
    found = [name.removeprefix(place.inside) for name in names if name.startswith(place.inside)]
    if not found:
        folders = sorted({str(each) for name in names for each in PurePosixPath(name).parents} - {"."}, key=_depth)
        held = f"photos in {_listed(folders)}" if folders else "photos in no folder"
        raise InputError(
            f"{source}: wanted a folder of photos inside of {place.archive}, which has {held}; name one of them, or "
            "the archive alone for all"
        )
    return [PhotoFile(source, name) for name in found]


def read_some(
    source: Path, count: int, say: Callable[[str], None], track: Callable[[Iterable[PhotoFile]], Iterable[PhotoFile]]
) -> list[NDArray[np.uint8]]:
    """`count` photos, evenly spread over all; one that cannot be read is reported, and another taken in its place.

    Raises InputError where none can be read.
    """
    found = list_photos(source)
    taken = min(count, len(found))
    if taken < count:
        say(f"{source}: {taken} photos, fewer than the {count} asked for (--images)")
    spread = [index * len(found) // taken for index in range(taken)]
    rest = iter(sorted(set(range(len(found))) - set(spread)))
    photos: list[NDArray[np.uint8]] = []
    for photo in track([found[index] for index in spread]):
        replacement: PhotoFile | None = photo
        while replacement is not None:
            try:
                photos.append(replacement.read())
                break
            except InputError as error:
                say(f"skipped: {error}")
                another = next(rest, None)
                replacement = None if another is None else found[another]
    if not photos:
        raise InputError(f"{source}: wanted photos, but none of {len(found)} can be read; give another folder")
    return photos


def labelled(source: Path, names: Sequence[str] | None, classes: int) -> Labelled:
    """Photos in one folder per class, below `test`, `val` or nothing, of a folder or a .zip.

    names: of the model's classes, None where it has none: the folders then name them, in order. So do the 1000 folders
    of ImageNet, whose WordNet ids are in the order of its classes. classes: how many.
    Raises InputError where the folders are those of other classes.
    """
    by_class: dict[str, dict[str, list[PhotoFile]]] = {}
    for photo in list_photos(source):
        *above, folder, _ = ("", "", *PurePosixPath(photo.name).parts)
        by_class.setdefault(above[-1] if above else "", {}).setdefault(folder, []).append(photo)
    split = next((name for name in TEST_SPLITS if name in by_class), "" if "" in by_class else None)
    if split is None:
        split = max(by_class, key=lambda name: len(by_class[name]))
    found = tuple(sorted(by_class[split]))
    if len(found) == classes == _IMAGENET_CLASSES and all(map(_WORDNET_ID.fullmatch, found)):
        names = found
    wanted = tuple(names) if names and set(names) == set(found) else found
    if len(found) != classes or (names and set(names) != set(found)):
        theirs = f"{classes} classes ({_listed(names)})" if names else f"{classes} classes"
        got = f"{len(found)} ({_listed(found)})" if all(found) else "photos in no folder of a class"
        raise InputError(
            f"{source}: wanted one folder of photos for each of the model's {theirs}, got {got}; give the data of the "
            "classes it was trained for"
        )
    photos = tuple((photo, wanted.index(name)) for name in found for photo in by_class[split][name])
    return Labelled(source, split or "all", wanted, photos)


def batched(items: Sequence[tuple[PhotoFile, int]], size: int) -> Iterator[Sequence[tuple[PhotoFile, int]]]:
    """So many at a time."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


@dataclass(frozen=True)
class _Place:
    """inside: what names in the archive begin with, "" for all."""

    archive: Path
    inside: str


def _in_archive(source: Path) -> _Place | None:
    """Where a path leads that goes through an archive."""
    for path in (source, *source.parents):
        if path.suffix.lower() == ".zip" and path.is_file():
            inside = source.relative_to(path).as_posix()
            return _Place(path, "" if inside == "." else f"{inside}/")
    return None


@lru_cache(maxsize=4)
def _archive(source: Path, changed_ns: int) -> zipfile.ZipFile:
    """An archive that stays open: its list of names is long to read."""
    return zipfile.ZipFile(source)


def _is_photo(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower() in IMAGE_SUFFIXES and not any(part.startswith((".", "__")) for part in path.parts)


def _depth(folder: str) -> tuple[int, str]:
    return folder.count("/"), folder


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more
