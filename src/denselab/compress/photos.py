"""Photos of a folder or an archive: those that a compression looks at, and those that a classifier is scored on."""

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


@dataclass(frozen=True)
class PhotoFile:
    """A photo in a folder, or in an archive. name: its path below either."""

    source: Path
    name: str

    def read(self) -> NDArray[np.uint8]:
        """RGB pixels [H, W, 3]. Raises InputError, naming the file."""
        if self.source.is_dir():
            return open_image(self.source / self.name)
        if self.source.suffix.lower() != ".zip":
            return open_image(self.source)
        try:
            archive = _archive(self.source, self.source.stat().st_mtime_ns)
            return from_picture(Image.open(BytesIO(archive.read(self.name))))
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
    """All photos below a folder or in a .zip, in order of name. Raises InputError where there are none."""
    if source.suffix.lower() != ".zip":
        return [PhotoFile(source, found.relative.as_posix()) for found in find_images([source])]
    try:
        with zipfile.ZipFile(source) as archive:
            names = sorted(name for name in archive.namelist() if _is_photo(name))
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{source}: wanted a folder or a .zip of photos, but it cannot be read ({error})") from error
    if not names:
        raise InputError(f"{source}: wanted at least one photo in the archive, got none; give another")
    return [PhotoFile(source, name) for name in names]


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

    names: of the model's classes, None where it has none: the folders then name them, in order. classes: how many.
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


@lru_cache(maxsize=4)
def _archive(source: Path, changed_ns: int) -> zipfile.ZipFile:
    """An archive that stays open: its list of names is long to read."""
    return zipfile.ZipFile(source)


def _is_photo(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower() in IMAGE_SUFFIXES and not any(part.startswith((".", "__")) for part in path.parts)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more
