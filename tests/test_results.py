import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from denselab.classes import STREET, VOID, Classes
from denselab.errors import InputError
from denselab.results import SemanticMap

TWO = Classes(("sky", "Gebäude"), ((10, 20, 30), (40, 50, 60)))
IDS = np.array([[0, 0, 1], [1, 1, 255]], np.uint8)


def test_counts_and_shares_by_hand():
    result = SemanticMap(IDS, TWO)
    assert result.pixel_counts().tolist() == [2, 3]
    assert result.shares().tolist() == [2 / 6, 3 / 6]
    nothing = SemanticMap(np.full((2, 2), 255, np.uint8), TWO)
    assert nothing.shares().tolist() == [0, 0]


def test_counts_equal_numpy_over_bands():
    ids = np.random.default_rng(0).integers(0, 11, (1300, 1700), np.uint8)
    assert SemanticMap(ids, STREET).pixel_counts().tolist() == [int((ids == i).sum()) for i in range(11)]


@pytest.mark.parametrize(
    ("ids", "void", "text"),
    [
        (IDS.astype(np.int64), VOID, r"wanted uint8 \[H, W\] with H, W >= 1, got int64 \[2, 3\]"),
        (IDS[None], VOID, r"got uint8 \[1, 2, 3\]"),
        (IDS[:0], VOID, r"got uint8 \[0, 3\]"),
        (IDS + np.uint8(1), VOID, r"wanted 0..1 or void 255, got \[2\]"),
        (IDS, 1, r"void: wanted an id in 2..255 that is no class, got 1"),
        (IDS, 2, r"wanted 0..1 or void 2, got \[255\]"),
    ],
)
def test_wrong_ids_are_refused(ids: np.ndarray, void: int, text: str):
    with pytest.raises(InputError, match=text):
        SemanticMap(ids, TWO, void)


def test_label_png_holds_the_ids(tmp_path: Path):
    SemanticMap(IDS, TWO).save(tmp_path / "labels.png")
    data = (tmp_path / "labels.png").read_bytes()
    assert struct.unpack(">IIBB", data[16:26]) == (3, 2, 8, 3)  # 3x2, 8 bits, colour type 3: palette
    at, chunks = 8, {}
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        chunks[data[at + 4 : at + 8]] = data[at + 8 : at + 8 + length]
        at += 12 + length
    assert zlib.decompress(chunks[b"IDAT"]) == b"\0\0\0\1" + b"\0\1\1\xff"  # filter byte, then ids
    palette = np.frombuffer(chunks[b"PLTE"], np.uint8).reshape(-1, 3)
    assert palette[[0, 1, 255]].tolist() == [[10, 20, 30], [40, 50, 60], [0, 0, 0]]


def test_save_and_convert(tmp_path: Path):
    result = SemanticMap(IDS, TWO, model="m", timing_ms={"engine": 1.23456})
    result.save(str(tmp_path / "a.npy"))
    assert np.array_equal(np.load(tmp_path / "a.npy"), IDS)
    assert np.array_equal(np.asarray(result), IDS)
    assert np.array(result, dtype=np.int32).dtype == np.int32
    result.save(tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text("utf-8")) == {
        "task": "semantic",
        "model": "m",
        "width": 3,
        "height": 2,
        "classes": [
            {"id": 0, "name": "sky", "colour": [10, 20, 30], "pixels": 2, "share": 2 / 6},
            {"id": 1, "name": "Gebäude", "colour": [40, 50, 60], "pixels": 3, "share": 0.5},
        ],
        "void": {"id": 255, "pixels": 1, "share": 1 / 6},
        "timing_ms": {"engine": 1.235},
    }
    with pytest.raises(InputError, match=r"a\.tif: wanted a name that ends in \.png or \.npy"):
        result.save(tmp_path / "a.tif")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.npy"]


def test_overlay_refuses_another_size():
    with pytest.raises(InputError, match=r"image: wanted uint8 \[2, 3, 3\] like the labels, got uint8 \[3, 2, 3\]"):
        SemanticMap(IDS, TWO).overlay(np.zeros((3, 2, 3), np.uint8))


def test_camvid_labels_survive(camvid: Path, tmp_path: Path):
    path = sorted((camvid / "labels" / "test").glob("*.png"))[0]
    with Image.open(path) as picture:
        truth = np.array(picture)
    result = SemanticMap(truth, STREET, void=11)
    result.save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.mode == "P"
        assert np.array_equal(np.asarray(picture), truth)


def test_named_classes():
    many = Classes.named([f"class {i}" for i in range(255)])
    assert len(many) == len(set(many.colours)) == 255
    assert many == Classes.named(many.names)
    assert Classes.from_dict(many.to_dict()) == many
    assert Classes.from_dict({"names": ["a", "b"]}) == Classes.named(["a", "b"])


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ({"names": []}, "wanted 1 to 255 names .*, got 0"),
        ({"names": [str(i) for i in range(256)]}, "got 256"),
        ({"names": ["a", "a"]}, "wanted distinct names, got a more than once"),
        ({"names": ["a"], "colours": []}, "wanted one colour per name, got 1 names and 0 colours"),
        ({"names": ["a"], "colours": [[0, 0, 256]]}, r"colour of a: wanted .* in 0..255, got \[0, 0, 256\]"),
        ({"names": ["a"], "colours": [[0, 0]]}, "wanted .*colours.*, got"),
        ({"colours": []}, "wanted .*names.*, got"),
    ],
)
def test_wrong_classes_are_refused(data: dict, text: str):
    with pytest.raises(InputError, match=text):
        Classes.from_dict(data)
