"""One way to open a data set of any kind."""

from dataclasses import replace
from pathlib import Path
from typing import assert_never

from denselab.data import ade20k, cityscapes, coco_instances, coco_panoptic, voc
from denselab.data.ade20k import open_ade20k
from denselab.data.cityscapes import open_cityscapes
from denselab.data.coco import find_coco_files
from denselab.data.coco_instances import open_coco_instances
from denselab.data.coco_panoptic import open_coco_panoptic
from denselab.data.dataset import Dataset
from denselab.data.depth_list import find_depth_lists, open_depth_lists
from denselab.data.description import Description, Layout, read_description
from denselab.data.folders import open_folders
from denselab.data.seven_scenes import has_sequences, open_seven_scenes
from denselab.data.splits import chosen_splits, with_validation
from denselab.data.voc import open_voc
from denselab.data.yolo_seg import has_yolo_labels, open_yolo_seg


def open_dataset(root: str | Path) -> Dataset:
    """Open a data folder, or the folder that a descriptor file (.yaml, .json) names as its `root`.

    What the folder holds is said by `dataset.yaml`, `.yml` or `.json` in it (keys: docs/your-own-data.md), of which
    everything may be left out that the files show by themselves: the layout, the classes, the splits. Without a val
    split 10 % of train become val, see `carve_validation`. Raises InputError for data it cannot use.
    """
    described = read_description(Path(root))
    dataset = _open(described)
    if "splits" in described:
        return replace(dataset, splits=chosen_splits(dataset.splits, described))
    splits, notes = with_validation(dataset.splits)
    return replace(dataset, splits=splits, notes=(*dataset.notes, *notes))


def _open(described: Description) -> Dataset:
    layout = described.layout or recognised(described)
    match layout:
        case Layout.FOLDERS:
            return open_folders(described)
        case Layout.COCO_PANOPTIC:
            return open_coco_panoptic(described)
        case Layout.COCO_INSTANCES:
            return open_coco_instances(described)
        case Layout.DEPTH_LIST:
            return open_depth_lists(described)
        case Layout.SEVEN_SCENES:
            return open_seven_scenes(described)
        case Layout.CITYSCAPES:
            return open_cityscapes(described)
        case Layout.ADE20K:
            return open_ade20k(described)
        case Layout.VOC:
            return open_voc(described)
        case Layout.YOLO_SEG:
            return open_yolo_seg(described)
        case _:
            assert_never(layout)


def recognised(described: Description) -> Layout:
    """The layout that files show by their names; plain folders where none does.

    Of COCO's files the panoptic ones are taken where both are there: they hold the instances too.
    """
    given = described.values.get("annotations")
    if isinstance(given, str) and described.resolve("annotations", given).is_dir():
        return Layout.YOLO_SEG
    if given is not None:
        return Layout.COCO_PANOPTIC if coco_panoptic.PREFIX in str(given) else Layout.COCO_INSTANCES
    if find_coco_files(described, coco_panoptic.PREFIX):
        return Layout.COCO_PANOPTIC
    if find_coco_files(described, coco_instances.PREFIX):
        return Layout.COCO_INSTANCES
    root = described.root
    if (root / cityscapes.IMAGES).is_dir() and (root / cityscapes.TRUTHS).is_dir():
        return Layout.CITYSCAPES
    if (root / ade20k.NAMES_FILE).is_file():
        return Layout.ADE20K
    if (root / voc.LISTS).is_dir() and (root / voc.MASKS).is_dir():
        return Layout.VOC
    if "train" in described or has_yolo_labels(root):
        return Layout.YOLO_SEG
    if find_depth_lists(root):
        return Layout.DEPTH_LIST
    if has_sequences(root):
        return Layout.SEVEN_SCENES
    return Layout.FOLDERS
