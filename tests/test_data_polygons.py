"""Polygons against COCO's own rasteriser, and by hand."""

import numpy as np
import pytest

from denselab.data.polygons import polygons_mask


def test_squares_by_hand() -> None:
    square = np.array([[1, 1], [4, 1], [4, 3], [1, 3]], float)
    expected = np.zeros((5, 6), bool)
    expected[1:3, 1:4] = True
    assert np.array_equal(polygons_mask([square], (5, 6)), expected)
    hanging_over = square - [2, 2]
    assert np.argwhere(polygons_mask([hanging_over], (5, 6))).tolist() == [[0, 0], [0, 1]]
    assert not polygons_mask([square + 40], (5, 6)).any()
    assert not polygons_mask([], (5, 6)).any()


def test_parts_are_united_not_toggled() -> None:
    square = np.array([[1, 1], [4, 1], [4, 3], [1, 3]], float)
    assert polygons_mask([square, square], (5, 6)).sum() == 6


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools with numpy 2
@pytest.mark.parametrize("kind", ["any", "whole", "tenths", "hundredths"])
def test_every_pixel_as_pycocotools(kind: str) -> None:
    coco = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(len(kind))
    for _ in range(60):
        height, width = (int(side) for side in rng.integers(1, 70, 2))
        points = rng.uniform(-20, 90, (int(rng.integers(3, 14)), 2))
        points = points if kind == "any" else points.round({"whole": 0, "tenths": 1, "hundredths": 2}[kind])
        points = np.concatenate([points, points[-1:]])  # a corner twice, as annotation tools write it
        runs = coco.frPyObjects([points.ravel().tolist()], height, width)
        assert np.array_equal(polygons_mask([points], (height, width)), coco.decode(runs)[..., 0].astype(bool))
