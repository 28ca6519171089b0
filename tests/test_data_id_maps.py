"""Instances as id maps: with class masks, alone, with a background; and nuclei counted as their table says."""

import csv
from pathlib import Path

import numpy as np
import pytest

from denselab.classes import VOID
from denselab.data.check import check
from denselab.data.dataset import Dataset
from denselab.data.descriptor import open_dataset
from denselab.data.truth import SizeMismatchError, Truth
from denselab.errors import InputError
from denselab.segments import Segment
from tiny_data import photo, save


def add(
    root: Path, name: str, ids: list[list[int]], masks: list[list[int]] | None = None, folder: str = "instances"
) -> None:
    array = np.array(ids, np.uint16)
    photo(root / f"images/{name}.png", (array.shape[0], array.shape[1]), len(name) + array.shape[1])
    save(root / f"{folder}/{name}.png", array)
    if masks:
        save(root / f"masks/{name}.png", np.array(masks, np.uint8))


def first(dataset: Dataset, *tasks: str) -> Truth:
    return dataset.read(dataset.split("train")[0], tasks)[1]


def test_masks_say_what_objects_are(tmp_path: Path) -> None:
    """Object 3: two pixels of cat, one of grass; object 8 is grass, no thing; cat pixels without a number: a crowd."""
    add(tmp_path, "a", [[3, 3, 3, 8, 0, 0, 0]], [[1, 1, 0, 0, 0, 1, 255]])
    (tmp_path / "dataset.yaml").write_text("names: [grass, cat]\nthings: [cat]\n")
    dataset = open_dataset(tmp_path)
    assert dataset.tasks == {"semantic", "instance", "panoptic"}
    truth = first(dataset, "panoptic", "semantic")
    assert truth.class_ids is not None
    assert truth.class_ids.tolist() == [[1, 1, 0, 0, 0, 1, VOID]], "the mask as it is"
    assert truth.segments is not None
    assert truth.segments.layers.tolist() == [[[3, 3, 3, 4, 4, 5, 0]]]
    assert truth.segments.segments == (Segment(3, 1), Segment(4, 0), Segment(5, 1, is_crowd=True))
    assert truth.void is not None
    assert truth.void.tolist() == [[False] * 5 + [True] * 2]
    things = first(dataset, "instance")
    assert things.segments is not None
    assert things.segments.layers.tolist() == [[[3, 3, 3, 0, 0, 5, 0]]]
    assert first(dataset, "semantic").segments is None


def test_masks_with_objects_need_things(tmp_path: Path) -> None:
    add(tmp_path, "a", [[3, 0]], [[1, 0]])
    with pytest.raises(InputError, match=r"the classes that are told apart, got none; add things: \[NAMES\]"):
        open_dataset(tmp_path)
    (tmp_path / "dataset.yaml").write_text("things: [cat]\n")
    with pytest.raises(InputError, match=r"things: wanted names out of class_0, class_1, got \['cat'\]"):
        open_dataset(tmp_path)


def test_one_class_and_ignored_numbers(tmp_path: Path) -> None:
    add(tmp_path, "a", [[0, 4, 4, 65535]])
    (tmp_path / "dataset.yaml").write_text("names: [nucleus]\nignore: 65535\n")
    dataset = open_dataset(tmp_path)
    assert dataset.tasks == {"instance"}
    assert dataset.classes
    assert (dataset.classes.names, dataset.classes.things) == (("nucleus",), (0,))
    truth = first(dataset, "instance")
    assert truth.segments is not None
    assert truth.segments.segments == (Segment(4, 0),)
    assert truth.void is not None
    assert truth.void.tolist() == [[False, False, False, True]], "0 is background"
    with pytest.raises(InputError, match=r"wanted truth for semantic, got data with instance only; .*background: NAME"):
        first(dataset, "semantic")


def test_a_background_class_makes_it_panoptic(tmp_path: Path) -> None:
    add(tmp_path, "a", [[0, 4, 4, 9]])
    (tmp_path / "dataset.yaml").write_text("names: [background, nucleus]\nbackground: background\n")
    dataset = open_dataset(tmp_path)
    truth = first(dataset, "panoptic", "semantic")
    assert truth.class_ids is not None
    assert truth.class_ids.tolist() == [[0, 1, 1, 1]]
    assert truth.segments is not None
    assert truth.segments.layers.tolist() == [[[10, 4, 4, 9]]]
    assert truth.segments.segments == (Segment(4, 1), Segment(9, 1), Segment(10, 0))
    (tmp_path / "dataset.yaml").write_text("names: [nucleus, cell]\n")
    with pytest.raises(InputError, match=r"wanted one class of objects .* class masks, got nucleus, cell"):
        open_dataset(tmp_path)


def test_an_image_without_objects(tmp_path: Path) -> None:
    add(tmp_path, "a", [[0, 0]])
    add(tmp_path, "bb", [[0, 1, 1]])
    report = check(tmp_path)
    assert not report.problems
    assert any("images without objects: 1, such as a" in note for note in report.notes)
    counts = {split: part.objects for split, part in report.splits.items()}
    assert sum(sum(part.of_class) for part in counts.values() if part) == 1


def test_id_maps_are_recognised_among_masks(tmp_path: Path) -> None:
    add(tmp_path, "a", [[0, 1, 2]], folder="labels")
    add(tmp_path, "bb", [[0, 1, 2, 3]], folder="labels")
    dataset = open_dataset(tmp_path)
    assert dataset.tasks == {"instance"}
    assert any("id maps without names: one class, object" in note for note in dataset.notes)
    add(tmp_path, "ccc", [[0, 1, 3]], folder="labels")
    assert open_dataset(tmp_path).tasks == {"semantic"}, "a number is missing: class masks"


def test_map_of_another_size(tmp_path: Path) -> None:
    add(tmp_path, "a", [[0, 1]])
    photo(tmp_path / "images/a.png", (3, 3))
    with pytest.raises(SizeMismatchError, match=r"instances.a\.png: wanted the size of its image .*3x3 px, got 2x1 px"):
        first(open_dataset(tmp_path), "instance")


def test_nuclei_are_counted_as_their_table_says(shared_data: Path) -> None:
    root = shared_data / "dsb2018_nuclei"
    dataset = open_dataset(root)
    assert dataset.tasks == {"instance"}
    with (root / "index.csv").open() as table:
        listed = {row["id"]: int(row["n_instances"]) for row in csv.DictReader(table)}
    items = [item for part in dataset.splits.values() for item in part]
    assert {item.name for item in items} == listed.keys()
    for item in items[::8]:
        segments = dataset.read(item, {"instance"})[1].segments
        assert segments is not None
        assert len(segments.segments) == listed[item.name]
