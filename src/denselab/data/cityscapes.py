"""Cityscapes: leftImg8bit/SPLIT/CITY/NAME_leftImg8bit.png beside gtFine/SPLIT/CITY/NAME_gtFine_labelIds.png.

`_instanceIds.png` holds label * 1000 + number for objects and the label itself for the rest; of a thing label the
latter is a group that was not told apart. Source: Cordts et al. 2016 and mcordts/cityscapesScripts
helpers/labels.py (19 classes are scored, the other labels are void).
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from denselab.classes import VOID, Classes
from denselab.data.class_masks import ClassMask, MaskCoding
from denselab.data.dataset import Dataset, Item, LeftOut
from denselab.data.description import Description
from denselab.data.folder import files_below, splits_in
from denselab.data.segment_maps import truth_of_segments
from denselab.data.truth import SEGMENT_TASKS, Truth, check_size
from denselab.errors import InputError
from denselab.files import IMAGE_SUFFIXES
from denselab.segments import Segment, Segments

IMAGES, TRUTHS = "leftImg8bit", "gtFine"
LABELS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""The label ids that are scored; their places are the class ids ("train ids")."""

CLASSES = Classes(
    (
        "road",
        "sidewalk",
        "building",
        "wall",
        "fence",
        "pole",
        "traffic light",
        "traffic sign",
        "vegetation",
        "terrain",
        "sky",
        "person",
        "rider",
        "car",
        "truck",
        "bus",
        "train",
        "motorcycle",
        "bicycle",
    ),
    (
        (128, 64, 128),
        (244, 35, 232),
        (70, 70, 70),
        (102, 102, 156),
        (190, 153, 153),
        (153, 153, 153),
        (250, 170, 30),
        (220, 220, 0),
        (107, 142, 35),
        (152, 251, 152),
        (70, 130, 180),
        (220, 20, 60),
        (255, 0, 0),
        (0, 0, 142),
        (0, 0, 70),
        (0, 60, 100),
        (0, 80, 100),
        (0, 0, 230),
        (119, 11, 32),
    ),
    tuple(range(11, 19)),
)
_PER_LABEL = 1000


@dataclass(frozen=True)
class CityscapesLabels:
    """The truths of one photo. instances: None where only class masks are there."""

    mask: ClassMask
    instances: Path | None

    def read(self, image: Path, hw: tuple[int, int], tasks: Collection[str]) -> Truth:
        """See `Labels.read`."""
        from denselab.runtime.images import open_labels

        class_ids = self.mask.class_ids(image, hw) if "semantic" in tasks else None
        if self.instances is None or not SEGMENT_TASKS.intersection(tasks):
            return Truth(class_ids)
        ids = open_labels(self.instances).astype(np.int32)
        check_size(self.instances, ids.shape, image, hw)
        segments: list[Segment] = []
        for number in np.flatnonzero(np.bincount(ids.ravel())).tolist():
            label = number // _PER_LABEL if number >= _PER_LABEL else number
            if label in LABELS:
                class_id = LABELS.index(label)
                is_group = number < _PER_LABEL and class_id in CLASSES.things
                segments.append(Segment(number, class_id, is_crowd=is_group))
        void = ~np.isin(ids, [segment.id for segment in segments])
        ids[void] = 0
        return truth_of_segments(Segments(ids[None], tuple(segments)), tasks, CLASSES.things, void, None, class_ids)


def open_cityscapes(described: Description) -> Dataset:
    """Semantic truth, and instance and panoptic where `_instanceIds.png` are there. Raises InputError."""
    root = described.root
    image_root, truth_root = root / IMAGES, root / TRUTHS
    if not image_root.is_dir() or not truth_root.is_dir():
        raise InputError(f"{root}: wanted {IMAGES}/ and {TRUTHS}/ of Cityscapes, got no such folders; unpack them")
    class_of = dict.fromkeys(range(256), VOID) | {label: class_id for class_id, label in enumerate(LABELS)}
    coding = MaskCoding(tuple(class_of.items()), False, described.source)
    splits: dict[str, tuple[Item, ...]] = {}
    left_out: list[LeftOut] = []
    for split, folder in splits_in(image_root).items():
        items: list[Item] = []
        for stem, image in files_below(folder, IMAGE_SUFFIXES).items():
            name = stem.removesuffix(f"_{IMAGES}")
            truth = truth_root / folder.name / f"{name}_{TRUTHS}"
            mask, instances = (truth.with_name(f"{truth.name}_{kind}Ids.png") for kind in ("label", "instance"))
            if not mask.is_file():
                left_out.append(LeftOut(image, "mask"))
                continue
            labels = CityscapesLabels(ClassMask(mask, coding), instances if instances.is_file() else None)
            items.append(Item(name, image, labels))
        if items:
            splits[split] = tuple(items)
    every = [item.labels for items in splits.values() for item in items]
    if not every:
        raise InputError(f"{root}: wanted photos with masks NAME_{TRUTHS}_labelIds.png, got none; unpack both there")
    has_instances = all(isinstance(labels, CityscapesLabels) and labels.instances for labels in every)
    tasks = frozenset({"semantic", "instance", "panoptic"} if has_instances else {"semantic"})
    notes = (f"photos without a mask are left out: {len(left_out)}, such as {left_out[0].path}",) if left_out else ()
    return Dataset(root, CLASSES, tasks, splits, notes, tuple(left_out))
