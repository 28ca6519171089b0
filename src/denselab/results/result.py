"""What the results of all tasks share."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from denselab.errors import InputError
from denselab.files import atomic_path, write_json

if TYPE_CHECKING:
    from PIL.Image import Image


class Result(ABC):
    """What a model says of one image about one task.

    task: semantic, instance, panoptic, depth or normals. model: its name. timing_ms: milliseconds per step (decode,
    engine, ...). `numpy.asarray(result)` is what a .npy file of it holds.
    """

    task: ClassVar[str]
    model: str
    timing_ms: Mapping[str, float]

    @property
    @abstractmethod
    def hw(self) -> tuple[int, int]:
        """Height and width of the image in px."""

    @abstractmethod
    def overlay(self, image: NDArray[np.uint8], *, legend: bool = True) -> "Image":
        """The image [H, W, 3] uint8 under what was found, with a legend below. Raises InputError for another size."""

    @abstractmethod
    def to_image(self) -> "Image":
        """The picture that a label PNG holds."""

    @abstractmethod
    def to_array(self) -> NDArray[Any]:
        """What a .npy file holds, [H, W] or [H, W, C]."""

    @abstractmethod
    def figures(self) -> dict[str, Any]:
        """What `to_dict` says beyond task, model, size and timing."""

    def to_dict(self) -> dict[str, Any]:
        """Everything but the pixels, ready for JSON."""
        height, width = self.hw
        return {
            "task": self.task,
            "model": self.model,
            "width": width,
            "height": height,
            **self.figures(),
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
                    np.save(partial, self.to_array())
            case ".json":
                write_json(path, self.to_dict())
            case _:
                raise InputError(f"{path}: wanted a name that ends in .png or .npy (labels) or .json (figures)")

    def with_timing(self, timing_ms: Mapping[str, float]) -> Self:
        """The same with other milliseconds; shares what was checked and computed already."""
        clone = copy.copy(self)
        object.__setattr__(clone, "timing_ms", timing_ms)
        return clone

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        """`to_array`, for `numpy.asarray(result)`."""
        return np.array(self.to_array(), dtype=dtype, copy=copy)
