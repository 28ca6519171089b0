"""What one model says of one image about several tasks."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from denselab.errors import InputError
from denselab.files import write_json
from denselab.results.result import Result

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, eq=False)
class JointResult(Mapping[str, Result]):
    """A mapping from task to result: `joint["depth"].metres`.

    parts: of one image; their keys are their tasks. Raises InputError for none, other keys or different sizes.
    """

    parts: Mapping[str, Result]

    def __post_init__(self) -> None:
        """Check keys and sizes."""
        if not self.parts:
            raise InputError("parts: wanted at least one result, got none")
        for task, part in self.parts.items():
            if part.task != task:
                raise InputError(f"parts: wanted the {task} result under {task!r}, got one of {part.task}")
        sizes = {task: part.hw for task, part in self.parts.items()}
        if len(set(sizes.values())) > 1:
            raise InputError(f"parts: wanted results of one image, got sizes {sizes}")

    def __getitem__(self, task: str) -> Result:
        """The result of a task."""
        return self.parts[task]

    def __iter__(self) -> Iterator[str]:
        """The tasks."""
        return iter(self.parts)

    def __len__(self) -> int:
        """How many tasks."""
        return len(self.parts)

    @property
    def task(self) -> str:
        """The tasks, joined by +."""
        return "+".join(self.parts)

    @property
    def model(self) -> str:
        """Name of the model."""
        return self._first.model

    @property
    def timing_ms(self) -> Mapping[str, float]:
        """Milliseconds per step, of all tasks together."""
        return self._first.timing_ms

    @property
    def hw(self) -> tuple[int, int]:
        """Height and width of the image in px."""
        return self._first.hw

    def overlay(self, image: NDArray[np.uint8], *, legend: bool = True) -> "Image":
        """The overlays of all tasks side by side."""
        from PIL import Image

        pictures = [part.overlay(image, legend=legend) for part in self.parts.values()]
        size = (sum(picture.width for picture in pictures), max(picture.height for picture in pictures))
        row = Image.new("RGB", size, "white")
        left = 0
        for picture in pictures:
            row.paste(picture, (left, 0))
            left += picture.width
        return row

    def save(self, path: str | Path) -> None:
        """Save every part as `Result.save` does, under names with the task in them: a.png becomes a.depth.png, ...

        A .json file holds the figures of all tasks.
        """
        path = Path(path)
        if path.suffix.lower() == ".json":
            write_json(path, self.to_dict())
            return
        for task, part in self.parts.items():
            part.save(path.with_name(f"{path.stem}.{task}{path.suffix}"))

    def to_dict(self) -> dict[str, Any]:
        """Everything but the pixels of all tasks, ready for JSON."""
        height, width = self.hw
        parts = {task: part.to_dict() for task, part in self.parts.items()}
        return {"task": self.task, "model": self.model, "width": width, "height": height, "results": parts}

    def with_timing(self, timing_ms: Mapping[str, float]) -> "JointResult":
        """The same with other milliseconds."""
        return JointResult({task: part.with_timing(timing_ms) for task, part in self.parts.items()})

    @property
    def _first(self) -> Result:
        return next(iter(self.parts.values()))
