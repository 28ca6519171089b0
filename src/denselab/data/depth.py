"""Depth and normal maps in files, and the camera that saw them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from denselab.data.normals import normals_from_depth
from denselab.data.truth import Truth, check_size
from denselab.errors import InputError

DEPTH_SUFFIXES = frozenset({".png", ".npy", ".tif", ".tiff"})
MILLIMETRE_M = 0.001
UNKNOWN = (0,)


@dataclass(frozen=True, eq=False)
class DepthFile:
    """A depth map: grey PNG or TIFF of 8 or 16 bits, float TIFF, or .npy [H, W].

    metres = value * scale_m; values in `invalid`, and those that are not positive finite numbers, are unknown.
    intrinsics: float64 [3, 3], None where the camera is not known.
    """

    path: Path
    scale_m: float
    invalid: tuple[float, ...] = UNKNOWN
    intrinsics: NDArray[np.float64] | None = None

    def read(self, image: Path, hw: tuple[int, int]) -> NDArray[np.float32]:
        """Metres float32 [H, W], 0 unknown. Raises InputError, also where nothing is known; SizeMismatchError."""
        values = _values(self.path)
        check_size(self.path, values.shape, image, hw)
        unknown = np.isin(values, self.invalid) | ~np.isfinite(values) | (values <= 0)
        if unknown.all():
            raise InputError(
                f"{self.path}: wanted some known depth, got none in {values.size} px ({values.min()} to {values.max()}"
                f"; unknown are {', '.join(f'{value:g}' for value in self.invalid)} and what is not positive); "
                "mend invalid: in dataset.yaml, or leave the file out"
            )
        return np.where(unknown, 0, values * self.scale_m).astype(np.float32)


@dataclass(frozen=True)
class NormalFile:
    """A normal map: 8-bit RGB, n = rgb / 127.5 - 1 then normalised, (0, 0, 0) unknown; or .npy float [H, W, 3].

    signs: what x, y and z are multiplied by to become right, down and forward.
    """

    path: Path
    signs: tuple[int, int, int] = (1, 1, 1)

    def read(self, image: Path, hw: tuple[int, int]) -> NDArray[np.float32]:
        """Unit float32 [H, W, 3], zeros unknown. Raises InputError, SizeMismatchError."""
        from denselab.runtime.images import open_image

        if self.path.suffix == ".npy":
            vectors = _load(self.path).astype(np.float32)
            if vectors.ndim != 3 or vectors.shape[2] != 3:
                raise InputError(f"{self.path}: wanted normals [H, W, 3], got {list(vectors.shape)}; save them so")
        else:
            colours = open_image(self.path)
            vectors = np.where(colours.any(axis=-1, keepdims=True), colours / np.float32(127.5) - 1, 0)
        check_size(self.path, vectors.shape[:2], image, hw)
        length = np.linalg.norm(vectors, axis=-1, keepdims=True)
        known = np.isfinite(length) & (length > 1e-6)
        unit = np.divide(vectors, length, out=np.zeros(vectors.shape, np.float32), where=known)
        return unit * np.array(self.signs, np.float32)


@dataclass(frozen=True)
class NormalsFromDepth:
    """No file: `normals_from_depth` of the depth map."""

    def derive(self, truth: Truth) -> NDArray[np.float32]:
        """Unit float32 [H, W, 3], zeros unknown."""
        assert truth.depth_m is not None
        assert truth.intrinsics is not None
        return normals_from_depth(truth.depth_m, truth.intrinsics)


def camera(fx: float, fy: float, cx: float, cy: float) -> NDArray[np.float64]:
    """Intrinsics float64 [3, 3] of a pinhole camera without skew, in px."""
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], np.float64)


def as_intrinsics(given: Any, source: str) -> NDArray[np.float64]:
    """[fx, fy, cx, cy] or [3, 3] to float64 [3, 3]; raises InputError that begins with `source`."""
    try:
        values = np.array(given, np.float64)
    except (TypeError, ValueError):
        values = np.empty(0)
    if values.shape == (4,) and np.isfinite(values).all() and (values[:2] > 0).all():
        return camera(*values.tolist())
    is_matrix = values.shape == (3, 3) and np.isfinite(values).all() and np.array_equal(values[2], [0, 0, 1])
    if is_matrix and values[0, 0] > 0 and values[1, 1] > 0:
        return values
    raise InputError(f"{source}: wanted fx, fy, cx, cy in px, or a 3 x 3 matrix ending in 0, 0, 1, got {given!r}")


def read_intrinsics(path: Path) -> NDArray[np.float64] | Mapping[str, NDArray[np.float64]]:
    """One camera for all images, or one by the name of each.

    Text: four or nine numbers. JSON: four or 3 x 3 numbers, a mapping of image name to these, or `scenes.json` of
    rendered scenes. Raises InputError.
    """
    try:
        text = path.read_text("utf-8")
        if path.suffix != ".json":
            numbers = np.array(text.replace(",", " ").split(), np.float64)
            return as_intrinsics(numbers.reshape(3, 3) if numbers.size == 9 else numbers.tolist(), str(path))
        data = json.loads(text)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: wanted the numbers of a camera, got {error}; write fx fy cx cy into it") from error
    if isinstance(data, dict) and isinstance(data.get("scenes"), list):
        data = {str(scene["name"]): scene["intrinsics"] for scene in data["scenes"]}
    if isinstance(data, dict):
        return {str(name): as_intrinsics(given, f"{path}: {name}") for name, given in data.items()}
    return as_intrinsics(data, str(path))


def _values(path: Path) -> NDArray[Any]:
    """The numbers in a depth file [H, W]."""
    from PIL import Image

    from denselab.runtime.images import open_labels, read_size

    if path.suffix == ".npy":
        values = _load(path)
        if values.ndim != 2:
            raise InputError(f"{path}: wanted depth [H, W], got {list(values.shape)}; save one value per pixel")
        return values
    read_size(path)
    with Image.open(path) as picture:
        if picture.mode in ("F", "I"):
            return np.array(picture)
    try:
        return open_labels(path)
    except InputError as error:
        raise InputError(f"{path}: wanted depth as one grey channel (16-bit PNG), got: {error}") from error


def _load(path: Path) -> NDArray[Any]:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: wanted a .npy array of numbers, got {error}; write it with numpy.save") from error
