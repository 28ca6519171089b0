"""Files of segment ids, depths, normals and confidences to arrays; each is refused by name if it is something else."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from denselab.errors import InputError

try:
    from kornia_rs.io import read_image_png_u8  # pyright: ignore[reportMissingModuleSource]
except ImportError:
    read_image_png_u8 = None

FLOAT_SUFFIXES = (".npy", ".npz")

_ID_BITS = np.uint32(0xFFFFFF)
_GREY_MODES = ("L", "I", "I;16", "I;16L", "I;16B", "I;16N")


def read_segment_ids(path: Path) -> NDArray[np.int32]:
    """Segment ids int32 [H, W] of a COCO panoptic PNG: R + 256 G + 65536 B, 0 void. Raises InputError."""
    if (rgb := _rgb_by_kornia(path)) is not None:
        return _ids(rgb)
    picture = _picture(path, ("RGB", "RGBA"), "segment ids (R + 256 G + 65536 B)", "save the ids as an RGB PNG")
    colours = picture if picture.mode == "RGB" else picture.convert("RGB")
    # Pillow holds RGB as four bytes a pixel: taken whole they are the id, but for the fourth.
    words = np.frombuffer(colours.tobytes("raw", "RGBX"), "<u4")
    return (words & _ID_BITS).view(np.int32).reshape(picture.height, picture.width)


def _rgb_by_kornia(path: Path) -> NDArray[np.uint8] | None:
    """RGB uint8 [H, W, 3] of a PNG of that kind, which kornia-rs decodes faster than Pillow.

    None without kornia-rs, and for every file it will not read: Pillow then reads that, or says what is wrong with it.
    """
    if read_image_png_u8 is None:
        return None
    try:
        return read_image_png_u8(str(path), "rgb")
    except Exception:
        return None


def _ids(rgb: NDArray[np.uint8]) -> NDArray[np.int32]:
    """R + 256 G + 65536 B, int32 [H, W], of RGB uint8 [H, W, 3]."""
    words = np.empty(rgb.size // 3, np.uint32)
    # Four bytes from each pixel on are its id, but for the fourth, which is the next pixel's; the last has no next.
    words[:-1] = np.ndarray(words.size - 1, "<u4", rgb, strides=3)
    words[-1] = int.from_bytes(rgb[-1, -1].tobytes(), "little")
    words &= _ID_BITS
    return words.view(np.int32).reshape(rgb.shape[:2])


def read_depth(
    path: Path, integer_scale: float | None, float_scale: float = 1.0, invalid: Collection[float] = ()
) -> NDArray[np.float64]:
    """Metres float64 [H, W] of a grey PNG (8 or 16 bits; metres per unit: integer_scale) or an array of floats.

    Integer arrays count as PNG does. invalid: stored values that become nan. Raises InputError, also for integers
    without a scale.
    """
    stored = _map(path, "depths")
    if stored.ndim != 2 or stored.dtype.kind not in "fiu":
        raise InputError(
            f"{path}: wanted depths [H, W], got {stored.dtype} {list(stored.shape)}; store one map of numbers a file"
        )
    scale = float_scale if stored.dtype.kind == "f" else integer_scale
    if scale is None:
        raise InputError(
            f"{path}: wanted to know how many metres one unit is, got no --scale; add it: 0.001 for millimetres, "
            "0.00390625 for KITTI's 1/256 m"
        )
    depth_m = stored.astype(np.float64) * scale
    depth_m[np.isin(stored, list(invalid))] = np.nan
    return depth_m


def read_normals(path: Path) -> NDArray[np.float64]:
    """Normals float64 [H, W, 3], zeros where unknown: RGB PNG, n = rgb / 127.5 - 1 and (0, 0, 0) unknown, or floats.

    Raises InputError.
    """
    if path.suffix.lower() in FLOAT_SUFFIXES:
        stored = _array(path)
        if stored.ndim == 4 and stored.shape[0] == 1:
            stored = stored[0]
        if stored.ndim != 3 or stored.shape[2] != 3 or stored.dtype.kind != "f":
            raise InputError(
                f"{path}: wanted normals as floats [H, W, 3], got {stored.dtype} {list(stored.shape)}; "
                "move the components last"
            )
        return np.nan_to_num(stored.astype(np.float64), posinf=0.0, neginf=0.0)
    wanted = "normals (n = rgb / 127.5 - 1)"
    rgb = np.asarray(_picture(path, ("RGB", "RGBA"), wanted, "save them as an RGB PNG").convert("RGB"))
    return np.where(rgb.any(axis=2, keepdims=True), rgb / 127.5 - 1, 0.0)


def read_confidence(path: Path) -> NDArray[np.floating[Any]]:
    """Probabilities 0..1: [H, W] of the predicted class, or [K, H, W] of all classes (arrays only).

    Grey PNGs and whole numbers of 8 or 16 bits are shares of 255 or 65535. Raises InputError.
    """
    stored = _map(path, "confidences")
    if stored.ndim not in (2, 3) or not (stored.dtype.kind == "f" or stored.dtype.name in ("uint8", "uint16")):
        raise InputError(
            f"{path}: wanted confidences [H, W] or class probabilities [K, H, W], got {stored.dtype} "
            f"{list(stored.shape)}; store floats 0..1, or shares of 255 or 65535 as uint8 or uint16"
        )
    return stored if stored.dtype.kind == "f" else stored / np.float64(np.iinfo(stored.dtype).max)


def _map(path: Path, what: str) -> NDArray[Any]:
    """An array, or a grey PNG; an axis of length one, where only two are wanted, is dropped."""
    if path.suffix.lower() not in FLOAT_SUFFIXES:
        mend = "save one grey channel of 16 bits, or a .npy of floats"
        return np.array(_picture(path, _GREY_MODES, f"{what} (one grey channel)", mend))
    stored = _array(path)
    if stored.ndim == 3 and 1 in (stored.shape[0], stored.shape[2]):
        return stored.squeeze(0 if stored.shape[0] == 1 else 2)
    return stored


def _picture(path: Path, modes: tuple[str, ...], wanted: str, mend: str) -> Image.Image:
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            if picture.mode in modes:
                picture.load()
                return picture
            mode = picture.mode
    except FileNotFoundError as error:
        raise InputError(f"{path}: wanted {wanted}, got no such file; check the path") from error
    except Exception as error:
        raise InputError(
            f"{path}: wanted {wanted} in a PNG, got a file that does not read as one ({error}); export it again"
        ) from error
    raise InputError(f"{path}: wanted {wanted}, got a picture of mode {mode}; {mend}")


def _array(path: Path) -> NDArray[Any]:
    try:
        stored = np.load(path, allow_pickle=False)
        if isinstance(stored, np.ndarray):
            return stored
        with stored:
            if len(stored.files) == 1:
                return stored[stored.files[0]]
            names = ", ".join(stored.files)
    except Exception as error:
        raise InputError(f"{path}: wanted an array, got a file that does not read ({error}); save it again") from error
    raise InputError(f"{path}: wanted one array in it, got {names or 'none'}; store one map a file")
