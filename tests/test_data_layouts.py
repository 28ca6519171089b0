"""Data sets in their own layouts: Cityscapes, Pascal VOC, ADE20K, YOLO segmentation; recognised, read, and refused."""

from pathlib import Path

import numpy as np
import pytest

from denselab.classes import VOID
from denselab.data import cityscapes
from denselab.data.check import ProblemKind, check
from denselab.data.dataset import Dataset
from denselab.data.descriptor import open_dataset
from denselab.data.truth import Truth, UnknownLabelError
from denselab.errors import InputError
from denselab.segments import Segment
from tiny_data import photo, save


def first(dataset: Dataset, *tasks: str) -> Truth:
    return dataset.read(dataset.split("train")[0], tasks)[1]


def city(root: Path, instances: bool = True) -> Path:
    """Road, two cars, a group of cars, a caravan (void), sky."""
    name = "train/aachen/aachen_000000_000019"
    photo(root / f"leftImg8bit/{name}_leftImg8bit.png", (1, 6))
    labels = np.array([[7, 26, 26, 26, 29, 23]])
    save(root / f"gtFine/{name}_gtFine_labelIds.png", labels.astype(np.uint8))
    if instances:
        ids = np.array([[7, 26000, 26001, 26, 29000, 23]])
        save(root / f"gtFine/{name}_gtFine_instanceIds.png", ids.astype(np.uint16))
    return root


def test_cityscapes(tmp_path: Path) -> None:
    dataset = open_dataset(city(tmp_path))
    assert dataset.tasks == {"semantic", "instance", "panoptic"}
    assert dataset.classes == cityscapes.CLASSES
    assert dataset.split("train")[0].name == "aachen/aachen_000000_000019"
    truth = first(dataset, "panoptic", "semantic")
    assert truth.class_ids is not None
    assert truth.class_ids.tolist() == [[0, 13, 13, 13, VOID, 10]]
    assert truth.segments is not None
    assert truth.segments.layers.tolist() == [[[7, 26000, 26001, 26, 0, 23]]]
    assert Segment(26, 13, is_crowd=True) in truth.segments.segments
    assert truth.void is not None
    assert truth.void.tolist() == [[False, False, False, True, True, False]]
    things = first(dataset, "instance")
    assert things.segments is not None
    assert things.segments.layers.tolist() == [[[0, 26000, 26001, 26, 0, 0]]]


def test_cityscapes_without_instances(tmp_path: Path) -> None:
    dataset = open_dataset(city(tmp_path, instances=False))
    assert dataset.tasks == {"semantic"}
    next((tmp_path / "gtFine").rglob("*.png")).unlink()
    with pytest.raises(InputError, match=r"wanted photos with masks NAME_gtFine_labelIds\.png, got none"):
        open_dataset(tmp_path)
    (tmp_path / "dataset.yaml").write_text("layout: cityscapes")
    (tmp_path / "leftImg8bit").rename(tmp_path / "photos")
    with pytest.raises(InputError, match=r"wanted leftImg8bit/ and gtFine/ of Cityscapes"):
        open_dataset(tmp_path)


def voc(root: Path, objects: bool = True) -> Path:
    for name, split in (("2007_1", "train"), ("2007_2", "val"), ("2007_3", "val")):
        photo(root / f"JPEGImages/{name}.jpg", (1, 5))
        save(root / f"SegmentationClass/{name}.png", np.array([[0, 15, 255, 12, 12]], np.uint8))
        if objects:
            save(root / f"SegmentationObject/{name}.png", np.array([[0, 1, 255, 2, 2]], np.uint8))
        (root / "ImageSets/Segmentation").mkdir(parents=True, exist_ok=True)
        with (root / f"ImageSets/Segmentation/{split}.txt").open("a") as names:
            names.write(name + "\n")
    return root


def test_voc(tmp_path: Path) -> None:
    dataset = open_dataset(voc(tmp_path))
    assert {split: len(items) for split, items in dataset.splits.items()} == {"train": 1, "val": 2}
    assert dataset.classes
    assert dataset.classes.names[12] == "dog"
    truth = first(dataset, "panoptic", "semantic")
    assert truth.class_ids is not None
    assert truth.class_ids.tolist() == [[0, 15, VOID, 12, 12]]
    assert truth.segments is not None
    assert truth.segments.segments == (Segment(1, 15), Segment(2, 12), Segment(3, 0))
    assert truth.segments.layers.tolist() == [[[3, 1, 0, 2, 2]]]
    things = first(dataset, "instance")
    assert things.void is not None
    assert things.void.tolist() == [[False, False, True, False, False]]


def test_voc_with_masks_only_and_with_nothing(tmp_path: Path) -> None:
    root = voc(tmp_path / "masks", objects=False)
    assert open_dataset(root).tasks == {"semantic"}
    (root / "JPEGImages/2007_2.jpg").unlink()
    assert open_dataset(root).left_out[0].missing == "image"
    for name in ("train", "val"):
        (root / f"ImageSets/Segmentation/{name}.txt").write_text("gone")
    with pytest.raises(InputError, match=r"wanted JPEGImages/NAME\.jpg with SegmentationClass/NAME\.png"):
        open_dataset(root)
    for name in ("train", "val"):
        (root / f"ImageSets/Segmentation/{name}.txt").unlink()
    with pytest.raises(InputError, match=r"wanted ImageSets/Segmentation/train\.txt or the like, got none"):
        open_dataset(root)


def test_ade20k(tmp_path: Path) -> None:
    for split in ("training", "validation"):
        photo(tmp_path / f"images/{split}/ADE_{split}_1.jpg", (1, 3))
        save(tmp_path / f"annotations/{split}/ADE_{split}_1.png", np.array([[0, 1, 3]], np.uint8))
    rows = ["Idx\tRatio\tTrain\tVal\tName", "1\t0.2\t1\t1\twall", "2\t0.1\t1\t1\tscreen, door", "3\t0.1\t1\t1\tscreen"]
    (tmp_path / "objectInfo150.txt").write_text("\n".join(rows))
    dataset = open_dataset(tmp_path)
    assert dataset.classes
    assert dataset.classes.names == ("wall", "screen 2", "screen 3")
    assert list(dataset.splits) == ["train", "val"]
    truth = first(dataset, "semantic")
    assert truth.class_ids is not None
    assert truth.class_ids.tolist() == [[VOID, 0, 2]]
    (tmp_path / "objectInfo150.txt").write_text("Idx\nwall")
    with pytest.raises(InputError, match=r"objectInfo150\.txt: wanted lines of number, \.\.\., name"):
        open_dataset(tmp_path)


SQUARE = "0.25 0.25 0.75 0.25 0.75 0.75 0.25 0.75"


def yolo(root: Path, text: str = f"1 {SQUARE}\n") -> Path:
    for split in ("train", "val"):
        photo(root / f"images/{split}/a.jpg", (4, 8))
        photo(root / f"images/{split}/b.jpg", (4, 8), 9)
        (root / f"labels/{split}").mkdir(parents=True, exist_ok=True)
        (root / f"labels/{split}/a.txt").write_text(text)
    (root / "data.yaml").write_text("path: .\ntrain: images/train\nval: images/val\nnc: 2\nnames: {0: cat, 1: dog}\n")
    return root


def test_yolo_segments(tmp_path: Path) -> None:
    for dataset in (open_dataset(yolo(tmp_path)), open_dataset(tmp_path / "data.yaml")):
        assert dataset.tasks == {"instance"}
        assert {split: len(items) for split, items in dataset.splits.items()} == {"train": 2, "val": 2}
        truth = first(dataset, "instance")
        assert truth.segments is not None
        assert truth.segments.segments == (Segment(1, 1),)
        expected = np.zeros((1, 4, 8), int)
        expected[0, 1:3, 2:6] = 1
        assert np.array_equal(truth.segments.layers, expected)
        empty = dataset.read(dataset.split("train")[1], {"instance"})[1]
        assert empty.segments is not None
        assert empty.segments.segments == ()
        assert "photos without a label file have no objects: 2" in dataset.notes


def test_yolo_with_a_descriptor_of_ours(tmp_path: Path) -> None:
    yolo(tmp_path)
    (tmp_path / "data.yaml").unlink()
    (tmp_path / "dataset.yaml").write_text("names: {0: cat, 1: dog}\nbackground: none\nannotations: labels\n")
    dataset = open_dataset(tmp_path)
    assert dataset.tasks == {"instance", "panoptic", "semantic"}
    truth = first(dataset, "semantic")
    assert truth.class_ids is not None
    assert np.bincount(truth.class_ids.ravel()).tolist() == [0, 8, 24]
    (tmp_path / "dataset.yaml").unlink()
    with pytest.raises(InputError, match=r"dataset\.yaml: wanted names: of the classes, got none"):
        open_dataset(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"1 {SQUARE}\n7 {SQUARE}", r"a\.txt: line 2: wanted a class out of 0, 1, got 7; name it in .*data\.yaml"),
        ("1 0.5 0.5 0.2 0.2", r"a\.txt: line 1: wanted a class and three or more x y .* got '1 0\.5 .*not boxes"),
        ("1 0.5 0.5 0.2 0.2 0.1", r"a\.txt: line 1: wanted a class and three or more"),
        ("dog 1 1 0 0 1 0", r"a\.txt: line 1: wanted a class and three or more"),
        ("1 100 100 200 200 100 200", r"as shares of the size \(0\.\.1\)"),
    ],
)
def test_yolo_lines_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        first(open_dataset(yolo(tmp_path, text)), "instance")
    assert isinstance(caught.value, UnknownLabelError) == ("out of 0, 1" in message)


def test_yolo_folders_that_are_not_there(tmp_path: Path) -> None:
    yolo(tmp_path)
    (tmp_path / "data.yaml").write_text("train: photos\nval: images/val\nnames: [cat]\n")
    with pytest.raises(InputError, match=r"data\.yaml: train: wanted a folder of photos below .*, got 'photos'"):
        open_dataset(tmp_path)
    yolo(tmp_path)
    (tmp_path / "labels").rename(tmp_path / "texts")
    with pytest.raises(InputError, match=r"wanted labels as labels/\.\.\./NAME\.txt, got none for any of 4 photos"):
        open_dataset(tmp_path)


def test_check_sees_yolo_objects_twice(tmp_path: Path) -> None:
    report = check(yolo(tmp_path, f"0 {SQUARE}\n1 {SQUARE}\n0 {SQUARE}\n"))
    twice = [problem.text for problem in report.problems if problem.kind is ProblemKind.TWICE]
    assert len(twice) == 2
    assert twice[0].endswith("a: annotations 1 and 3 cover the same pixels")
    assert ProblemKind.LEAK in {problem.kind for problem in report.problems}
