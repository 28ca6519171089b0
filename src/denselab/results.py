"""What a user gets from a model: plain numpy, at source size, checked when made."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from denselab.classes import VOID, Classes
from denselab.errors import InputError
from denselab.files import atomic_path, write_json

if TYPE_CHECKING:
    from PIL.Image import Image

_PIXELS_PER_BAND = 1 << 20


@dataclass(frozen=True, eq=False)
class SemanticMap:
    """A class for every pixel.

    class_ids: uint8 [H, W], 0..K-1 or `void`; timing_ms: milliseconds per step (decode, engine, ...).
    Raises InputError where class_ids has another type or shape, or holds an id that is no class.
    """

    class_ids: NDArray[np.uint8]
    classes: Classes
    void: int = VOID
    model: str = ""
    timing_ms: Mapping[str, float] = field(default_factory=dict[str, float])
    _id_counts: NDArray[np.int64] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the ids and count them."""
        ids = self.class_ids
        if ids.dtype != np.uint8 or ids.ndim != 2 or ids.size == 0:
            raise InputError(f"class_ids: wanted uint8 [H, W] with H, W >= 1, got {ids.dtype} {list(ids.shape)}")
        if not len(self.classes) <= self.void <= 255:
            raise InputError(f"void: wanted an id in {len(self.classes)}..255 that is no class, got {self.void}")
        counts = _count_ids(ids)
        strange = [int(i) for i in np.flatnonzero(counts[len(self.classes) :]) + len(self.classes) if i != self.void]
        if strange:
            wanted = f"0..{len(self.classes) - 1} or void {self.void}"
            raise InputError(f"class_ids: wanted {wanted}, got {strange[:5]}; set them to void or give their classes")
        object.__setattr__(self, "_id_counts", counts)

    def pixel_counts(self) -> NDArray[np.int64]:
        """Pixels per class, int64 [K]; void pixels are in none."""
        return self._id_counts[: len(self.classes)].copy()

    def shares(self) -> NDArray[np.float64]:
        """Area of each class as a fraction of all pixels, void included in "all"; float64 [K]."""
        return self.pixel_counts() / self.class_ids.size

    def to_image(self) -> "Image":
        """A palette picture whose pixel value is the class id; void is black."""
        from PIL import Image

        palette = np.zeros((256, 3), np.uint8)
        palette[: len(self.classes)] = self.classes.colours
        picture = Image.fromarray(self.class_ids)
        picture.putpalette(palette.tobytes())  # turns "L" into "P", values unchanged
        return picture

    def overlay(self, image: NDArray[np.uint8], opacity: float = 0.55, legend: bool = True) -> "Image":
        """The image [H, W, 3] uint8 under translucent class colours, with a legend of class areas beside it."""
        from denselab.drawing import overlay

        return overlay(image, self.class_ids, self.classes, self.shares() if legend else None, self.void, opacity)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the pixels, ready for JSON."""
        height, width = self.class_ids.shape
        counts, shares = self.pixel_counts(), self.shares()
        void_pixels = int(self._id_counts[self.void])
        return {
            "task": "semantic",
            "model": self.model,
            "width": width,
            "height": height,
            "classes": [
                {"id": i, "name": name, "colour": list(colour), "pixels": int(counts[i]), "share": float(shares[i])}
                for i, (name, colour) in enumerate(zip(self.classes.names, self.classes.colours, strict=True))
            ],
            "void": {"id": self.void, "pixels": void_pixels, "share": void_pixels / self.class_ids.size},
            "timing_ms": {step: round(ms, 3) for step, ms in self.timing_ms.items()},
        }

    def save(self, path: str | Path) -> None:
        """Write the labels (.png, .npy) or the figures (.json); a file that is there is replaced whole."""
        path = Path(path)
        match path.suffix.lower():
            case ".png":
                with atomic_path(path) as partial:
                    self.to_image().save(partial, compress_level=1)
            case ".npy":
                with atomic_path(path) as partial:
                    np.save(partial, self.class_ids)
            case ".json":
                write_json(path, self.to_dict())
            case _:
                raise InputError(f"{path}: wanted a name that ends in .png or .npy (labels) or .json (figures)")

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        """The class ids, for `numpy.asarray(result)`."""
        return np.array(self.class_ids, dtype=dtype, copy=copy)


def _count_ids(ids: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Pixels per id, int64 [256]; in bands, because bincount widens what it counts to 8 bytes a pixel."""
    rows = max(1, _PIXELS_PER_BAND // ids.shape[1])
    counts = np.zeros(256, np.int64)
    for top in range(0, ids.shape[0], rows):
        counts += np.bincount(ids[top : top + rows].ravel(), minlength=256)
    return counts
