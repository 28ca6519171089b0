"""Image files to arrays, whatever their mode; what cannot be read is refused by name before it costs memory."""

import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError

from denselab.errors import InputError

MAX_PIXELS = 500_000_000
"""Larger images are refused from their header: a few bytes can claim any size."""

_FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "PPM", "GIF")
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")
_ORIENTATION_TAG = 0x0112
_PIXELS_PER_BAND = 1 << 20
_open_lock = threading.Lock()

# Pillow widens 2- and 4-bit grey to 0..255; class ids must come back as written.
_GREY_STEP = {"L;2": 85, "L;4": 17}


def open_image(path: Path) -> NDArray[np.uint8]:
    """Read a picture as uint8 [H, W, 3] RGB, turned upright by its EXIF orientation.

    Grey, palette and CMYK pictures are converted, 16-bit grey is scaled to 8 bits, transparency is laid on white;
    colour profiles are not applied. Raises InputError, naming the file and what to do, for anything else.
    """
    with _opened(path) as picture:
        _refuse_unlike_photo(path, picture)
        try:
            picture.load()
            return _upright(_rgb(picture), _orientation(picture))
        except Exception as error:
            raise _broken(path, error) from error


def from_picture(picture: Image.Image) -> NDArray[np.uint8]:
    """A PIL image as `open_image` reads files. Raises InputError for one of more than 8 bits a channel, or damaged."""
    if picture.mode in ("F", "LAB") or picture.mode.startswith("I"):
        raise InputError(
            f"image: wanted a PIL image of 8 bits a channel, got mode {picture.mode}; "
            "give the path of its file instead, or convert it to RGB"
        )
    try:
        picture.load()  # PIL reads lazily: a damaged file shows here
        return _upright(_rgb(picture), _orientation(picture))
    except OSError as error:
        raise InputError(f"image: PIL cannot read it ({error}); copy or export it again") from error


def read_size(path: Path) -> tuple[int, int]:
    """Height and width in px from the header alone, before any EXIF rotation; raises InputError like `open_image`."""
    with _opened(path) as picture:
        return picture.height, picture.width


def open_labels(path: Path) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """Read class ids [H, W]: grey values (8 or 16 bits) or, in a palette picture, the palette index.

    Raises InputError for colour pictures and for JPEG, whose values are not what was stored.
    """
    with _opened(path) as picture:
        if picture.format == "JPEG":
            raise _refusal(path, "JPEG, which changes ids at borders", "store labels as PNG", "class ids")
        if picture.mode not in ("1", "L", "P", *_SIXTEEN_BIT):
            mend = "save one channel of ids, or set `colour masks: true` in the dataset's description"
            raise _refusal(path, f"a picture of mode {picture.mode}", mend, "class ids (grey or palette)")
        step = _GREY_STEP.get(_raw_mode(picture), 1)
        try:
            ids = np.array(picture)
        except Exception as error:
            raise _broken(path, error) from error
    return ids.astype(np.uint16) if ids.dtype.itemsize == 2 else ids.astype(np.uint8) // np.uint8(step)


@contextmanager
def _opened(path: Path) -> Generator[ImageFile.ImageFile]:
    """The picture with only its header read, its size and frame count accepted."""
    try:
        file = path.open("rb")
    except FileNotFoundError as error:
        raise _refusal(path, "no such file", "check the path") from error
    except OSError as error:
        raise _refusal(path, f"a path that cannot be read ({error.strerror})", "check its kind and rights") from error
    with file:
        try:
            with _without_pillow_limit():
                picture = Image.open(file, formats=_FORMATS)
        except UnidentifiedImageError as error:
            file.seek(0)
            begin = file.read(16)
            got = f"a file that begins with {begin!r}" if begin else "an empty file"
            raise _refusal(path, got, "convert it to PNG or JPEG" if begin else "copy it again") from error
        except Exception as error:
            raise _broken(path, error) from error
        with picture:
            if picture.width * picture.height > MAX_PIXELS:
                got = f"a header that claims {picture.width}x{picture.height}"
                raise _refusal(path, got, "shrink or cut it first", f"at most {MAX_PIXELS / 1e6:.0f} million pixels")
            yield picture


@contextmanager
def _without_pillow_limit() -> Generator[None]:
    """Pillow's own limit is lower than ours and global: lift it only while one header is read."""
    with _open_lock:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _refuse_unlike_photo(path: Path, picture: ImageFile.ImageFile) -> None:
    try:
        # An MPO file is a JPEG photo followed by its preview or its twin for the other eye.
        frames = 1 if picture.format == "MPO" else getattr(picture, "n_frames", 1)
    except Exception as error:
        raise _broken(path, error) from error
    if frames > 1:
        got = f"{picture.format} with {frames} frames or pages"
        raise _refusal(path, got, "save the frames you need as separate images", "a single image")
    wide_grey = picture.mode == "I" and picture.format not in ("PNG", "PPM")
    if wide_grey or picture.mode in ("F", "LAB"):
        got = f"{picture.format} of mode {picture.mode}, whose value range is unknown"
        raise _refusal(path, got, "convert it to 8- or 16-bit grey or RGB")


def _rgb(picture: Image.Image) -> NDArray[np.uint8]:
    """In bands, so that a huge picture is held twice at most: by Pillow and in the answer."""
    width, height = picture.size
    pixels = np.empty((height, width, 3), np.uint8)
    rows = max(1, _PIXELS_PER_BAND // width)
    for top in range(0, height, rows):
        band = picture.crop((0, top, width, min(top + rows, height)))
        pixels[top : top + rows] = _rgb_band(band)
    return pixels


def _rgb_band(band: Image.Image) -> NDArray[Any]:
    if band.mode in ("I", *_SIXTEEN_BIT):
        grey = (np.asarray(band).astype(np.uint32) + 128) // 257  # 65535 / 255 = 257
        return grey[:, :, None]
    if band.has_transparency_data:
        coloured = band.convert("RGBA")
        white = Image.new("RGBA", band.size, "white")
        return np.asarray(Image.alpha_composite(white, coloured))[:, :, :3]
    return np.asarray(band.convert("RGB"))


def _orientation(picture: Image.Image) -> int:
    try:
        return int(picture.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # broken EXIF: the picture itself is fine
        return 1


def _upright(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Undo EXIF orientation 1..8 (CIPA DC-008, tag 0x0112: which edge row 0 and column 0 are)."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _raw_mode(picture: ImageFile.ImageFile) -> str:
    args = picture.tile[0].args if picture.tile else ""
    return args if isinstance(args, str) else str(args[0] if args else "")


def _refusal(path: Path, got: str, mend: str, wanted: str = "an image") -> InputError:
    return InputError(f"{path}: wanted {wanted}, got {got}; {mend}")


def _broken(path: Path, error: Exception) -> InputError:
    return _refusal(path, f"a damaged one ({str(error) or type(error).__name__})", "copy or export it again")
