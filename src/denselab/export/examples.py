"""Photos that an export calibrates with and compares on."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from denselab.data.dataset import Dataset
from denselab.data.scenes import render_scene
from denselab.data.truth import Truth

PARITY_SPLITS = ("test", "val", "train")
"""Where photos to compare on come from, in order of preference."""
CALIBRATION_SPLITS = ("train", "val", "test")
"""Where photos to calibrate with come from, in order of preference."""


@dataclass(frozen=True)
class Examples:
    """Photos uint8 [H, W, 3], where they are from, and what is true of them where it is known."""

    source: str
    images: tuple[NDArray[np.uint8], ...]
    truths: tuple[Truth, ...] | None = None


def from_dataset(dataset: Dataset, tasks: Collection[str], splits: Sequence[str], count: int) -> Examples:
    """At most `count` labelled photos, evenly spread over the first of the splits that exists."""
    split = next(name for name in (*splits, *dataset.splits) if dataset.splits.get(name))
    items = dataset.split(split)
    chosen = [items[i * len(items) // count] for i in range(count)] if len(items) > count else items
    images, truths = zip(*(dataset.read(item, tasks) for item in chosen), strict=True)
    return Examples(f"{dataset.root.name} {split}", images, truths)


def from_scenes(first_seed: int, count: int) -> Examples:
    """Rendered street scenes: for models whose own data is not at hand, and so without truth."""
    return Examples("rendered scenes", tuple(render_scene(first_seed + i).image for i in range(count)))
