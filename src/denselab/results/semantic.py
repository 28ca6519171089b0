"""Semantic segmentation: a class for every pixel."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from denselab import drawing
from denselab.classes import VOID, Classes
from denselab.drawing.canvas import row_bands
from denselab.errors import InputError
from denselab.results.result import Result

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, eq=False)
class SemanticMap(Result):
    """A class for every pixel.

    class_ids: uint8 [H, W], 0..K-1 or `void`; timing_ms: milliseconds per step (decode, engine, ...).
    Raises InputError where class_ids has another type or shape, or holds an id that is no class.
    """

    task: ClassVar[str] = "semantic"

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
        # In bands, because bincount widens what it counts to 8 bytes a pixel.
        counts = np.zeros(256, np.int64)
        for rows in row_bands(self.hw):
            counts += np.bincount(ids[rows].ravel(), minlength=256)
        strange = [int(i) for i in np.flatnonzero(counts[len(self.classes) :]) + len(self.classes) if i != self.void]
        if strange:
            wanted = f"0..{len(self.classes) - 1} or void {self.void}"
            raise InputError(f"class_ids: wanted {wanted}, got {strange[:5]}; set them to void or give their classes")
        object.__setattr__(self, "_id_counts", counts)

    @property
    def hw(self) -> tuple[int, int]:
        """Height and width of the image in px."""
        return self.class_ids.shape[0], self.class_ids.shape[1]

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

    def to_array(self) -> NDArray[np.uint8]:
        """The class ids."""
        return self.class_ids

    def overlay(self, image: NDArray[np.uint8], *, legend: bool = True, opacity: float = 0.55) -> "Image":
        """The image [H, W, 3] uint8 under translucent class colours, with a legend of class areas below it."""
        shares = self.shares() if legend else None
        return drawing.overlay(image, self.class_ids, self.classes, shares, self.void, opacity)

    def figures(self) -> dict[str, Any]:
        """Pixels and share of every class and of void."""
        counts, shares = self.pixel_counts(), self.shares()
        void_pixels = int(self._id_counts[self.void])
        return {
            "classes": [
                {"id": i, "name": name, "colour": list(colour), "pixels": int(counts[i]), "share": float(shares[i])}
                for i, (name, colour) in enumerate(zip(self.classes.names, self.classes.colours, strict=True))
            ],
            "void": {"id": self.void, "pixels": void_pixels, "share": void_pixels / self.class_ids.size},
        }
