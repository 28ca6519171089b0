"""Splits as a descriptor says, beside or outside of the data."""

from pathlib import Path

import numpy as np
import pytest

from denselab.data.descriptor import open_dataset
from denselab.errors import InputError
from tiny_data import photo, save, write_tiny


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """Ten pairs in one folder, 00 to 09."""
    for number in range(10):
        photo(tmp_path / f"data/images/{number:02d}.jpg", (2, 2), number)
        save(tmp_path / f"data/masks/{number:02d}.png", np.array([[0, 1], [1, 0]], np.uint8))
    return tmp_path


def names(root: Path, text: str) -> dict[str, str]:
    (root / "my.yaml").write_text(f"root: data\nnames: [a, b]\nsplits: {text}\n")
    splits = open_dataset(root / "my.yaml").splits
    return {split: " ".join(item.name for item in items) for split, items in splits.items()}


def test_ranges_in_the_order_of_names(flat: Path) -> None:
    found = names(flat, "{val: 4 to 5, test: last 20 %, train: first 3}")
    assert found == {"train": "00 01 02", "val": "03 04", "test": "08 09"}


def test_lists_of_names(flat: Path) -> None:
    (flat / "data/train.txt").write_text("03\n\n01.jpg\n05.png\n")
    assert names(flat, "{train: train.txt, val: ['07']}") == {"train": "03 01 05", "val": "07"}
    (flat / "beside.txt").write_text("02\n")
    assert names(flat, "{train: beside.txt, val: last 1}") == {"train": "02", "val": "09"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("first 3", r"splits: wanted a mapping of train, val, test to images, got 'first 3'"),
        ("{training: first 3}", r"splits: wanted train, val or test, got 'training'"),
        ("{train: first 30}", r"splits: wanted train out of 10 images, got 'first 30'"),
        ("{train: 3 to 2}", r"splits: wanted train out of 10 images"),
        ("{train: gone.txt}", r"splits: wanted a path in .*data, got 'gone\.txt'"),
        ("{train: ['33']}", r"splits: wanted names of images for train, such as 00, got \['33'\]"),
        ("{train: []}", r"splits: wanted names of images for train"),
        ("{train: first 3, val: 3 to 4}", r"splits: wanted every image in one split, got '02 in train and val'"),
    ],
)
def test_splits_that_cannot_be(flat: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        names(flat, text)


def test_split_folders_with_equal_names_cannot_be_shared_out_again(tmp_path: Path) -> None:
    write_tiny(tmp_path / "data")
    (tmp_path / "data/dataset.yaml").unlink()
    with pytest.raises(InputError, match=r"wanted images of distinct names, got 'split folders that share some"):
        names(tmp_path, "{train: first 3}")


def test_descriptor_outside_of_the_data(flat: Path) -> None:
    (flat / "my.yaml").write_text("root: nowhere\n")
    with pytest.raises(InputError, match=r"my\.yaml: root: wanted a data folder, got '.*nowhere'"):
        open_dataset(flat / "my.yaml")
    (flat / "my.yaml").write_text(f"root: {flat / 'data'}\nlayout: pascal\n")
    with pytest.raises(InputError, match=r"layout: wanted one of folders, coco_panoptic, .* got 'pascal'"):
        open_dataset(flat / "my.yaml")
