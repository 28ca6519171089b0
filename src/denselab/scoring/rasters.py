"""Files of segment ids, depths and normals to arrays; each is refused by name if it is something else."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from denselab.errors import InputError

FLOAT_SUFFIXES = (".npy", ".npz")

_ID_BITS = np.uint32(0xFFFFFF)
_GREY_MODES = ("L", "I", "I;16", "I;16L", "I;16B", "I;16N")


def read_segment_ids(path: Path) -> NDArray[np.int32]:
    """Segment ids int32 [H, W] of a COCO panoptic PNG: R + 256 G + 65536 B, 0 void. Raises InputError."""
    picture = _picture(path, ("RGB", "RGBA"), "segment ids (R + 256 G + 65536 B)", "save the ids as an RGB PNG")
    colours = picture if picture.mode == "RGB" else picture.convert("RGB")
    # Pillow holds RGB as four bytes a pixel: taken whole they are the id, but for the fourth.
    words = np.frombuffer(colours.tobytes("raw", "RGBX"), "<u4")
    return (words & _ID_BITS).view(np.int32).reshape(picture.height, picture.width)


def read_depth(
    path: Path, integer_scale: float | None, float_scale: float = 1.0, invalid: Collection[float] = ()
) -> NDArray[np.float64]:
    """Metres float64 [H, W] of a grey PNG (8 or 16 bits; metres per unit: integer_scale) or an array of floats.

    Integer arrays count as PNG does. invalid: stored values that become nan. Raises InputError, also for integers
    without a scale.
    """
    stored = _array(path) if path.suffix.lower() in FLOAT_SUFFIXES else _grey(path)
    if stored.ndim == 3 and 1 in (stored.shape[0], stored.shape[2]):
        stored = stored.squeeze(0 if stored.shape[0] == 1 else 2)
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


def _grey(path: Path) -> NDArray[Any]:
    mend = "save one grey channel of 16 bits, or a .npy of floats"
    return np.array(_picture(path, _GREY_MODES, "depths (one grey channel)", mend))


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
