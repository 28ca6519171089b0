"""What is in a data set, and what is wrong with it, file by file."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from denselab.classes import Classes
from denselab.data.dataset import Dataset, Item
from denselab.data.descriptor import open_dataset
from denselab.data.segment_maps import painted
from denselab.data.shapes import Shapes
from denselab.data.truth import SizeMismatchError, Truth, UnknownLabelError
from denselab.data.yolo_seg import YoloFile
from denselab.errors import InputError
from denselab.segments import Segments

Track = Callable[[Iterable[tuple[str, Item]], int, str], Iterable[tuple[str, Item]]]
"""Items, how many, and a label; gives the items back and shows how far they are."""

_BAND_ROWS = 64
_CENTIMETRES = 1 << 16


class ProblemKind(Enum):
    """What can be wrong with a data set."""

    UNREADABLE = "unreadable files"
    SIZE_MISMATCH = "truths of another size than their image"
    UNKNOWN_LABEL = "labels or ids that nothing explains"
    NO_TRUTH = "images without a truth"
    NO_IMAGE = "truths without an image"
    LEAK = "the same image in two splits"
    NOT_IN_TRAIN = "classes in another split but not in train"
    OUTSIDE = "objects without a pixel inside their image"
    TWICE = "the same object twice"


@dataclass(frozen=True)
class Problem:
    """One thing to mend, in words that name the file."""

    kind: ProblemKind
    text: str


@dataclass(frozen=True)
class ObjectReport:
    """Objects (segments of things) of one split.

    of_class: per class. per_image: the fewest, the median and the most. empty: images without any; crowds: objects
    that are not told apart, counted in nothing else.
    """

    of_class: tuple[int, ...]
    per_image: tuple[int, int, int]
    empty: int
    crowds: int


@dataclass(frozen=True)
class DepthReport:
    """Known depths of one split, in metres; known_share: of all pixels. The median is exact to 1 cm."""

    nearest_m: float
    median_m: float
    farthest_m: float
    known_share: float


@dataclass(frozen=True)
class SplitReport:
    """What the readable images of one split hold; None for what the data hold no truth of.

    sizes_hw: images per (height, width) in px. class_pixels, class_images: per class, the pixels it has and the
    images it occurs in; of overlapping objects the last is counted. known_normals: share of pixels.
    """

    images: int
    sizes_hw: Mapping[tuple[int, int], int]
    class_pixels: tuple[int, ...] = ()
    class_images: tuple[int, ...] = ()
    void_pixels: int = 0
    objects: ObjectReport | None = None
    depth: DepthReport | None = None
    known_normals: float | None = None

    @property
    def pixels(self) -> int:
        """All labelled pixels, void included."""
        return sum(self.class_pixels) + self.void_pixels

    def size_range_hw(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]] | None:
        """The smallest, the median and the largest image by area; None where no image could be read."""
        sizes = sorted(Counter(self.sizes_hw).elements(), key=lambda hw: (hw[0] * hw[1], hw))
        return (sizes[0], sizes[len(sizes) // 2], sizes[-1]) if sizes else None

    def to_dict(self, classes: Classes | None) -> dict[str, Any]:
        """Ready for JSON; sizes as [width, height, images]."""
        data: dict[str, Any] = {
            "images": self.images,
            "sizes": [[width, height, count] for (height, width), count in sorted(self.sizes_hw.items())],
        }
        if classes:
            names = enumerate(zip(classes.names, self.class_pixels, self.class_images, strict=True))
            data["classes"] = [
                {"id": i, "name": name, "pixels": pixels, "share": pixels / max(self.pixels, 1), "images": images}
                for i, (name, pixels, images) in names
            ]
            data["void"] = {"pixels": self.void_pixels, "share": self.void_pixels / max(self.pixels, 1)}
        if self.objects:
            per_image = dict(zip(("fewest", "median", "most"), self.objects.per_image, strict=True))
            empty, crowds = self.objects.empty, self.objects.crowds
            data["objects"] = {"per_image": per_image, "images_without": empty, "crowds": crowds}
            for entry, count in zip(data["classes"], self.objects.of_class, strict=True):
                entry["objects"] = count
        if self.depth:
            data["depth"] = self.depth.__dict__
        if self.known_normals is not None:
            data["normals"] = {"known_share": self.known_normals}
        return data


@dataclass(frozen=True)
class Report:
    """The outcome of `check`: `problems` need mending, `notes` are good to know."""

    root: Path
    classes: Classes | None
    tasks: frozenset[str]
    splits: Mapping[str, SplitReport]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "data": str(self.root),
            "ok": not self.problems,
            "tasks": sorted(self.tasks),
            "splits": {name: split.to_dict(self.classes) for name, split in self.splits.items()},
            "problems": [{"kind": problem.kind.name.lower(), "text": problem.text} for problem in self.problems],
            "notes": list(self.notes),
        }


def check(root: str | Path, track: Track = lambda items, _total, _label: items) -> Report:
    """Read every file of a data set once, in order, and report what it holds and what is wrong.

    The same image in two splits is found by a hash of its decoded pixels. A class that is missing in train but
    present elsewhere is a problem; one that another split lacks is a note. Raises InputError only where the data set
    as a whole cannot be used (`open_dataset`).
    """
    dataset = open_dataset(root)
    problems = [
        Problem(
            ProblemKind.NO_IMAGE if lone.missing == "image" else ProblemKind.NO_TRUTH, f"{lone.path}: no {lone.missing}"
        )
        for lone in dataset.left_out
    ]
    tallies = {split: _Tally(dataset) for split in dataset.splits}
    places: defaultdict[bytes, list[tuple[str, Path]]] = defaultdict(list)
    todo = [(split, item) for split, items in dataset.splits.items() for item in items]
    for split, item in track(todo, len(todo), "check"):
        try:
            image, truth = dataset.read(item, dataset.tasks)
        except InputError as error:
            problems.append(Problem(_kind(error), str(error)))
            continue
        tallies[split].add(item, image, truth)
        problems += _object_problems(item, truth)
        places[_content_hash(image)].append((split, item.image))
    problems += _leaks(places.values())
    splits = {split: tally.report(len(dataset.splits[split])) for split, tally in tallies.items()}
    absent, notes = _absent_classes(dataset, splits)
    remarks = [remark for split, tally in tallies.items() for remark in tally.remarks(split)]
    copies = _copies(places.values())
    return Report(
        dataset.root,
        dataset.classes,
        dataset.tasks,
        splits,
        (*problems, *absent),
        (*dataset.notes, *notes, *remarks, *copies),
    )


def pixel_counts(class_ids: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Pixels per id, int64 [256]; in bands, because bincount widens what it counts to 8 bytes a pixel."""
    counts = np.zeros(256, np.int64)
    for top in range(0, len(class_ids), _BAND_ROWS):
        counts += np.bincount(class_ids[top : top + _BAND_ROWS].ravel(), minlength=256)
    return counts


def class_ids_of(truth: Truth) -> NDArray[np.uint8] | None:
    """Class ids uint8 [H, W], 255 void, of whatever labels there are."""
    if truth.class_ids is not None or truth.segments is None:
        return truth.class_ids
    return painted(truth.segments)


@dataclass
class _Tally:
    """Counts over the images of one split."""

    dataset: Dataset
    sizes_hw: Counter[tuple[int, int]] = field(default_factory=Counter[tuple[int, int]])
    pixels: NDArray[np.int64] = field(default_factory=lambda: np.zeros(256, np.int64))
    images: NDArray[np.int64] = field(default_factory=lambda: np.zeros(256, np.int64))
    objects: NDArray[np.int64] = field(default_factory=lambda: np.zeros(256, np.int64))
    per_image: list[int] = field(default_factory=list[int])
    empty: list[str] = field(default_factory=list[str])
    only_crowds: list[str] = field(default_factory=list[str])
    crowds: int = 0
    centimetres: NDArray[np.int64] = field(default_factory=lambda: np.zeros(_CENTIMETRES, np.int64))
    range_m: tuple[float, float] = (np.inf, 0.0)
    all_pixels: int = 0
    known_normals: int = 0

    def add(self, item: Item, image: NDArray[np.uint8], truth: Truth) -> None:
        self.sizes_hw[image.shape[0], image.shape[1]] += 1
        self.all_pixels += image.shape[0] * image.shape[1]
        class_ids = class_ids_of(truth)
        if class_ids is not None:
            counts = pixel_counts(class_ids)
            self.pixels += counts
            self.images += counts > 0
        if truth.segments is not None:
            self._add_objects(item, truth.segments)
        if truth.depth_m is not None:
            known = truth.depth_m[truth.depth_m > 0]
            rounded = np.rint(known * 100).astype(np.int64).clip(0, _CENTIMETRES - 1)
            self.centimetres += np.bincount(rounded, minlength=_CENTIMETRES)
            self.range_m = (min(self.range_m[0], float(known.min())), max(self.range_m[1], float(known.max())))
        if truth.normals is not None:
            self.known_normals += int(truth.normals.any(axis=-1).sum())

    def _add_objects(self, item: Item, segments: Segments) -> None:
        things = self.dataset.classes.things if self.dataset.classes else ()
        of_things = [segment for segment in segments.segments if segment.class_id in things]
        told_apart = [segment for segment in of_things if not segment.is_crowd]
        for segment in told_apart:
            self.objects[segment.class_id] += 1
        self.per_image.append(len(told_apart))
        self.crowds += len(of_things) - len(told_apart)
        if not told_apart:
            (self.only_crowds if of_things else self.empty).append(item.name)

    def report(self, images: int) -> SplitReport:
        classes, tasks = self.dataset.classes, self.dataset.tasks
        of_classes = slice(0, len(classes) if classes else 0)
        counts = sorted(self.per_image) or [0]
        without = len(self.empty) + len(self.only_crowds)
        has_objects = classes is not None and classes.things and "instance" in tasks
        return SplitReport(
            images,
            dict(self.sizes_hw),
            tuple(self.pixels[of_classes].tolist()),
            tuple(self.images[of_classes].tolist()),
            int(self.pixels[of_classes.stop :].sum()),
            ObjectReport(
                tuple(self.objects[of_classes].tolist()),
                (counts[0], counts[len(counts) // 2], counts[-1]),
                without,
                self.crowds,
            )
            if has_objects
            else None,
            self._depth() if "depth" in tasks and self.centimetres.any() else None,
            self.known_normals / max(self.all_pixels, 1) if "normals" in tasks else None,
        )

    def _depth(self) -> DepthReport:
        below = np.cumsum(self.centimetres)
        median_m = float(np.searchsorted(below, (below[-1] + 1) // 2)) / 100
        return DepthReport(self.range_m[0], median_m, self.range_m[1], int(below[-1]) / self.all_pixels)

    def remarks(self, split: str) -> Iterable[str]:
        for names, what in ((self.empty, "objects"), (self.only_crowds, "objects but crowds")):
            if names:
                yield f"{split}: images without {what}: {len(names)}, such as {names[0]}"


def _kind(error: InputError) -> ProblemKind:
    match error:
        case SizeMismatchError():
            return ProblemKind.SIZE_MISMATCH
        case UnknownLabelError():
            return ProblemKind.UNKNOWN_LABEL
        case _:
            return ProblemKind.UNREADABLE


def _object_problems(item: Item, truth: Truth) -> list[Problem]:
    """Objects of polygons and runs that lie outside the image, or are there twice."""
    if truth.segments is None:
        return []
    match item.labels:
        case Shapes() as labels:
            pass
        case YoloFile() as file:
            labels = file.shapes_at(truth.segments.hw)
        case _:
            return []
    source, shapes = labels.source, labels.shapes
    kept = {segment.id for segment in labels.segments(truth.segments.hw).segments}
    problems = [
        Problem(ProblemKind.OUTSIDE, f"{source}: {item.name}: annotation {shape.number} has no pixel in the image")
        for place, shape in enumerate(shapes, start=1)
        if place not in kept
    ]
    first: dict[tuple[int, bytes], int] = {}
    for segment in truth.segments.segments if len(truth.segments.layers) > 1 else ():
        if segment.id > len(shapes):
            continue
        number = shapes[segment.id - 1].number
        key = segment.class_id, hashlib.blake2b(np.packbits(truth.segments.mask(segment)).tobytes()).digest()
        if key in first:
            text = f"{source}: {item.name}: annotations {first[key]} and {number} cover the same pixels"
            problems.append(Problem(ProblemKind.TWICE, text))
        first.setdefault(key, number)
    return problems


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


def _copies(places: Iterable[list[tuple[str, Path]]]) -> list[str]:
    """A remark where images occur twice in one split."""
    same = [copies for copies in places if len(copies) > 1 and len({split for split, _ in copies}) == 1]
    if not same:
        return []
    (split, first), (_, second), *_ = same[0]
    return [f"the same image twice in a split: {len(same)} times, such as {first} and {second.name} in {split}"]


def _absent_classes(dataset: Dataset, splits: Mapping[str, SplitReport]) -> tuple[list[Problem], list[str]]:
    """Classes that train cannot teach though another split asks for them; and remarks on the other absences."""
    problems: list[Problem] = []
    absences: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
    for class_id, name in enumerate(dataset.classes.names if dataset.classes else ()):
        present = [split for split, report in splits.items() if report.class_images[class_id]]
        absent = [split for split in splits if split not in present]
        if "train" in absent and present:
            text = f"class {class_id} {name}: in {', '.join(present)} but not in train, so it cannot be learned"
            problems.append(Problem(ProblemKind.NOT_IN_TRAIN, text))
        elif absent:
            absences[tuple(absent)].append(name)
    return problems, [f"not in {', '.join(where)}: {', '.join(names)}" for where, names in absences.items()]
