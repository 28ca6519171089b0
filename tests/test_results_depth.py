import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from denselab.data.scenes import render_scene
from denselab.depth_unit import DepthUnit
from denselab.errors import InputError
from denselab.results import DepthMap, NormalMap

METRES = np.array([[1.5, 0, 70], [0.0001, 2, 3]], np.float32)


def depth(metres: np.ndarray = METRES, **more: object) -> DepthMap:
    return DepthMap(metres, metres > 0, **more)


def test_millimetres_by_hand(tmp_path: Path) -> None:
    """1.5 m is 1500; unknown 0; 70 m saturates; what is known but less than half a millimetre does not become 0."""
    depth().save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.mode == "I;16"
        assert np.asarray(picture).tolist() == [[1500, 0, 65535], [1, 2000, 3000]]
    depth().save(tmp_path / "a.npy")
    assert np.array_equal(np.load(tmp_path / "a.npy"), METRES)
    assert np.asarray(depth()).dtype == np.float32


def test_figures(tmp_path: Path) -> None:
    metres = np.arange(1, 102, dtype=np.float32)[None]
    depth(metres, model="m", timing_ms={"engine": 1.0}).save(tmp_path / "a.json")
    figures = json.loads((tmp_path / "a.json").read_text())
    assert figures == {
        "task": "depth",
        "model": "m",
        "width": 101,
        "height": 1,
        "metres": {"near": 3.0, "median": 51.0, "far": 99.0},
        "percentiles": {"near": 2, "median": 50, "far": 98},
        "known_share": 1.0,
        "labels": {"metres_per_unit": 0.001, "unknown": 0, "saturates_at_m": 65.535},
        "timing_ms": {"engine": 1.0},
    }
    assert depth(np.zeros((2, 2), np.float32)).to_dict()["metres"] == {}


def test_relative_depth_is_in_no_unit() -> None:
    """The PNG holds 65535 * nearest / depth."""
    values = np.array([[0.002, 0.004, 0], [1, 900, 0.002]], np.float32)
    result = depth(values, unit=DepthUnit.RELATIVE, model="m")
    assert result.depth.tolist() == np.asarray(result).tolist() == values.tolist()
    with pytest.raises(InputError, match="metres: wanted depth in metres, got the relative depth of m; take `depth`"):
        _ = result.metres
    assert np.asarray(result.to_image()).tolist() == [[65535, 32768, 0], [131, 1, 65535]]
    figures = result.to_dict()
    assert "metres" not in figures
    assert figures["relative"]["near"] == pytest.approx(0.002)
    assert figures["labels"] == {"code": "inverse depth", "nearest": 65535, "unknown": 0}
    nothing = depth(np.zeros((2, 2), np.float32), unit=DepthUnit.RELATIVE)
    assert not np.asarray(nothing.to_image()).any()
    assert nothing.to_dict()["relative"] == {}
    image = np.zeros((2, 300, 3), np.uint8)
    metres, words = (np.asarray(depth(np.full((2, 300), 2, np.float32), unit=u).overlay(image)) for u in DepthUnit)
    assert metres.shape == words.shape
    assert (metres != words).any()


def test_what_is_not_valid_is_unknown() -> None:
    metres = np.array([[1, np.nan, -3]], np.float32)
    result = DepthMap(metres, np.array([[True, False, False]]))
    assert result.metres.tolist() == [[1, 0, 0]]
    assert result.valid.tolist() == [[True, False, False]]


def test_seen_small() -> None:
    result = depth(np.array([[0, 4]], np.float32), source_hw=(2, 4))
    assert result.hw == (2, 4)
    assert result.metres.tolist() == [[0, 0, 4, 4]] * 2
    assert result.valid.tolist() == [[False, False, True, True]] * 2
    assert np.asarray(result.to_image()).tolist() == [[0, 0, 4000, 4000]] * 2


@pytest.mark.parametrize(
    ("metres", "valid", "text"),
    [
        (
            METRES.astype(np.float64),
            METRES > 0,
            r"metres: wanted float32 \[H, W\] with H, W >= 1, got float64 \[2, 3\]",
        ),
        (METRES[:0], METRES[:0] > 0, r"got float32 \[0, 3\]"),
        (METRES, METRES, r"valid: wanted bool \[2, 3\], got float32 \[2, 3\]"),
        (METRES, METRES[:1] > 0, r"valid: wanted bool \[2, 3\], got bool \[1, 3\]"),
        (METRES, METRES >= 0, "metres: wanted finite depths above 0 where valid"),
        (np.array([[np.inf]], np.float32), np.array([[True]]), "wanted finite depths above 0"),
    ],
)
def test_depth_refusals(metres: np.ndarray, valid: np.ndarray, text: str) -> None:
    with pytest.raises(InputError, match=text):
        DepthMap(metres, valid)


def test_normal_png_is_coded_as_rendered_data(tmp_path: Path) -> None:
    vectors = np.array([[[1, 0, 0], [0, -1, 0], [0, 0, 0]]], np.float32)
    result = NormalMap(vectors, "m")
    result.save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert np.asarray(picture).tolist() == [[[255, 128, 128], [128, 0, 128], [0, 0, 0]]]
    result.save(tmp_path / "a.npy")
    assert np.array_equal(np.load(tmp_path / "a.npy"), vectors)
    figures = result.to_dict()
    assert figures["known_share"] == pytest.approx(2 / 3)
    assert figures["labels"] == {
        "normal": "rgb / 127.5 - 1",
        "axes": "x right, y down, z forward",
        "unknown": [0, 0, 0],
    }


def test_normals_seen_small() -> None:
    result = NormalMap(np.array([[[1, 0, 0], [0, 0, 0]]], np.float32), source_hw=(3, 4))
    assert result.hw == (3, 4)
    assert result.xyz.tolist() == [[[1, 0, 0]] * 2 + [[0, 0, 0]] * 2] * 3


@pytest.mark.parametrize(
    ("normals", "text"),
    [
        (np.zeros((2, 3)), r"xyz: wanted float32 \[H, W, 3\] with H, W >= 1, got float64 \[2, 3\]"),
        (np.zeros((2, 3, 2), np.float32), r"got float32 \[2, 3, 2\]"),
        (np.ones((2, 3, 3), np.float32), "wanted unit vectors, or zeros where unknown, got other lengths; normalise"),
        (np.full((2, 3, 3), np.nan, np.float32), "wanted unit vectors"),
    ],
)
def test_normal_refusals(normals: np.ndarray, text: str) -> None:
    with pytest.raises(InputError, match=text):
        NormalMap(normals)


def test_a_rendered_scene_survives() -> None:
    scene = render_scene(1, (60, 80))
    result = DepthMap(scene.depth_m, scene.valid)
    near = scene.valid & (scene.depth_m < 65)
    read = np.asarray(result.to_image()) / 1000
    assert np.abs(read - scene.depth_m)[near].max() < 0.00051
    normals = np.asarray(NormalMap(scene.normals).to_image()) / 127.5 - 1
    cosine = (normals * scene.normals).sum(axis=2) / np.linalg.norm(normals, axis=2)
    assert np.degrees(np.arccos(cosine.clip(-1, 1)))[scene.valid].max() < 0.4
    for part in (result, NormalMap(scene.normals)):
        drawn = np.asarray(part.overlay(scene.image, legend=False))
        assert np.array_equal(drawn[~scene.valid], scene.image[~scene.valid])
        assert (drawn[scene.valid] != scene.image[scene.valid]).any(axis=1).mean() > 0.99
