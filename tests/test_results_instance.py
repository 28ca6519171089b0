import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from denselab.classes import Classes
from denselab.errors import InputError
from denselab.results import InstanceSet
from denselab.rle import Rle, encode, from_string

CLASSES = Classes(("car", "person"), ((0, 0, 140), (140, 0, 0)), things=(0, 1))
FRONT = np.array([[0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]], bool)
BEHIND = np.array([[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1]], bool)


def two(scores: tuple[float, float] = (0.25, 0.75)) -> InstanceSet:
    masks = (encode(BEHIND), encode(FRONT))
    return InstanceSet(masks, np.array([0, 1], np.int32), np.array(scores, np.float32), (3, 4), CLASSES, "m")


def nothing() -> InstanceSet:
    return InstanceSet((), np.zeros(0, np.int32), np.zeros(0, np.float32), (3, 4), CLASSES)


def test_the_surest_comes_first() -> None:
    result = two()
    assert result.scores.tolist() == [0.75, 0.25]
    assert result.class_ids.tolist() == [1, 0]
    assert [mask.tolist() for mask in result.decoded()] == [FRONT.tolist(), BEHIND.tolist()]
    assert np.asarray(result).tolist() == [[0, 1, 1, 2], [0, 1, 1, 2], [0, 0, 2, 2]]
    assert len(result) == 2
    assert two((0.5, 0.5)).class_ids.tolist() == [0, 1]  # a tie stays as it was
    assert result.above(0.25).class_ids.tolist() == [1, 0]
    assert result.above(0.26).class_ids.tolist() == [1]
    assert len(result.above(0.8)) == 0


def test_figures_by_hand(tmp_path: Path) -> None:
    result = two()
    assert result.boxes == ((1, 0, 3, 2), (2, 0, 4, 3))
    result.save(tmp_path / "a.json")
    figures = json.loads((tmp_path / "a.json").read_text())
    assert figures["classes"] == [
        {"id": 0, "name": "car", "colour": [0, 0, 140], "instances": 1},
        {"id": 1, "name": "person", "colour": [140, 0, 0], "instances": 1},
    ]
    first, second = figures["instances"]
    # down the columns: 3 zeros and 2 ones, 1 zero, 2 ones, 4 zeros
    assert first == {
        "id": 1,
        "category_id": 1,
        "category": "person",
        "score": 0.75,
        "area": 4,
        "bbox": [1, 0, 2, 2],
        "segmentation": {"size": [3, 4], "counts": encode(FRONT).to_string()},
    }
    assert (second["id"], second["area"], second["bbox"]) == (2, 6, [2, 0, 2, 3])


def test_coco_reads_the_masks() -> None:
    for entry, mask in zip(two().to_dict()["instances"], (FRONT, BEHIND), strict=True):
        segmentation = entry["segmentation"]
        assert segmentation["counts"] == coco.encode(np.asfortranarray(mask, np.uint8))["counts"].decode()
        assert coco.toBbox(segmentation).tolist() == entry["bbox"]
        assert coco.area(segmentation) == entry["area"]
        assert from_string(segmentation["counts"], (3, 4)).counts.tolist() == encode(mask).counts.tolist()


def test_label_png_holds_numbers(tmp_path: Path) -> None:
    hw = (20, 300)
    masks = tuple(encode(np.eye(1, 6000, index).reshape(hw).astype(bool)) for index in range(300))
    scores = np.linspace(1, 0.5, 300, dtype=np.float32)
    result = InstanceSet(masks, np.zeros(300, np.int32), scores, hw, CLASSES)
    result.save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.mode == "I;16"
        assert np.asarray(picture)[0].tolist() == list(range(1, 301))
        assert not np.asarray(picture)[1:].any()


def test_segments_for_metrics() -> None:
    segments = two().to_segments()
    assert [(s.id, s.class_id, s.score) for s in segments.segments] == [(1, 1, 0.75), (2, 0, 0.25)]
    assert [mask.tolist() for mask in segments.masks()] == [FRONT.tolist(), BEHIND.tolist()]
    assert nothing().to_segments().hw == (3, 4)


def test_nothing_found() -> None:
    result = nothing()
    assert result.to_dict()["instances"] == []
    assert not np.asarray(result).any()
    image = np.full((3, 4, 3), 9, np.uint8)
    assert (np.asarray(result.overlay(image, legend=False)) == 9).all()
    assert np.asarray(result.overlay(image))[:3, :4].tolist() == image.tolist()


def test_only_the_sure_are_drawn() -> None:
    image = np.zeros((3, 4, 3), np.uint8)
    drawn = np.asarray(two().overlay(image, legend=False)).any(axis=2)
    assert np.array_equal(drawn & FRONT, FRONT)
    assert not drawn[2, 3]
    assert np.asarray(two().overlay(image, legend=False, score=0.1)).any(axis=2)[2, 3]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"class_ids": np.zeros(2, np.int64)}, r"class_ids: wanted int32 \[2\], one for each mask, got int64 \[2\]"),
        ({"scores": np.zeros(3, np.float32)}, r"scores: wanted float32 \[2\], one for each mask, got float32 \[3\]"),
        ({"class_ids": np.array([0, 2], np.int32)}, r"class_ids: wanted 0..1, got \[2\]"),
        ({"scores": np.array([0.5, 1.5], np.float32)}, r"scores: wanted 0..1, got 0.5..1.5"),
        ({"scores": np.array([0.5, np.nan], np.float32)}, r"scores: wanted 0..1"),
        ({"masks": (encode(FRONT), Rle((2, 2), np.array([4])))}, r"masks: wanted the size \(3, 4\), got \(2, 2\)"),
    ],
)
def test_refusals(changes: dict, text: str) -> None:
    given = {
        "masks": (encode(FRONT), encode(BEHIND)),
        "class_ids": np.zeros(2, np.int32),
        "scores": np.ones(2, np.float32),
    }
    with pytest.raises(InputError, match=text):
        InstanceSet(**{**given, **changes}, size_hw=(3, 4), classes=CLASSES)
