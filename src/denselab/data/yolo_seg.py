"""YOLO segmentation: a text file per photo, a line per object: class, then x y x y ... as shares of width and height.

data.yaml names the classes and the folders of photos; labels lie in the same path with labels/ for images/. A photo
without a file has no objects. Source: docs.ultralytics.com/datasets/segment (format only).
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from denselab.data.dataset import Dataset, Item
from denselab.data.description import Description
from denselab.data.folder import IMAGES, files_below, splits_in
from denselab.data.shapes import Shape, Shapes
from denselab.data.splits import SPLITS
from denselab.data.truth import Truth, UnknownLabelError
from denselab.errors import InputError
from denselab.files import IMAGE_SUFFIXES

LABEL_FOLDER = "labels"


@dataclass(frozen=True)
class YoloRule:
    """Class id by the number in a file, and which classes are things; background: the class of what is in no object."""

    class_of: tuple[tuple[int, int], ...]
    things: tuple[int, ...]
    background: int | None
    source: Path


@dataclass(frozen=True)
class YoloFile:
    """The outlines of one photo; path: None for a photo without objects."""

    path: Path | None
    rule: YoloRule

    def read(self, image: Path, hw: tuple[int, int], tasks: Collection[str]) -> Truth:
        """See `Labels.read`."""
        return self.shapes_at(hw).read(image, hw, tasks)

    def shapes_at(self, hw: tuple[int, int]) -> Shapes:
        """The outlines in px. Raises InputError, naming the line."""
        if self.path is None:
            return Shapes((), None, self.rule.things, self.rule.source, self.rule.background)
        try:
            lines = self.path.read_text("utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise InputError(f"{self.path}: wanted outlines as text, got {error}; export it again") from error
        shapes = tuple(self._shape(number, line, hw) for number, line in enumerate(lines, start=1) if line.strip())
        return Shapes(shapes, None, self.rule.things, self.path, self.rule.background)

    def _shape(self, number: int, line: str, hw: tuple[int, int]) -> Shape:
        try:
            first, *rest = line.split()
            corners = np.array(rest, np.float64).reshape(-1, 2)
            label = int(first)
        except ValueError:
            label, corners = -1, np.empty((0, 2))
        if len(corners) < 3 or not ((corners >= -0.5) & (corners <= 1.5)).all():
            raise InputError(
                f"{self.path}: line {number}: wanted a class and three or more x y as shares of the size (0..1), "
                f"got {line[:60]!r}; export segments, not boxes"
            )
        class_of = dict(self.rule.class_of)
        if label not in class_of:
            known = ", ".join(map(str, list(class_of)[:8]))
            raise UnknownLabelError(
                f"{self.path}: line {number}: wanted a class out of {known}{', ...' if len(class_of) > 8 else ''}, "
                f"got {label}; name it in {self.rule.source} (names:)"
            )
        return Shape(number, class_of[label], False, (corners * (hw[1], hw[0]),))


def open_yolo_seg(described: Description) -> Dataset:
    """Instance truth; with `background: NAME` panoptic and semantic too. Raises InputError.

    Photos: the folders that train, val and test of data.yaml name, or images/{split}, {split}/images. Labels: the
    same below labels/, or below `annotations: FOLDER`.
    """
    if "names" not in described:
        raise InputError(f"{described.source}: wanted names: of the classes, got none; list them in order of their ids")
    classes, class_of = described.named_classes()
    classes, background = described.with_background(classes)
    things = [class_id for class_id in range(len(classes)) if class_id != background]
    classes = described.with_things(classes, things)
    number_of = tuple((number, class_id) for number, class_id in class_of.items() if class_id < len(classes))
    rule = YoloRule(number_of, classes.things, background, described.source)
    splits: dict[str, tuple[Item, ...]] = {}
    without = 0
    for split, folder in _photo_folders(described).items():
        label_folder = _label_folder(folder, described)
        labels = files_below(label_folder, frozenset({".txt"})) if label_folder.is_dir() else {}
        photos = files_below(folder, IMAGE_SUFFIXES)
        without += sum(name not in labels for name in photos)
        if photos:
            splits[split] = tuple(Item(name, path, YoloFile(labels.get(name), rule)) for name, path in photos.items())
    count = sum(map(len, splits.values()))
    if without == count:
        raise InputError(
            f"{described.root}: wanted labels as {LABEL_FOLDER}/.../NAME.txt, got none for any of {count} photos; "
            f"name their folder in {described.source} (annotations: FOLDER)"
        )
    notes = (f"photos without a label file have no objects: {without}",) if without else ()
    tasks = frozenset({"instance"} if background is None else {"instance", "panoptic", "semantic"})
    return Dataset(described.root, classes, tasks, splits, notes)


def has_yolo_labels(root: Path) -> bool:
    """Whether there are label files of text where YOLO has them."""
    patterns = (f"{LABEL_FOLDER}/*.txt", f"{LABEL_FOLDER}/*/*.txt", f"*/{LABEL_FOLDER}/*.txt")
    return any(True for pattern in patterns for _ in root.glob(pattern))


def _photo_folders(described: Description) -> dict[str, Path]:
    root = described.root
    given = {split: described.folder(split) for split in SPLITS if split in described}
    if given:
        bases = (root / (described.folder("path") or ""), root, root.parent)
        found = {
            split: next((base / text for base in bases if text and (base / text).is_dir()), None)
            for split, text in given.items()
        }
        missing = [split for split, folder in found.items() if folder is None and split != "test"]
        if missing:
            raise described.refusal(missing[0], f"a folder of photos below {root}", given[missing[0]])
        return {split: folder for split, folder in found.items() if folder}
    named = described.folder("images") or IMAGES.folders[0]
    if (root / named).is_dir():
        return splits_in(root / named) or {"train": root / named}
    outer = {split: folder / named for split, folder in splits_in(root).items() if (folder / named).is_dir()}
    if not outer:
        raise InputError(f"{root}: wanted photos in {named}/, got none; name it in {described.source} (images:)")
    return outer


def _label_folder(photos: Path, described: Description) -> Path:
    """The last `images` of the path becomes `labels`; or the same folder below `annotations:`."""
    named = described.folder("annotations")
    if named:
        base = described.resolve("annotations", named)
        return base / photos.name if (base / photos.name).is_dir() else base
    parts = list(photos.parts)
    places = [place for place, part in enumerate(parts) if part == (described.folder("images") or "images")]
    if places:
        parts[places[-1]] = LABEL_FOLDER
    return Path(*parts)
