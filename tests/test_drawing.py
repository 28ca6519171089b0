from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from denselab.classes import STREET, Classes
from denselab.drawing import blend, contact_sheet, legend, overlay
from denselab.results import SemanticMap

TWO = Classes(("a", "b"), ((200, 0, 100), (0, 255, 0)))


def test_blend_by_hand():
    image = np.full((1, 3, 3), 100, np.uint8)
    ids = np.array([[0, 1, 255]], np.uint8)
    # half and half: (100 + 200) / 2, (100 + 0) / 2, (100 + 100) / 2; void stays
    assert blend(image, ids, TWO, opacity=0.5).tolist() == [[[150, 50, 100], [50, 177, 50], [100, 100, 100]]]
    assert blend(image, ids, TWO, opacity=0).tolist() == image.tolist()
    assert blend(image, ids, TWO, opacity=1).tolist() == [[[200, 0, 100], [0, 255, 0], [100, 100, 100]]]


def test_blend_equals_pillow(camvid: Path):
    name = "0001TP_008550"
    with Image.open(camvid / "images/test" / f"{name}.jpg") as picture:
        image = np.array(picture)
    with Image.open(camvid / "labels/test" / f"{name}.png") as picture:
        ids = np.array(picture)
    ids[ids == 11] = 255
    mixed = Image.blend(Image.fromarray(image), SemanticMap(ids, STREET).to_image().convert("RGB"), 0.55)
    wanted = np.where((ids == 255)[:, :, None], image, np.asarray(mixed))
    assert np.abs(blend(image, ids, STREET).astype(int) - wanted).max() <= 1


def test_overlay_is_blend_with_a_legend_below():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (1200, 1000, 3), np.uint8)  # two bands
    ids = rng.integers(0, 2, (1200, 1000), np.uint8)
    with_legend = overlay(image, ids, TWO, np.array([0.5, 0.5]))
    assert with_legend.width == 1000
    assert with_legend.height > 1200
    assert np.array_equal(np.asarray(with_legend)[:1200], blend(image, ids, TWO))
    assert overlay(image, ids, TWO, None).size == (1000, 1200)


@pytest.mark.parametrize("hw", [(1, 1), (1, 500), (500, 1), (7, 30)])
def test_overlay_of_tiny_pictures(hw: tuple[int, int]):
    picture = SemanticMap(np.zeros(hw, np.uint8), STREET).overlay(np.zeros((*hw, 3), np.uint8))
    assert picture.width >= hw[1]
    assert picture.height > hw[0]


def colours_in_order(panel: Image.Image, classes: Classes) -> list[str]:
    """Names whose swatch is seen, reading columns left to right, each from the top."""
    packed = np.asarray(panel).astype(np.int32) @ [1 << 16, 1 << 8, 1]
    found, first = np.unique(packed.T, return_index=True)  # transposed: index runs down the columns
    places = dict(zip(found.tolist(), first.tolist(), strict=True))
    keys = {name: (r << 16) + (g << 8) + b for name, (r, g, b) in zip(classes.names, classes.colours, strict=True)}
    return sorted((name for name in keys if keys[name] in places), key=lambda name: places[keys[name]])


def test_legend_sorts_by_area_and_omits_specks():
    classes = Classes.named(["speck", "small", "large", "middle", "absent"])
    panel = legend(classes, np.array([0.0009, 0.001, 0.6, 0.3, 0.0]), 480)
    assert panel.width == 480
    assert colours_in_order(panel, classes) == ["large", "middle", "small"]
    assert legend(classes, np.zeros(5), 480).size == (480, 0)


def test_legend_fits_many_classes():
    classes = Classes.named([f"a class with a long name {i}" for i in range(150)])
    for width_px in (50, 480, 4000):
        panel = legend(classes, np.full(150, 1 / 150), width_px)
        assert len(colours_in_order(panel, classes)) == 150


def test_contact_sheet():
    red, wide = np.full((40, 40, 3), (255, 0, 0), np.uint8), Image.new("RGB", (200, 50), (0, 0, 255))
    sheet = contact_sheet([(red, "one"), (wide, "a caption that is far too long " * 9), (red, "")], 2, tile_px=100)
    pixels = np.asarray(sheet)
    assert 200 <= sheet.width <= 230
    assert (pixels == (255, 0, 0)).all(axis=2).sum() == 2 * 100 * 100
    assert (pixels == (0, 0, 255)).all(axis=2).sum() == 100 * 25
