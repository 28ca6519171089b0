"""Enlarging against Pillow, runs against whole masks and pycocotools."""

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from denselab.errors import InputError
from denselab.results.enlarge import image_hw, linear, linear_depth, linear_unit, nearest
from denselab.results.runs import box, crop, enlarged
from denselab.rle import encode

SIZES = [((4, 6), (4, 6)), ((4, 6), (8, 12)), ((5, 7), (13, 30)), ((1, 1), (3, 2)), ((3, 1), (3, 9)), ((6, 5), (7, 6))]


def resized(cells: np.ndarray, hw: tuple[int, int], how: Image.Resampling) -> np.ndarray:
    return np.array(Image.fromarray(cells).resize(hw[::-1], how))


@pytest.mark.parametrize(("small", "large"), SIZES)
def test_nearest_equals_pillow(small: tuple[int, int], large: tuple[int, int]) -> None:
    cells = np.random.default_rng(0).integers(0, 99, small, dtype=np.int32)
    wanted = resized(cells, large, Image.Resampling.NEAREST)
    assert np.array_equal(nearest(cells, large), wanted)
    for top in range(large[0]):
        assert np.array_equal(nearest(cells, large, slice(top, top + 2)), wanted[top : top + 2])


@pytest.mark.parametrize(("small", "large"), SIZES)
def test_linear_equals_pillow(small: tuple[int, int], large: tuple[int, int]) -> None:
    cells = np.random.default_rng(0).normal(size=(*small, 2)).astype(np.float32)
    got = linear(cells, large)
    assert got.dtype == np.float32
    for channel in range(2):
        wanted = resized(np.ascontiguousarray(cells[:, :, channel]), large, Image.Resampling.BILINEAR)
        assert got[:, :, channel] == pytest.approx(wanted, abs=1e-5)
    for top in range(large[0]):
        assert np.array_equal(linear(cells, large, slice(top, top + 2)), got[top : top + 2])


def test_linear_by_hand() -> None:
    """Two cells over four pixels: centres at 0.5 and 2.5, so pixels 1 and 2 lie a quarter from either."""
    assert linear(np.array([[0, 4]], np.float32), (1, 4)).tolist() == [[0, 1, 3, 4]]


def test_unknown_depth_mixes_into_nothing() -> None:
    cells, known = np.array([[2, 0, 4]], np.float32), np.array([[True, False, True]])
    assert linear_depth(cells, known, (1, 6)).tolist() == [[2, 2, 0, 0, 4, 4]]
    assert linear_depth(cells, known, (1, 3)).tolist() == [[2, 0, 4]]
    nothing = linear_depth(cells, np.zeros((1, 3), bool), (2, 6))
    assert nothing.tolist() == [[0] * 6] * 2


def test_normals_stay_unit_vectors() -> None:
    cells = np.array([[[1, 0, 0], [0, 0, -1]]], np.float32)
    got = linear_unit(cells, (1, 4))[0]
    # a quarter of the way from one to the other: (3, 0, -1) / sqrt(10)
    assert got[1] == pytest.approx(np.array([3, 0, -1]) / np.sqrt(10), abs=1e-6)
    assert np.linalg.norm(got, axis=1) == pytest.approx(1, abs=1e-6)
    opposite = np.array([[[1, 0, 0], [-1, 0, 0]]], np.float32)
    assert np.linalg.norm(linear_unit(opposite, (1, 3)), axis=2) == pytest.approx(1)
    half_known = np.array([[[0, 0, 0], [0, 1, 0]]], np.float32)
    assert linear_unit(half_known, (1, 4))[0].tolist() == [[0, 0, 0], [0, 0, 0], [0, 1, 0], [0, 1, 0]]


def test_results_do_not_shrink() -> None:
    assert image_hw((4, 6, 3), None) == (4, 6)
    assert image_hw((4, 6), (4, 7)) == (4, 7)
    with pytest.raises(InputError, match=r"source_hw: wanted at least .* \(4, 6\), got \(3, 99\)"):
        image_hw((4, 6), (3, 99))


MASKS = {
    "noise": np.random.default_rng(1).random((5, 7)) < 0.5,
    "blob": np.pad(np.ones((2, 3), bool), 2),
    "empty": np.zeros((4, 3), bool),
    "full": np.ones((4, 3), bool),
    "column": np.array([[False, True, False]] * 4),
    "across columns": np.array([[True, True], [True, False], [False, True]]),
    "corner": np.array([[False, False], [False, True]]),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_boxes_and_crops(mask: np.ndarray) -> None:
    x0, y0, x1, y1 = box(encode(mask))
    assert (x0, y0, x1, y1) == encode(mask).box()
    assert coco.toBbox(coco.encode(np.asfortranarray(mask, np.uint8))).tolist() == [x0, y0, x1 - x0, y1 - y0]
    rows, columns, inside = crop(encode(mask))
    assert np.array_equal(inside, mask[rows, columns])
    assert inside.sum() == mask.sum()


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("scale", [(1, 1), (2, 3), (1.7, 1.2), (4, 1)])
def test_enlarged_runs_are_runs_of_the_enlarged(mask: np.ndarray, scale: tuple[float, float]) -> None:
    hw = (round(mask.shape[0] * scale[0]), round(mask.shape[1] * scale[1]))
    wanted = encode(nearest(mask, hw))
    got = enlarged(mask, hw)
    assert got.hw == hw
    assert got.counts.tolist() == wanted.counts.tolist()
