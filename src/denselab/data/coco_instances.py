"""COCO instances: one JSON per split with polygons and runs of every object; what is in none is background.

Source: the COCO detection task (cocodataset.org/#format-data, 1. Object Detection); Roboflow writes the same beside
its images.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from denselab.data.coco import CocoFile, class_id_of, coco_classes, coco_items, find_coco_files, notes_of, read_coco
from denselab.data.dataset import Dataset, Item, LeftOut
from denselab.data.description import Description
from denselab.data.shapes import Polygons, Runs, Shape, Shapes
from denselab.errors import InputError

PREFIX = "instances"


def open_coco_instances(described: Description) -> Dataset:
    """Instance truth of every split that has a JSON; with `background: NAME` panoptic and semantic too.

    All classes are things unless `things:` says otherwise. Annotations without a usable segmentation (boxes only,
    fewer than three corners) are left out. Raises InputError.
    """
    paths = find_coco_files(described, PREFIX)
    if not paths:
        raise InputError(
            f"{described.root}: wanted annotations/instances_train2017.json, train/_annotations.coco.json or the like, "
            f"got none; name them in {described.source} (annotations: {{train: FILE}})"
        )
    files = {split: read_coco(path) for split, path in paths.items()}
    classes, background = described.with_background(
        coco_classes(list(files.values()), described, lambda _category: True)
    )
    splits: dict[str, tuple[Item, ...]] = {}
    left_out: list[LeftOut] = []
    notes: list[str] = []
    for split, file in files.items():
        shapeless: list[int] = []

        def labels(image: Mapping[str, Any], file: CocoFile = file, shapeless: list[int] = shapeless) -> Shapes:
            return _labels(image, file, classes.things, background, shapeless)

        splits[split], lone = coco_items(file, split, described, labels)
        left_out += lone
        count = sum(map(len, file.annotations.values()))
        if shapeless and len(shapeless) == count:
            raise InputError(
                f"{file.path}: wanted segmentations, got {count} annotations without one (annotation {shapeless[0]} "
                "has none); these are boxes only: export polygons or masks"
            )
        if shapeless:
            notes.append(
                f"{file.path.name}: annotations without a usable segmentation are left out: {len(shapeless)}, "
                f"such as annotation {shapeless[0]}"
            )
    tasks = frozenset({"instance"}) if background is None else frozenset({"instance", "panoptic", "semantic"})
    return Dataset(described.root, classes, tasks, splits, (*notes_of(left_out), *notes), tuple(left_out))


def _labels(
    image: Mapping[str, Any], file: CocoFile, things: tuple[int, ...], background: int | None, shapeless: list[int]
) -> Shapes:
    shapes: list[Shape] = []
    for annotation in file.annotations.get(image["id"], ()):
        number = annotation.get("id", -1)
        owner = f"image {image['id']}, annotation {number}"
        class_id = class_id_of(file, annotation.get("category_id"), owner)
        mask = _mask(annotation.get("segmentation"), f"{file.path}: {owner}")
        if mask:
            shapes.append(Shape(number, class_id, bool(annotation.get("iscrowd", 0)), mask))
        else:
            shapeless.append(number)
    size = (image.get("height"), image.get("width"))
    hw = (int(size[0]), int(size[1])) if size[0] and size[1] else None
    return Shapes(tuple(shapes), hw, things, file.path, background)


def _mask(given: Any, owner: str) -> Polygons | Runs | None:
    """Polygons with three corners or more, or runs; None where there are neither."""
    try:
        match given:
            case {"counts": str(text), "size": [height, width]}:
                return Runs((int(height), int(width)), text)
            case {"counts": [*counts], "size": [height, width]}:
                return Runs((int(height), int(width)), np.array(counts, np.int64))
            case None:
                return None
            case [*polygons]:
                corners = [np.array(polygon, np.float64).reshape(-1, 2) for polygon in polygons]
                if not all(np.isfinite(each).all() for each in corners):
                    raise ValueError("a corner that is no number")
                return tuple(each for each in corners if len(each) >= 3)
            case _:
                raise ValueError(f"{str(given)[:80]!r}")
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{owner}: wanted polygons [[x, y, x, y, ...], ...] or runs {{size, counts}}, got {error}; export it again"
        ) from error
