import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from denselab.errors import InputError
from denselab.runtime.images import open_image, open_labels, read_size

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def png(path: Path, width: int, height: int, bits: int, colour_type: int, rows: bytes, *extra: tuple[bytes, bytes]):
    """A PNG written from the specification (RFC 2083), so that Pillow only reads it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks))
    return path


def corners(pixels: np.ndarray) -> list[tuple[int, ...]]:
    return [tuple(int(v) for v in pixels[y, x]) for y, x in ((0, 0), (0, -1), (-1, 0), (-1, -1))]


@pytest.mark.parametrize(
    ("orientation", "stored"),
    # The picture to see is red green / blue white (top-left, top-right, bottom-left, bottom-right). By hand from the
    # EXIF table: 6 = row 0 is the right edge, column 0 the top; so its first stored row runs down the right edge.
    [
        (1, (RED, GREEN, BLUE, WHITE)),
        (2, (GREEN, RED, WHITE, BLUE)),
        (3, (WHITE, BLUE, GREEN, RED)),
        (4, (BLUE, WHITE, RED, GREEN)),
        (5, (RED, BLUE, GREEN, WHITE)),
        (6, (GREEN, WHITE, RED, BLUE)),
        (7, (WHITE, GREEN, BLUE, RED)),
        (8, (BLUE, RED, WHITE, GREEN)),
    ],
)
@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg", ".webp"])
def test_exif_orientation(tmp_path: Path, orientation: int, stored: tuple, suffix: str):
    hw = (32, 48) if orientation < 5 else (48, 32)
    block = np.array(stored, np.uint8).reshape(2, 2, 3)
    pixels = block.repeat(hw[0] // 2, 0).repeat(hw[1] // 2, 1)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned{suffix}"
    Image.fromarray(pixels).save(path, exif=exif, quality=95)
    seen = open_image(path)
    assert seen.shape == (32, 48, 3)
    assert np.abs(np.array(corners(seen)) - np.array([RED, GREEN, BLUE, WHITE])).max() <= 12
    with Image.open(path) as picture:
        assert np.array_equal(seen, np.asarray(ImageOps.exif_transpose(picture).convert("RGB")))


def test_16_bit_grey_is_scaled(tmp_path: Path):
    rows = b"\0" + struct.pack(">5H", 0, 65535, 32768, 257, 128)
    seen = open_image(png(tmp_path / "deep.png", 5, 1, 16, 0, rows))
    # 255 / 65535 * (0, 65535, 32768, 257, 128) = 0, 255, 127.502, 1, 0.498
    assert seen[0, :, 0].tolist() == [0, 255, 128, 1, 0]
    assert (seen == seen[:, :, :1]).all()


def test_16_bit_rgb(tmp_path: Path):
    rows = b"\0" + struct.pack(">6H", 65535, 0, 0x8000, 0x0100, 0x00FF, 0xABCD)
    seen = open_image(png(tmp_path / "deep.png", 2, 1, 16, 2, rows))
    exact = np.array([255, 0, 127.5, 1, 1, 171.06])
    assert np.abs(seen.ravel() - exact).max() <= 1


def test_cmyk(tmp_path: Path):
    inks = [(255, 0, 0, 0), (0, 255, 255, 0), (0, 0, 0, 255), (0, 0, 0, 0)]
    seen_wanted = [(0, 255, 255), (255, 0, 0), (0, 0, 0), (255, 255, 255)]  # cyan, magenta + yellow, black, paper
    for ink, wanted in zip(inks, seen_wanted, strict=True):
        for suffix in (".tif", ".jpg"):
            path = tmp_path / f"ink{suffix}"
            Image.new("CMYK", (16, 16), ink).save(path)
            assert np.abs(open_image(path).astype(int) - wanted).max() <= 3, (ink, suffix)


def test_grey_palette_and_transparency(tmp_path: Path):
    grey = png(tmp_path / "grey.png", 3, 1, 8, 0, b"\0\x00\x80\xff")
    assert open_image(grey).tolist() == [[[0, 0, 0], [128, 128, 128], [255, 255, 255]]]
    bits = png(tmp_path / "bits.png", 3, 1, 1, 0, b"\0\xa0")
    assert open_image(bits)[0, :, 0].tolist() == [255, 0, 255]
    palette = (b"PLTE", bytes(RED + GREEN + BLUE))
    indexed = png(tmp_path / "palette.png", 3, 1, 8, 3, b"\0\2\0\1", palette)
    assert open_image(indexed).tolist() == [[list(BLUE), list(RED), list(GREEN)]]
    see_through = png(tmp_path / "holes.png", 3, 1, 8, 3, b"\0\2\0\1", palette, (b"tRNS", b"\xff\xff\x00"))
    assert open_image(see_through).tolist() == [[list(WHITE), list(RED), list(GREEN)]]
    alpha = png(tmp_path / "alpha.png", 3, 1, 8, 6, b"\0" + bytes((*RED, 255, *RED, 0, *RED, 51)))
    assert open_image(alpha).tolist() == [[[255, 0, 0], [255, 255, 255], [255, 204, 204]]]  # 51 / 255 = 1/5 red


def test_one_pixel(tmp_path: Path):
    Image.new("RGB", (1, 1), (1, 2, 3)).save(tmp_path / "dot.png")
    assert open_image(tmp_path / "dot.png").tolist() == [[[1, 2, 3]]]


def test_odd_path_and_wrong_suffix(tmp_path: Path):
    path = tmp_path / "Straße 日本 (1)" / "ein Bild.jpg"
    path.parent.mkdir()
    Image.new("RGB", (4, 3), RED).save(path, "PNG")
    assert open_image(path).shape == (3, 4, 3)
    assert read_size(path) == (3, 4)


def test_bands_join(tmp_path: Path):
    pixels = np.random.default_rng(0).integers(0, 256, (1500, 1000, 3), np.uint8)  # more than one band
    Image.fromarray(pixels).save(tmp_path / "big.png", compress_level=0)
    assert np.array_equal(open_image(tmp_path / "big.png"), pixels)


def refused(path: Path, match: str):
    with pytest.raises(InputError, match=match) as caught:
        open_image(path)
    assert str(path) in str(caught.value)


def test_refusals(tmp_path: Path):
    refused(tmp_path / "none.jpg", "got no such file; check the path")
    refused(tmp_path, "got a path that cannot be read")
    (tmp_path / "empty.png").touch()
    refused(tmp_path / "empty.png", "got an empty file")
    (tmp_path / "text.png").write_text("not a picture at all")
    refused(tmp_path / "text.png", "begins with b'not a picture at'; convert it")
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    refused(tmp_path / "cut.jpg", "got a damaged one .*truncated.*copy or export it again")
    for length in (3, 20, 120):
        (tmp_path / "cut.jpg").write_bytes(whole[:length])
        refused(tmp_path / "cut.jpg", "wanted an image, got a")


def test_damaged_png_never_escapes(tmp_path: Path):
    Image.effect_noise((40, 30), 50).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(150):
        broken = bytearray(whole)
        for at in rng.integers(0, len(whole), 4):
            broken[at] = rng.integers(0, 256)
        (tmp_path / "broken.png").write_bytes(broken[: rng.integers(1, len(whole))])
        with pytest.raises(InputError, match=r"broken\.png: wanted"):
            open_image(tmp_path / "broken.png")


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp", ".tif"])
def test_animation_is_refused(tmp_path: Path, suffix: str):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN)]
    path = tmp_path / f"moving{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    refused(path, "wanted a single image, got [A-Z]+ with 2 frames or pages; save the frames")


def test_single_gif_and_stereo_photo(tmp_path: Path):
    Image.new("RGB", (8, 8), BLUE).save(tmp_path / "still.gif")
    assert corners(open_image(tmp_path / "still.gif"))[0] == BLUE
    photo, twin = (Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN))
    photo.save(tmp_path / "stereo.jpg", "MPO", save_all=True, append_images=[twin])
    assert corners(open_image(tmp_path / "stereo.jpg"))[0] == pytest.approx(RED, abs=3)


def test_unknown_ranges_are_refused(tmp_path: Path):
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "float.tif")
    refused(tmp_path / "float.tif", "TIFF of mode F, whose value range is unknown")
    Image.fromarray(np.ones((4, 4), np.int32)).save(tmp_path / "int.tif")
    refused(tmp_path / "int.tif", "TIFF of mode I, whose value range is unknown")


def test_bomb_is_refused_from_its_header(tmp_path: Path):
    limit = Image.MAX_IMAGE_PIXELS
    bomb = png(tmp_path / "bomb.png", 65000, 65000, 8, 2, b"")
    refused(bomb, "wanted at most 500 million pixels, got a header that claims 65000x65000")
    with pytest.raises(InputError, match="65000x65000"):
        read_size(bomb)
    assert limit == Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow's own limit is 89 million
        assert read_size(png(tmp_path / "large.png", 12000, 9000, 8, 2, b"")) == (9000, 12000)


def test_labels(tmp_path: Path):
    grey = png(tmp_path / "grey.png", 3, 1, 8, 0, b"\0\x00\x0a\xff")
    palette = png(tmp_path / "palette.png", 3, 1, 8, 3, b"\0\2\0\1", (b"PLTE", bytes(RED + GREEN + BLUE)))
    deep = png(tmp_path / "deep.png", 3, 1, 16, 0, b"\0" + struct.pack(">3H", 0, 300, 65535))
    four_bits = png(tmp_path / "four.png", 3, 1, 4, 0, b"\0\x1a\xf0")
    two_bits = png(tmp_path / "two.png", 3, 1, 2, 0, b"\0\x6c")
    one_bit = png(tmp_path / "one.png", 3, 1, 1, 0, b"\0\xa0")
    assert open_labels(grey).tolist() == [[0, 10, 255]]
    assert open_labels(palette).tolist() == [[2, 0, 1]]
    assert open_labels(deep).tolist() == [[0, 300, 65535]]
    assert open_labels(four_bits).tolist() == [[1, 10, 15]]
    assert open_labels(two_bits).tolist() == [[1, 2, 3]]
    assert open_labels(one_bit).tolist() == [[1, 0, 1]]
    assert [open_labels(p).dtype for p in (grey, palette, deep, one_bit)] == [np.uint8, np.uint8, np.uint16, np.uint8]


def test_labels_refusals(tmp_path: Path):
    Image.new("RGB", (4, 4)).save(tmp_path / "colour.png")
    with pytest.raises(InputError, match=r"colour.png: wanted class ids .*, got a picture of mode RGB; .*colour masks"):
        open_labels(tmp_path / "colour.png")
    Image.new("L", (4, 4)).save(tmp_path / "lossy.jpg")
    with pytest.raises(InputError, match=r"lossy.jpg: .*got JPEG, which changes ids"):
        open_labels(tmp_path / "lossy.jpg")


def test_real_images_equal_pillow(shared_data: Path):
    paths = sorted((shared_data / "coco200_panoptic" / "images").rglob("*.jpg"))[:20]
    assert paths
    for path in paths:
        with Image.open(path) as picture:
            assert np.array_equal(open_image(path), np.asarray(ImageOps.exif_transpose(picture).convert("RGB")))
