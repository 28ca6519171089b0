"""Tile plans worked by hand, and tiled runs against whole ones."""

from pathlib import Path

import numpy as np
import pytest

from block_network import block_artifact, noise
from denselab.errors import InputError
from denselab.runtime.session import OnnxRuntimeSession
from denselab.runtime.tiling import OVERLAP_PX, TILE_PX, WHOLE_PX, Span, Tile, run_tiled, tile_plan


def test_plan_by_hand() -> None:
    """100 px, tiles of 48 with 8 px overlap on a grid of 16: steps of 32, cuts 8 px after each start."""
    whole = Span(0, 30, 0, 30)
    columns = [Span(0, 48, 0, 40), Span(32, 80, 40, 72), Span(64, 100, 72, 100)]
    assert tile_plan((30, 100), 48, 8, 16) == [Tile(whole, column) for column in columns]


def test_tiles_of_a_plan_are_nearly_equal() -> None:
    """2000 px in tiles of at most 1024 needs three: 1744 px inside the overlaps, 592 (37 * 16) each, not 768."""
    rows = [tile.rows for tile in tile_plan((2000, 1), 1024, 128, 16)]
    assert rows == [Span(0, 848, 0, 720), Span(592, 1440, 720, 1312), Span(1184, 2000, 1312, 2000)]


@pytest.mark.parametrize("hw", [(1, 1), (47, 48), (48, 1)])
def test_an_image_within_a_tile_is_one_tile(hw: tuple[int, int]) -> None:
    assert tile_plan(hw, 48, 8, 16) == [Tile(Span(0, hw[0], 0, hw[0]), Span(0, hw[1], 0, hw[1]))]


def test_one_pixel_more_than_a_tile() -> None:
    assert [tile.rows for tile in tile_plan((49, 9), 48, 8, 16)] == [Span(0, 48, 0, 40), Span(32, 49, 40, 49)]


@pytest.mark.parametrize(("tile_px", "overlap_px", "multiple"), [(48, 8, 16), (100, 13, 7), (64, 0, 32), (33, 16, 1)])
def test_every_pixel_once_with_its_surroundings(tile_px: int, overlap_px: int, multiple: int) -> None:
    for length in range(1, 700):
        kept = np.zeros(length, int)
        for tile in tile_plan((length, 1), tile_px, overlap_px, multiple):
            span = tile.rows
            kept[span.keep_start : span.keep_stop] += 1
            assert span.start % multiple == 0
            assert span.stop - span.start <= tile_px
            assert span.keep_start < span.keep_stop
            assert span.start == 0 or span.keep_start - span.start >= overlap_px
            assert span.stop == length or span.stop - span.keep_stop >= overlap_px
        assert np.all(kept == 1)


def test_no_room_between_overlaps() -> None:
    with pytest.raises(InputError, match=r"tile_px: wanted 32 or more \(two overlaps \+ 16\), got 31"):
        tile_plan((99, 99), 31, 8, 16)


@pytest.mark.parametrize("hw", [(200, 301), (64, 64), (65, 63), (3, 500)])
def test_tiled_equals_whole_where_the_network_sees_less_than_the_overlap(tmp_path: Path, hw: tuple[int, int]) -> None:
    session = OnnxRuntimeSession(block_artifact(tmp_path / "blocks.onnx"), threads=1)
    image = noise(*hw)
    whole = session.run(image)["class_ids"]
    assert np.array_equal(run_tiled(session, image, multiple=8, tile_px=64, overlap_px=16), whole)


def test_without_overlap_it_would_not(tmp_path: Path) -> None:
    session = OnnxRuntimeSession(block_artifact(tmp_path / "blocks.onnx"), threads=1)
    image = noise(200, 301)
    agreement = np.mean(
        run_tiled(session, image, multiple=8, tile_px=64, overlap_px=0) == session.run(image)["class_ids"]
    )
    assert 0.5 < agreement < 0.99


class _Recorder:
    """Answers with the red channel and remembers the sizes that it was given."""

    engine = "none"

    def __init__(self) -> None:
        self.sizes: list[tuple[int, ...]] = []

    def run(self, image: np.ndarray) -> dict[str, np.ndarray]:
        self.sizes.append(image.shape[:2])
        return {"class_ids": image[:, :, 0]}


def test_small_images_run_whole_and_huge_ones_by_tiles() -> None:
    recorder = _Recorder()
    assert WHOLE_PX >= 1500 * 2000
    run_tiled(recorder, np.zeros((1500, 2000, 3), np.uint8), multiple=16)
    assert recorder.sizes == [(1500, 2000)]
    huge = np.broadcast_to(np.arange(4000, dtype=np.uint16).astype(np.uint8)[:, None, None], (4000, 900, 3))
    assert np.array_equal(run_tiled(recorder, huge, multiple=16), huge[:, :, 0])
    assert len(recorder.sizes) > 2
    assert all(rows <= TILE_PX for rows, _ in recorder.sizes[1:])
    assert 2 * OVERLAP_PX < TILE_PX
