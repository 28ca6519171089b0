"""COCO panoptic: a JSON of segments, and a PNG per image in which id = red + 256 green + 65536 blue.

Source: the COCO panoptic task (cocodataset.org/#format-data, 4. Panoptic segmentation).
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from denselab.data.coco import CocoFile, class_id_of, coco_classes, coco_items, find_coco_files, notes_of, read_coco
from denselab.data.dataset import Dataset, Item, Labels, LeftOut
from denselab.data.description import Description
from denselab.data.segment_maps import check_ids, truth_of_segments
from denselab.data.truth import Truth, check_size
from denselab.errors import InputError
from denselab.segments import Segment, Segments

PREFIX = "panoptic"


@dataclass(frozen=True, eq=False)
class PanopticPng:
    """The segments of one image. rows: int32 [N, 3] of id, class id, and whether it is a crowd."""

    path: Path
    rows: NDArray[np.int32]
    things: tuple[int, ...]
    source: Path

    def read(self, image: Path, hw: tuple[int, int], tasks: Collection[str]) -> Truth:
        """See `Labels.read`; UnknownLabelError unless the PNG holds exactly the ids of the JSON."""
        from denselab.runtime.images import open_image

        colours = open_image(self.path)
        check_size(self.path, colours.shape[:2], image, hw)
        ids = colours.astype(np.int32) @ np.array([1, 256, 65536], np.int32)
        check_ids(ids, self.rows[:, 0].tolist(), self.path, self.source.name)
        segments = tuple(Segment(i, class_id, is_crowd=bool(crowd)) for i, class_id, crowd in self.rows.tolist())
        return truth_of_segments(Segments(ids[None], segments), tasks, self.things)


def open_coco_panoptic(described: Description) -> Dataset:
    """Panoptic, instance and semantic truth of every split that has a JSON. Raises InputError.

    Unlabelled pixels are void in all three. Crowds are segments with `is_crowd`.
    """
    paths = find_coco_files(described, PREFIX)
    if not paths:
        raise InputError(
            f"{described.root}: wanted annotations/panoptic_train2017.json or the like, got none; "
            f"name them in {described.source} (annotations: {{train: FILE}})"
        )
    files = {split: read_coco(path) for split, path in paths.items()}
    classes = coco_classes(list(files.values()), described, lambda category: bool(category.get("isthing", 1)))
    splits: dict[str, tuple[Item, ...]] = {}
    left_out: list[LeftOut] = []
    for split, file in files.items():
        folder = _png_folder(file, split, described)

        def labels(image: Mapping[str, Any], file: CocoFile = file, folder: Path = folder) -> Labels | LeftOut:
            return _labels(image, file, folder, classes.things)

        splits[split], lone = coco_items(file, split, described, labels)
        left_out += lone
    tasks = frozenset({"semantic", "instance", "panoptic"}) if classes.things else frozenset({"semantic", "panoptic"})
    return Dataset(described.root, classes, tasks, splits, tuple(notes_of(left_out)), tuple(left_out))


def _labels(image: Mapping[str, Any], file: CocoFile, folder: Path, things: tuple[int, ...]) -> Labels | LeftOut:
    annotations = file.annotations.get(image["id"], ())
    if not annotations:
        return LeftOut(file.path.parent / image["file_name"], "panoptic annotation")
    annotation = annotations[0]
    owner = f"image {image['id']}"
    if "segments_info" not in annotation or "file_name" not in annotation or len(annotations) > 1:
        raise InputError(
            f"{file.path}: {owner}: wanted one annotation with file_name and segments_info, "
            f"got {len(annotations)} with {', '.join(annotation)}; another kind of file (layout: coco_instances?)"
        )
    path = folder / annotation["file_name"]
    if not path.is_file():
        return LeftOut(path, "panoptic PNG")
    rows = [
        (int(s["id"]), class_id_of(file, s["category_id"], f"{owner}, segment {s['id']}"), int(s.get("iscrowd", 0)))
        for s in annotation["segments_info"]
    ]
    return PanopticPng(path, np.array(rows, np.int32).reshape(-1, 3), things, file.path)


def _png_folder(file: CocoFile, split: str, described: Description) -> Path:
    named = described.folder("segments")
    if named is None:
        candidates = [file.path.with_suffix("")]
    else:
        base = described.root / named
        candidates = [base / file.path.stem, base / split, base]
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise InputError(
        f"{file.path}: wanted its PNGs in the folder {candidates[-1]}, got no such folder; "
        f"name it in {described.source} (segments: FOLDER)"
    )
