from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from denselab.classes import STREET, Classes
from denselab.drawing import Tag, blend, canvas, contact_sheet, legend, oklab, overlay, segments_overlay, shades
from denselab.drawing.depth import depth_overlay, scale_bar, ticks
from denselab.drawing.normals import normals_overlay
from denselab.errors import InputError
from denselab.results import DepthMap, InstanceSet, NormalMap, PanopticMap, Result, SemanticMap
from denselab.rle import encode
from denselab.segments import Segment

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


def one_of_each(hw: tuple[int, int]) -> list[Result]:
    ones = np.ones(hw, np.float32)
    return [
        SemanticMap(np.zeros(hw, np.uint8), STREET),
        PanopticMap(np.ones(hw, np.int32), (Segment(1, 8),), STREET),
        InstanceSet((encode(ones > 0),), np.array([8], np.int32), np.array([0.9], np.float32), hw, STREET),
        DepthMap(3 * ones, ones > 0),
        DepthMap(0 * ones, ones < 0),
        NormalMap(np.stack([ones, 0 * ones, 0 * ones], axis=-1)),
    ]


@pytest.mark.parametrize("hw", [(1, 1), (1, 500), (500, 1), (7, 30)])
def test_overlays_of_tiny_pictures(hw: tuple[int, int]):
    for result in one_of_each(hw):
        picture = result.overlay(np.zeros((*hw, 3), np.uint8))
        assert picture.width >= hw[1]
        assert picture.height > hw[0]
        assert result.overlay(np.zeros((*hw, 3), np.uint8), legend=False).size == hw[::-1]


def test_overlays_refuse_another_size():
    for result in one_of_each((2, 3)):
        with pytest.raises(InputError, match=r"image: wanted uint8 \[2, 3, 3\] like the labels, got uint8 \[3, 2, 3\]"):
            result.overlay(np.zeros((3, 2, 3), np.uint8))


def test_segments_have_their_shades_and_thin_lines():
    """Left object, right object, stuff below; each keeps its shade, one white line lies between them."""
    slots = np.array([[1, 1, 1, 2, 2, 2]] * 3 + [[3] * 6] * 2 + [[0] * 6])
    image = np.zeros((6, 6, 3), np.uint8)
    colours = [(100, 0, 0), (0, 100, 0), (0, 0, 200)]
    drawn = np.asarray(segments_overlay(image, (6, 6), lambda rows: slots[rows], colours, opacity=0.5))
    assert drawn[0].tolist() == [[50, 0, 0]] * 2 + [drawn[0, 2].tolist()] + [[0, 50, 0]] * 3
    assert drawn[3].tolist() == [[0, 0, 100]] * 6
    assert drawn[5].tolist() == [[0, 0, 0]] * 6
    lines = np.zeros((6, 6), bool)
    lines[:3, 2] = lines[2] = lines[4] = True
    assert np.array_equal(drawn.min(axis=2) > 100, lines)


def test_lines_do_not_depend_on_bands(monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(0)
    hw = (1400, 1500)  # lines of 2 px
    slots = rng.integers(0, 4, (14, 15)).repeat(100, 0).repeat(100, 1)
    image = rng.integers(0, 256, (*hw, 3), np.uint8)
    colours = [(100, 0, 0), (0, 100, 0), (0, 0, 200)]
    whole, banded = (
        segments_overlay(image, hw, lambda rows: slots[rows], colours)
        for _ in (monkeypatch.setattr(canvas, "_PIXELS_PER_BAND", pixels) for pixels in (1 << 30, 50 * 1500))
    )
    assert np.array_equal(whole, banded)


def test_shades_differ_and_begin_with_the_class():
    colours = shades([1, 0, 1, 1, 0, 1, 1, 1], TWO)
    assert colours[0] == TWO.colours[1]
    assert colours[1] == TWO.colours[0]
    assert len(set(colours)) == len(colours)
    assert shades([0] * 30, STREET) == shades([0] * 30, STREET)


def test_oklab_by_published_values():
    """White, black, and red as CSS Color 4 gives it: oklab(0.628 0.225 0.126)."""
    lab = oklab.from_rgb(np.array([[255, 255, 255], [0, 0, 0], [255, 0, 0]], np.uint8))
    assert lab == pytest.approx(np.array([[1, 0, 0], [0, 0, 0], [0.628, 0.225, 0.126]]), abs=1e-3)
    every = np.random.default_rng(0).integers(0, 256, (500, 3), np.uint8)
    assert np.array_equal(oklab.to_rgb(oklab.from_rgb(every)), every)


def test_the_colour_map_rises_in_equal_steps():
    lightness = oklab.from_rgb(oklab.colour_map())[:, 0]
    steps = np.diff(lightness)
    assert (steps > 0).all()
    assert lightness[0] < 0.3
    assert lightness[-1] > 0.9
    coarse = np.diff(lightness[::17])
    assert coarse.max() / coarse.min() < 1.1


def test_near_is_light_and_unknown_is_the_image():
    image = np.full((1, 5, 3), 90, np.uint8)
    metres = np.array([[1, 2, 4, 100, 0]], np.float32)
    drawn = np.asarray(depth_overlay(image, (1, 5), lambda rows: metres[rows], (1, 4), legend=False, opacity=1))[0]
    lightness = oklab.from_rgb(drawn)[:, 0]
    assert lightness[0] > lightness[1] > lightness[2]
    assert lightness[1] == pytest.approx((lightness[0] + lightness[2]) / 2, abs=0.01)  # 2 m is half way, in logs
    assert drawn[3].tolist() == drawn[2].tolist()
    assert drawn[4].tolist() == [90, 90, 90]


def test_ticks_are_round():
    assert ticks((3, 60)) == [5, 10, 20, 50]
    assert ticks((0.2, 1)) == [0.2, 0.5, 1]
    assert ticks((6, 9)) == pytest.approx([6, 6.868, 7.862, 9], abs=1e-3)
    for width_px in (30, 480, 3000):
        assert scale_bar((0.3, 400), width_px, 12).width >= width_px


def test_a_scale_without_a_unit_has_other_marks():
    metres, words = (np.asarray(scale_bar((1, 4), 300, 12, metric)) for metric in (True, False))
    assert metres.shape == words.shape
    assert (metres[:16] == words[:16]).all()  # the colours
    assert (metres != words).any()


def test_normals_by_hand():
    image = np.full((1, 2, 3), 50, np.uint8)
    normals = np.array([[[0, 0, -1], [0, 0, 0]]], np.float32)
    drawn = normals_overlay(image, (1, 2), lambda rows: normals[rows], legend=False, opacity=0.5)
    assert np.asarray(drawn).tolist() == [[[89, 89, 25], [50, 50, 50]]]  # half of (128, 128, 0)


def test_tags_never_cover_each_other():
    """Thirty objects at one place: some tags are drawn, apart from each other; a speck has none."""
    image = np.zeros((300, 400, 3), np.uint8)
    slots = np.zeros((300, 400), np.uint8)
    colours = [(200, i, 10) for i in range(31)]
    tags = [Tag(f"object {i}", colours[i], (100, 100, 250, 200)) for i in range(30)]
    tags.append(Tag("speck", colours[30], (300, 20, 304, 24)))
    drawn = np.asarray(segments_overlay(image, (300, 400), lambda rows: slots[rows], colours, tags)).astype(int)
    seen = [i for i in range(31) if (drawn == colours[i]).all(axis=2).any()]
    assert 4 <= len(seen) <= 6
    assert 0 in seen
    assert 30 not in seen
    areas = [(drawn == colours[i]).all(axis=2).sum() for i in seen]
    assert min(areas) > 0.9 * max(areas)


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
