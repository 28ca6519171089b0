"""Segment ids from PNGs: every filter of the format, with Pillow and with kornia-rs, and what else there is."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from denselab.errors import InputError
from denselab.scoring import rasters
from denselab.scoring.rasters import read_segment_ids

DECODERS = ("pillow", pytest.param("kornia-rs", marks=pytest.mark.skipif(
    rasters.read_image_png_u8 is None, reason="kornia-rs is not installed"
)))  # fmt: skip


@pytest.fixture(autouse=True, params=DECODERS)
def _decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "pillow":
        monkeypatch.setattr(rasters, "read_image_png_u8", None)


def paeth(left: int, above: int, above_left: int) -> int:
    """PNG specification (third edition), section 9.4."""
    guess = left + above - above_left
    return min((left, above, above_left), key=lambda value: abs(guess - value))


def filtered(rgb: np.ndarray, kinds: list[int]) -> bytes:
    """Rows of RGB uint8 [H, W, 3], row y by filter kinds[y]: none, sub, up, average, Paeth."""
    pixels = np.pad(rgb.astype(int), ((1, 0), (1, 0), (0, 0)))
    rows = []
    for y, kind in enumerate(kinds, start=1):
        rows.append(bytes([kind]))
        for x in range(1, pixels.shape[1]):
            for value, left, above, corner in zip(
                pixels[y, x], pixels[y, x - 1], pixels[y - 1, x], pixels[y - 1, x - 1], strict=True
            ):
                predicted = (0, left, above, (left + above) // 2, paeth(left, above, corner))[kind]
                rows.append(bytes([(value - predicted) % 256]))
    return b"".join(rows)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, rows: bytes, bits: int = 8) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("width", [1, 2, 7])
def test_every_filter_gives_the_ids(tmp_path: Path, width: int) -> None:
    rng = np.random.default_rng(width)
    kinds = [*range(5), *rng.integers(0, 5, 20).tolist()]
    rgb = rng.choice(rng.integers(0, 256, (4, 3), np.uint8), (len(kinds), width))
    path = tmp_path / "ids.png"
    path.write_bytes(png(width, len(kinds), filtered(rgb, kinds)))
    ids = read_segment_ids(path)
    assert ids.dtype == np.int32
    assert (ids == rgb.astype(int) @ (1, 256, 65536)).all()


def test_a_value_worked_by_hand(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), (1, 2, 3)).save(tmp_path / "one.png")
    assert read_segment_ids(tmp_path / "one.png").tolist() == [[1 + 2 * 256 + 3 * 65536]]


def test_other_kinds_are_read_or_refused_alike(tmp_path: Path) -> None:
    path = tmp_path / "ids.png"
    Image.new("RGBA", (2, 1), (4, 0, 0, 0)).save(path)
    assert read_segment_ids(path).tolist() == [[4, 4]]
    path.write_bytes(png(1, 1, bytes([0, 5, 9, 0, 9, 0, 9]), bits=16))
    assert read_segment_ids(path).tolist() == [[5]]
    for mode in ("L", "P", "1", "LA", "I;16"):
        Image.new(mode, (2, 1)).save(path)
        with pytest.raises(InputError, match=r"ids\.png: wanted segment ids .*, got a picture of mode"):
            read_segment_ids(path)
    whole = png(9, 9, np.random.default_rng(0).integers(0, 256, 9 * 28, np.uint8).tobytes())
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"ids\.png: wanted segment ids .* got a file that does not read as one"):
        read_segment_ids(path)
    with pytest.raises(InputError, match=r"gone\.png: wanted segment ids .*, got no such file; check the path"):
        read_segment_ids(tmp_path / "gone.png")
