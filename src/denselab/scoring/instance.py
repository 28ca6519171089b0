"""COCO results against COCO instance annotations, read as pycocotools reads them."""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from denselab.errors import InputError
from denselab.metrics.instance import (
    CompressedMask,
    ImageInstances,
    Instance,
    InstanceScore,
    from_polygons,
    from_runs,
    measured,
)
from denselab.rle import Rle, from_string
from denselab.scoring.coco_files import (
    Key,
    check_same_categories,
    parsed,
    read_categories,
    read_json,
    refuse_repeated,
    table,
)
from denselab.scoring.count import Scored
from denselab.scoring.folders import refuse_unmatched

Hw = tuple[int, int]


def score_instance(pred: Path, gt: Path, allow_missing: bool, boundary: bool = False) -> Scored:
    """Average precision of a COCO result list, with `boundary` of boundaries too; the classes are those of the truth.

    As in pycocotools: an image without results is one where nothing was found; true areas and boxes are those of the
    file; and if the first result has a box, areas and boxes of all predictions are those of their boxes, else those of
    their masks. Raises InputError for files that are no such files, for masks of another size than their image, and,
    unless they are left out, for results of images or categories that the truth does not have.
    """
    truth = read_json("--gt", gt)
    categories = read_categories("--gt", gt, truth)
    classes = categories.classes()
    score = InstanceScore(len(categories.ids), boundary)

    def image(entry: Mapping[str, Any]) -> tuple[Key, Hw]:
        return entry["id"], (int(entry["height"]), int(entry["width"]))

    images = parsed("--gt", gt, "image", table("--gt", gt, truth, "images"), image)
    refuse_repeated("--gt", gt, "image", [image_id for image_id, _ in images])
    sizes = dict(images)
    if not sizes:
        raise InputError(f"--gt: {gt}: wanted at least one image, got none; list them in 'images'")

    def annotation(entry: Mapping[str, Any]) -> tuple[Key, Instance]:
        if entry["image_id"] not in sizes:
            raise ValueError(f"image {entry['image_id']}, which is not among its images")
        if entry["category_id"] not in classes:
            raise ValueError(f"category {entry['category_id']}, which is not among its categories")
        mask = _mask(entry["segmentation"], sizes[entry["image_id"]])
        whole = measured(mask, classes[entry["category_id"]], is_crowd=bool(entry.get("iscrowd", 0)))
        area_px, box_px = float(entry.get("area", whole.area_px)), _box(entry.get("bbox")) or whole.box_px
        return entry["image_id"], Instance(mask, whole.class_id, area_px, box_px, is_crowd=whole.is_crowd)

    true: dict[Key, list[Instance]] = defaultdict(list)
    annotations = table("--gt", gt, truth, "annotations")
    for image_id, instance in parsed("--gt", gt, "annotation", annotations, annotation):
        true[image_id].append(instance)

    found = read_json("--pred", pred)
    check_same_categories(pred, found, gt, categories)
    if not isinstance(found, list):
        raise InputError(
            f"--pred: {pred}: wanted a list of results [{{image_id, category_id, segmentation, score}}, ...], "
            f"got {type(found).__name__}; write COCO's result format"
        )
    by_box = bool(found) and isinstance(found[0], dict) and bool(found[0].get("bbox"))

    def result(entry: Mapping[str, Any]) -> tuple[Key, Instance] | str:
        if entry["image_id"] not in sizes:
            return f"image {entry['image_id']} of {pred}"
        if entry["category_id"] not in classes:
            return f"category {entry['category_id']} of {pred}"
        mask = _mask(entry["segmentation"], sizes[entry["image_id"]])
        whole = measured(mask, classes[entry["category_id"]], float(entry["score"]))
        box_px = _box(entry["bbox"] if by_box else entry.get("bbox")) or whole.box_px
        area_px = box_px[2] * box_px[3] if by_box else whole.area_px
        return entry["image_id"], Instance(mask, whole.class_id, area_px, box_px, whole.score)

    predicted: dict[Key, list[Instance]] = defaultdict(list)
    unmatched: list[str] = []
    for read in parsed("--pred", pred, "result", found, result):
        if isinstance(read, str):
            unmatched.append(read)
        else:
            predicted[read[0]].append(read[1])
    unmatched = list(dict.fromkeys(unmatched))
    refuse_unmatched("images or categories", unmatched, allow_missing)

    for place, image_id in enumerate(sorted(sizes, key=lambda key: (isinstance(key, str), key))):
        score.add(ImageInstances(sizes[image_id], tuple(predicted[image_id]), tuple(true[image_id]), place))
    return Scored(score.compute(), categories.names, len(sizes), unmatched=unmatched)


def _mask(segmentation: Any, hw: Hw) -> CompressedMask:
    """Polygons, plain runs or compressed runs as compressed runs. Raises ValueError if they do not fit the image."""
    if isinstance(segmentation, list):
        if not segmentation or any(len(polygon) < 6 for polygon in segmentation):
            raise ValueError("a polygon of fewer than three points, or none")
        return from_polygons(segmentation, hw)
    size = tuple(segmentation["size"])
    if size != hw:
        raise ValueError(f"a mask of {size[1]}x{size[0]} px for an image of {hw[1]}x{hw[0]} px")
    if isinstance(segmentation["counts"], list):
        return from_runs(Rle(hw, np.asarray(segmentation["counts"], np.int64)))
    # Runs that do not fill the image would keep the counting engine busy for ever, so they are read here first.
    from_string(str(segmentation["counts"]), hw)
    return {"size": list(hw), "counts": str(segmentation["counts"])}


def _box(values: Any) -> tuple[float, float, float, float] | None:
    if not values:
        return None
    x, y, width, height = (float(value) for value in values)
    return x, y, width, height
