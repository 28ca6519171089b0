import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from denselab.classes import Classes
from denselab.errors import InputError
from denselab.results import PanopticMap
from denselab.segments import Segment

CLASSES = Classes(("road", "car"), ((90, 60, 90), (0, 0, 140)), things=(1,))
IDS = np.array([[1, 1, 7, 7], [1, 0, 7, 66000], [1, 1, 1, 66000]], np.int32)
SEGMENTS = (Segment(1, 0, 0.75), Segment(7, 1, 0.5), Segment(66000, 1, 1.0, is_crowd=True))


def test_figures_by_hand() -> None:
    result = PanopticMap(IDS, SEGMENTS, CLASSES, "m", {"engine": 2.0})
    assert result.areas_px().tolist() == [6, 3, 2]
    assert result.boxes() == ((0, 0, 3, 3), (2, 0, 4, 2), (3, 1, 4, 3))
    assert result.to_dict() == {
        "task": "panoptic",
        "model": "m",
        "width": 4,
        "height": 3,
        "classes": [
            {"id": 0, "name": "road", "colour": [90, 60, 90], "isthing": 0, "segments": 1, "pixels": 6, "share": 0.5},
            {"id": 1, "name": "car", "colour": [0, 0, 140], "isthing": 1, "segments": 2, "pixels": 5, "share": 5 / 12},
        ],
        "void": {"id": 0, "pixels": 1, "share": 1 / 12},
        "segments_info": [
            {"id": 1, "category_id": 0, "category": "road", "isthing": 0, "iscrowd": 0, "area": 6}
            | {"bbox": [0, 0, 3, 3], "score": 0.75},
            {"id": 7, "category_id": 1, "category": "car", "isthing": 1, "iscrowd": 0, "area": 3}
            | {"bbox": [2, 0, 2, 2], "score": 0.5},
            {"id": 66000, "category_id": 1, "category": "car", "isthing": 1, "iscrowd": 1, "area": 2}
            | {"bbox": [3, 1, 1, 2], "score": 1.0},
        ],
        "timing_ms": {"engine": 2.0},
    }


def test_png_is_coded_as_coco_codes_it(tmp_path: Path) -> None:
    PanopticMap(IDS, SEGMENTS, CLASSES).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        rgb = np.array(picture).astype(np.int64)
    assert rgb[1, 3].tolist() == [66000 % 256, 66000 // 256 % 256, 1]
    assert np.array_equal(rgb @ [1, 256, 65536], IDS)


def test_other_files(tmp_path: Path) -> None:
    result = PanopticMap(IDS, SEGMENTS, CLASSES)
    result.save(tmp_path / "a.npy")
    assert np.array_equal(np.load(tmp_path / "a.npy"), IDS)
    assert np.asarray(result).dtype == np.int32
    result.save(tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text()) == result.to_dict()


def test_views() -> None:
    result = PanopticMap(IDS, SEGMENTS, CLASSES, "m", {"total": 1.0})
    semantic = result.semantic()
    assert semantic.class_ids.tolist() == [[0, 0, 1, 1], [0, 255, 1, 1], [0, 0, 0, 1]]
    assert (semantic.model, semantic.timing_ms) == ("m", {"total": 1.0})
    assert result.mask(SEGMENTS[1]).sum() == 3
    segments = result.to_segments()
    assert np.array_equal(segments.layers, IDS[None])
    assert segments.segments == SEGMENTS


def test_figures_of_what_was_seen_small_are_those_of_the_large() -> None:
    """Every figure of an enlarged map, counted without enlarging it, against the enlarged map as its own."""
    rng = np.random.default_rng(0)
    cells = rng.integers(0, 6, (9, 13), dtype=np.int32)
    cells[4:] //= 2
    segments = tuple(Segment(number, number % 2) for number in range(1, 7))  # 6 has no pixels
    small = PanopticMap(cells, segments, CLASSES, source_hw=(31, 40))
    assert small.ids.shape == small.hw == (31, 40)
    large = PanopticMap(small.ids, segments, CLASSES)
    assert small.to_dict() == large.to_dict()
    assert np.array_equal(small.to_image(), large.to_image())
    assert np.array_equal(small.semantic().class_ids, large.semantic().class_ids)
    for segment, area, (x0, y0, x1, y1) in zip(segments, large.areas_px(), large.boxes(), strict=True):
        runs = coco.encode(np.asfortranarray(large.ids == segment.id, np.uint8))
        assert (coco.toBbox(runs).tolist(), coco.area(runs)) == ([x0, y0, x1 - x0, y1 - y0], area)
    image = rng.integers(0, 256, (31, 40, 3), np.uint8)
    assert np.array_equal(small.overlay(image), large.overlay(image))


def test_all_void_and_one_pixel() -> None:
    result = PanopticMap(np.zeros((1, 1), np.int32), (), CLASSES)
    assert result.to_dict()["void"]["share"] == 1
    assert result.to_dict()["segments_info"] == []
    assert result.semantic().class_ids.tolist() == [[255]]
    image = np.full((1, 1, 3), 77, np.uint8)
    assert np.asarray(result.overlay(image, legend=False)).tolist() == [[[77, 77, 77]]]


@pytest.mark.parametrize(
    ("ids", "segments", "text"),
    [
        (IDS.astype(np.int64), SEGMENTS, r"ids: wanted int32 \[H, W\] with H, W >= 1, got int64 \[3, 4\]"),
        (IDS[:0], SEGMENTS, r"got int32 \[0, 4\]"),
        (IDS, SEGMENTS[:2], r"ids: wanted 0 \(void\) or the id of a segment, got \[66000\]"),
        (-IDS, SEGMENTS, r"got \[-66000, -7, -1\]"),
        (IDS, (*SEGMENTS, Segment(7, 0)), r"wanted distinct ids in 1..16777215, got \[1, 7, 7, 66000\]"),
        (IDS, (*SEGMENTS, Segment(1 << 24, 0)), "wanted distinct ids in 1..16777215"),
        (IDS, (*SEGMENTS, Segment(8, 2)), "wanted a class in 0..1 for segment 8, got 2"),
    ],
)
def test_refusals(ids: np.ndarray, segments: tuple[Segment, ...], text: str) -> None:
    with pytest.raises(InputError, match=text):
        PanopticMap(ids, segments, CLASSES)
