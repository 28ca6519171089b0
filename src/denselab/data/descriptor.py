"""One way to open a data set of any kind."""

from dataclasses import replace
from pathlib import Path
from typing import assert_never

from denselab.data import coco_instances, coco_panoptic
from denselab.data.coco import find_coco_files
from denselab.data.coco_instances import open_coco_instances
from denselab.data.coco_panoptic import open_coco_panoptic
from denselab.data.dataset import Dataset
from denselab.data.depth_list import find_depth_lists, open_depth_lists
from denselab.data.description import Description, Layout, read_description
from denselab.data.folders import open_folders
from denselab.data.seven_scenes import has_sequences, open_seven_scenes
from denselab.data.splits import chosen_splits, with_validation


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
        case _:
            assert_never(layout)


def recognised(described: Description) -> Layout:
    """The layout that files show by their names; plain folders where none does.

    Of COCO's files the panoptic ones are taken where both are there: they hold the instances too.
    """
    if find_coco_files(described, coco_panoptic.PREFIX):
        return Layout.COCO_PANOPTIC
    if find_coco_files(described, coco_instances.PREFIX):
        return Layout.COCO_INSTANCES
    if find_depth_lists(described.root):
        return Layout.DEPTH_LIST
    if has_sequences(described.root):
        return Layout.SEVEN_SCENES
    return Layout.FOLDERS
