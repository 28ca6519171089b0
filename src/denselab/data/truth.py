"""What is true of one image, and the two mistakes every kind of label file can hold."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from denselab.errors import InputError
from denselab.segments import Segments

LABEL_TASKS = frozenset({"semantic", "instance", "panoptic"})
SEGMENT_TASKS = frozenset({"instance", "panoptic"})

_UNIT_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class Truth:
    """What is true of one image of H x W px; None where it is not known or was not asked for.

    class_ids: uint8 [H, W], 255 void.
    segments: panoptic truth holds things and stuff, instance truth things only.
    void: bool [H, W], pixels of which no segment is known: ignored ones, crowds and, in panoptic truth, all that are
    in no segment. In instance truth what is in no segment and not void is background.
    depth_m: float32 [H, W], metres along the camera's z axis, 0 unknown.
    normals: float32 [H, W, 3], unit, x right, y down, z forward, zeros unknown.
    intrinsics: float64 [3, 3], pixel centres on whole numbers.
    Raises InputError for other types, shapes or ranges, and where sizes differ.
    """

    class_ids: NDArray[np.uint8] | None = None
    segments: Segments | None = None
    depth_m: NDArray[np.float32] | None = None
    normals: NDArray[np.float32] | None = None
    intrinsics: NDArray[np.float64] | None = None
    void: NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        """Check types, sizes and ranges."""
        self._check("class_ids", self.class_ids, np.uint8)
        self._check("void", self.void, np.bool_)
        self._check("depth_m", self.depth_m, np.float32)
        self._check("normals", self.normals, np.float32, (3,))
        if self.intrinsics is not None and (self.intrinsics.shape != (3, 3) or self.intrinsics.dtype != np.float64):
            raise InputError(f"intrinsics: wanted float64 [3, 3], got {_described(self.intrinsics)}")
        sizes = {name: hw for name, hw in self._sizes().items() if hw is not None}
        if len(set(sizes.values())) > 1:
            raise InputError(f"truth: wanted one size for all, got {sizes}; cut or resize them alike")
        if self.depth_m is not None and not (np.isfinite(self.depth_m).all() and (self.depth_m >= 0).all()):
            raise InputError("depth_m: wanted metres of 0 (unknown) or more, got negative or infinite values")
        if self.normals is not None:
            square = np.einsum("hwc,hwc->hw", self.normals, self.normals)
            if not ((square == 0) | (np.abs(square - 1) < _UNIT_TOLERANCE)).all():
                raise InputError(
                    "normals: wanted unit vectors, or zeros for unknown, got other lengths; normalise them"
                )

    @property
    def hw(self) -> tuple[int, int] | None:
        """Height and width in px; None where nothing is known."""
        return next((hw for hw in self._sizes().values() if hw is not None), None)

    def _sizes(self) -> dict[str, tuple[int, int] | None]:
        arrays = {"class_ids": self.class_ids, "void": self.void, "depth_m": self.depth_m, "normals": self.normals}
        sizes = {name: None if a is None else (a.shape[0], a.shape[1]) for name, a in arrays.items()}
        return {**sizes, "segments": self.segments.hw if self.segments else None}

    @staticmethod
    def _check(name: str, array: NDArray[np.generic] | None, dtype: type, last: tuple[int, ...] = ()) -> None:
        if array is not None and (array.dtype != dtype or array.ndim != 2 + len(last) or array.shape[2:] != last):
            wanted = ", ".join(["H", "W", *map(str, last)])
            raise InputError(f"{name}: wanted {np.dtype(dtype)} [{wanted}], got {_described(array)}")


class SizeMismatchError(InputError):
    """A label file of another size than its image."""


class UnknownLabelError(InputError):
    """An id that no class, no segment and no ignored id explains, or a segment without pixels."""


def check_size(path: Path, got_hw: tuple[int, ...], image: Path, image_hw: tuple[int, int]) -> None:
    """Raise SizeMismatchError, naming both files, unless they have one size."""
    from denselab.runtime.images import read_size

    if got_hw == image_hw:
        return
    mend = "make them the same size (resize labels with nearest neighbour)"
    if read_size(image) == got_hw:
        mend = "the mask fits the image before its EXIF rotation: rotate the mask too, or drop the image's EXIF tag"
    raise SizeMismatchError(
        f"{path}: wanted the size of its image {image}, {image_hw[1]}x{image_hw[0]} px, "
        f"got {got_hw[1]}x{got_hw[0]} px; {mend}"
    )


def _described(array: NDArray[np.generic]) -> str:
    return f"{array.dtype} {list(array.shape)}"
