"""A predictor against a split of a data set; the same for checkpoints and artifacts, so without torch."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from denselab.classes import Classes
from denselab.data.descriptor import Dataset, read_pair
from denselab.data.folder import Pair
from denselab.errors import InputError
from denselab.metrics.semantic import SemanticFigures, SemanticScore

Arrays = tuple[NDArray[np.uint8], NDArray[np.uint8]]
Track = Callable[[Iterable[Arrays], int, str], Iterable[Arrays]]
_AHEAD = 4


def untracked(items: Iterable[Arrays], total: int, label: str) -> Iterable[Arrays]:
    """Shows no progress."""
    return items


class Labeller(Protocol):
    """What is evaluated: `denselab.runtime.predictor.Predictor` is one."""

    def class_ids(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Class ids [H, W] of RGB pixels [H, W, 3]."""
        ...


@dataclass(frozen=True)
class Evaluation:
    """Figures, and what they were measured on."""

    figures: SemanticFigures
    classes: Classes
    split: str
    images: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"split": self.split, "images": self.images, **self.figures.to_dict(self.classes.names)}

    def to_text(self) -> str:
        """A table for people."""
        return f"{self.split}: {self.images} images\n{self.figures.to_text(self.classes.names)}"


def evaluate(
    labeller: Labeller, classes: Classes, dataset: Dataset, split: str, track: Track = untracked
) -> Evaluation:
    """Label every image of the split at its own size and count; the next images are read meanwhile.

    classes: of the model. track(items, total, label): shows progress. Raises InputError where the classes of the model
    and of the data differ, where the split is missing, and for the first file that cannot be read: a score without it
    would be one of another split.
    """
    check_classes(classes, dataset)
    pairs = dataset.split(split)
    score = SemanticScore(len(classes), dataset.ignore)
    for image, truth_ids in track(_read_ahead(pairs, dataset), len(pairs), f"evaluating {split}"):
        score.update(labeller.class_ids(image), truth_ids)
    return Evaluation(score.compute(), classes, split, len(pairs))


def check_classes(classes: Classes, dataset: Dataset) -> None:
    """Raise InputError unless model and data name the same classes in the same order."""
    if classes.names != dataset.classes.names:
        raise InputError(
            f"{dataset.root}: wanted the classes of the model ({', '.join(classes.names)}), "
            f"got those of the data ({', '.join(dataset.classes.names)}); "
            "take the model that was trained for these classes, or name and order them alike in dataset.yaml"
        )


def _read_ahead(pairs: Sequence[Pair], dataset: Dataset) -> Iterator[Arrays]:
    with ThreadPoolExecutor(1, "read") as reader:
        rest = iter(pairs)
        waiting = [reader.submit(read_pair, pair, dataset) for pair in islice(rest, _AHEAD)]
        while waiting:
            arrays = waiting.pop(0).result()
            waiting += [reader.submit(read_pair, pair, dataset) for pair in islice(rest, 1)]
            yield arrays
