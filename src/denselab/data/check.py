"""What is in a data set, and what is wrong with it, file by file."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from denselab.classes import Classes
from denselab.data.descriptor import Dataset, SizeMismatchError, UnknownLabelError, open_dataset, read_pair
from denselab.data.folder import Pair
from denselab.errors import InputError

Track = Callable[[Iterable[tuple[str, Pair]], int, str], Iterable[tuple[str, Pair]]]
"""Items, how many, and a label; gives the items back and shows how far they are."""

_BAND_ROWS = 64


class ProblemKind(Enum):
    """What can be wrong with a data set."""

    UNREADABLE = "unreadable files"
    SIZE_MISMATCH = "masks of another size than their image"
    UNKNOWN_LABEL = "masks with labels out of range"
    NO_MASK = "images without a mask"
    NO_IMAGE = "masks without an image"
    LEAK = "the same image in two splits"
    NOT_IN_TRAIN = "classes in another split but not in train"


@dataclass(frozen=True)
class Problem:
    """One thing to mend, in words that name the file."""

    kind: ProblemKind
    text: str


@dataclass(frozen=True)
class SplitReport:
    """What the readable pairs of one split hold.

    sizes_hw: images per (height, width) in px. class_pixels, class_images: per class, the pixels it has and the
    images it occurs in.
    """

    pairs: int
    sizes_hw: Mapping[tuple[int, int], int]
    class_pixels: tuple[int, ...]
    class_images: tuple[int, ...]
    void_pixels: int

    @property
    def pixels(self) -> int:
        """All pixels, void included."""
        return sum(self.class_pixels) + self.void_pixels

    def size_range_hw(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]] | None:
        """The smallest, the median and the largest image by area; None where no image could be read."""
        sizes = sorted(Counter(self.sizes_hw).elements(), key=lambda hw: (hw[0] * hw[1], hw))
        return (sizes[0], sizes[len(sizes) // 2], sizes[-1]) if sizes else None

    def to_dict(self, classes: Classes) -> dict[str, Any]:
        """Ready for JSON; sizes as [width, height, images]."""
        return {
            "pairs": self.pairs,
            "sizes": [[width, height, count] for (height, width), count in sorted(self.sizes_hw.items())],
            "classes": [
                {"id": i, "name": name, "pixels": pixels, "share": pixels / max(self.pixels, 1), "images": images}
                for i, (name, pixels, images) in enumerate(
                    zip(classes.names, self.class_pixels, self.class_images, strict=True)
                )
            ],
            "void": {"pixels": self.void_pixels, "share": self.void_pixels / max(self.pixels, 1)},
        }


@dataclass(frozen=True)
class Report:
    """The outcome of `check`: `problems` need mending, `notes` are good to know."""

    root: Path
    classes: Classes
    splits: Mapping[str, SplitReport]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "data": str(self.root),
            "ok": not self.problems,
            "splits": {name: split.to_dict(self.classes) for name, split in self.splits.items()},
            "problems": [{"kind": problem.kind.name.lower(), "text": problem.text} for problem in self.problems],
            "notes": list(self.notes),
        }


def check(root: str | Path, track: Track = lambda items, _total, _label: items) -> Report:
    """Read every file of a data folder once, in order, and report what it holds and what is wrong.

    The same image in two splits is found by a hash of its decoded pixels. A class that is missing in train but
    present elsewhere is a problem; one that another split lacks is a note. Raises InputError only where the folder
    as a whole cannot be used (`open_dataset`).
    """
    dataset = open_dataset(root)
    problems = [Problem(ProblemKind.NO_MASK, f"{path}: no mask") for path in dataset.images_without_mask]
    problems += [Problem(ProblemKind.NO_IMAGE, f"{path}: no image") for path in dataset.masks_without_image]
    tallies = {split: _Tally(len(dataset.classes)) for split in dataset.pairs}
    places: defaultdict[bytes, list[tuple[str, Path]]] = defaultdict(list)
    todo = [(split, pair) for split, pairs in dataset.pairs.items() for pair in pairs]
    for split, pair in track(todo, len(todo), "check"):
        try:
            image, class_ids = read_pair(pair, dataset)
        except InputError as error:
            problems.append(Problem(_kind(error), str(error)))
            continue
        tallies[split].add(class_ids)
        places[_content_hash(image)].append((split, pair.image))
    problems += _leaks(places.values())
    splits = {split: tally.report(len(dataset.pairs[split])) for split, tally in tallies.items()}
    absent, notes = _absent_classes(dataset, splits)
    return Report(dataset.root, dataset.classes, splits, (*problems, *absent), (*dataset.notes, *notes))


def pixel_counts(class_ids: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Pixels per id, int64 [256]; in bands, because bincount widens what it counts to 8 bytes a pixel."""
    counts = np.zeros(256, np.int64)
    for top in range(0, len(class_ids), _BAND_ROWS):
        counts += np.bincount(class_ids[top : top + _BAND_ROWS].ravel(), minlength=256)
    return counts


class _Tally:
    """Counts over the pairs of one split."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.pixels = np.zeros(256, np.int64)
        self.images = np.zeros(256, np.int64)
        self.sizes_hw: Counter[tuple[int, int]] = Counter()

    def add(self, class_ids: NDArray[np.uint8]) -> None:
        counts = pixel_counts(class_ids)
        self.pixels += counts
        self.images += counts > 0
        self.sizes_hw[class_ids.shape[0], class_ids.shape[1]] += 1

    def report(self, pairs: int) -> SplitReport:
        of_classes = slice(0, self.num_classes)
        return SplitReport(
            pairs,
            dict(self.sizes_hw),
            tuple(self.pixels[of_classes].tolist()),
            tuple(self.images[of_classes].tolist()),
            int(self.pixels[self.num_classes :].sum()),
        )


def _kind(error: InputError) -> ProblemKind:
    match error:
        case SizeMismatchError():
            return ProblemKind.SIZE_MISMATCH
        case UnknownLabelError():
            return ProblemKind.UNKNOWN_LABEL
        case _:
            return ProblemKind.UNREADABLE


def _content_hash(image: NDArray[np.uint8]) -> bytes:
    digest = hashlib.blake2b(repr(image.shape).encode(), digest_size=16)
    digest.update(image.data)
    return digest.digest()


def _leaks(places: Iterable[list[tuple[str, Path]]]) -> list[Problem]:
    """Images whose pixels occur in more than one split."""
    return [
        Problem(ProblemKind.LEAK, "the same image: " + ", ".join(f"{path} ({split})" for split, path in same))
        for same in places
        if len({split for split, _ in same}) > 1
    ]


def _absent_classes(dataset: Dataset, splits: Mapping[str, SplitReport]) -> tuple[list[Problem], list[str]]:
    """Classes that train cannot teach though another split asks for them; and remarks on the other absences."""
    problems: list[Problem] = []
    absences: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
    for class_id, name in enumerate(dataset.classes.names):
        present = [split for split, report in splits.items() if report.class_images[class_id]]
        absent = [split for split in splits if split not in present]
        if "train" in absent and present:
            text = f"class {class_id} {name}: in {', '.join(present)} but not in train, so it cannot be learned"
            problems.append(Problem(ProblemKind.NOT_IN_TRAIN, text))
        elif absent:
            absences[tuple(absent)].append(name)
    return problems, [f"not in {', '.join(where)}: {', '.join(names)}" for where, names in absences.items()]
