"""Finding images, and writing files so that no half-written one is ever seen."""

import glob
import itertools
import json
import os
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from denselab.errors import InputError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".gif"})

_numbers = itertools.count()


@dataclass(frozen=True)
class FoundImage:
    """An image file, and where it lies below the folder or pattern that named it (its name if named itself)."""

    path: Path
    relative: Path


@contextmanager
def atomic_path(path: Path) -> Generator[Path]:
    """Yield a path to write to; it becomes `path` when the block ends well and is removed when it does not.

    It lies in the same folder under a hidden name (`.NAME.PID-N.part.SUFFIX`), so a killed run leaves `path` as it was.
    """
    # The name is cut so that the longest legal one still fits; the number keeps threads apart.
    partial = path.with_name(f".{path.stem[:48]}.{os.getpid()}-{next(_numbers)}.part{path.suffix}")
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write readable JSON, atomically."""
    with atomic_path(path) as partial:
        partial.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", "utf-8")


def find_images(inputs: Sequence[str | Path]) -> list[FoundImage]:
    """Image files named by files, folders (with everything below) and glob patterns, in order, each once.

    A file named by itself is taken whatever its suffix; folders and patterns give files with IMAGE_SUFFIXES that
    are not hidden. Raises InputError for a missing file, and for a folder or pattern without images.
    """
    found: dict[Path, FoundImage] = {}
    for item in inputs:
        for image in _expand(Path(item)):
            found.setdefault(image.path.resolve(), image)
    return list(found.values())


def _expand(item: Path) -> list[FoundImage]:
    if item.is_file():
        return [FoundImage(item, Path(item.name))]
    if item.is_dir():
        base, paths = item, sorted(item.rglob("*"))
    elif glob.has_magic(str(item)):
        base = _folder_before_magic(item)
        paths = sorted(base.glob(str(item.relative_to(base))))
    else:
        raise InputError(f"{item}: wanted an image, a folder or a pattern, got a path that does not exist; check it")
    images = [FoundImage(path, path.relative_to(base)) for path in paths if _is_image(path, base)]
    if not images:
        kinds = " ".join(sorted(IMAGE_SUFFIXES))
        raise InputError(f"{item}: wanted at least one image there ({kinds}), got none; name the files themselves")
    return images


def _is_image(path: Path, base: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(base).parts)
    return path.suffix.lower() in IMAGE_SUFFIXES and not hidden and path.is_file()


def _folder_before_magic(pattern: Path) -> Path:
    """The deepest folder of a pattern that holds no wildcard: `a/b*/c.png` gives `a`."""
    folder = pattern.parent
    while glob.has_magic(str(folder)):
        folder = folder.parent
    return folder
