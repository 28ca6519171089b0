"""A predictor against a split of a data set; the same for checkpoints and artifacts, so without torch."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from denselab.classes import Classes
from denselab.data.dataset import Dataset, Item
from denselab.data.truth import Truth
from denselab.depth_unit import DepthUnit
from denselab.errors import InputError
from denselab.metrics.headline import Figures
from denselab.runtime.predictor import Predictor
from denselab.task_scores import count, new_score

Labelled = tuple[NDArray[np.uint8], Truth]
Track = Callable[[Iterable[Labelled], int, str], Iterable[Labelled]]
_AHEAD = 4


def untracked(items: Iterable[Labelled], total: int, label: str) -> Iterable[Labelled]:
    """Shows no progress."""
    return items


@dataclass(frozen=True)
class Evaluation:
    """Figures by task, and what they were measured on."""

    figures: Mapping[str, Figures]
    classes: Classes | None
    split: str
    images: int

    def headlines(self) -> dict[str, float]:
        """The main figure of every task by its name."""
        return {f.headline.name: f.headline.value for f in self.figures.values()}

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; of one task its figures, of several a mapping from task to figures."""
        by_task = {task: figures.to_dict(self._names) for task, figures in self.figures.items()}
        plain = next(iter(by_task.values())) if len(by_task) == 1 else by_task
        return {"task": "+".join(by_task), "split": self.split, "images": self.images, **plain}

    def to_text(self) -> str:
        """A table for people."""
        tables = [f"{task}\n{figures.to_text(self._names)}" for task, figures in self.figures.items()]
        return "\n\n".join([f"{self.split}: {self.images} images", *tables])

    @property
    def _names(self) -> Sequence[str]:
        return self.classes.names if self.classes else ()


def evaluate(predictor: Predictor, dataset: Dataset, split: str, track: Track = untracked) -> Evaluation:
    """Run every image of the split at its own size and score the results; the next images are read meanwhile.

    track(items, total, label): shows progress. Raises InputError where the classes of the model and of the data
    differ, where the data lack the truth or the split, where depth is relative, and for the first file that cannot be
    read: a score without it would be one of another split.
    """
    tasks, classes = predictor.info.tasks, predictor.info.classes
    if "depth" in tasks and predictor.info.depth_unit is not DepthUnit.METRES:
        raise InputError(
            f"{predictor.info.name}: wanted a model of depth in metres, got one of {predictor.info.depth_unit.value} "
            "depth; label the images with denselab predict, and compare the labels with denselab score --task depth "
            "--align inverse"
        )
    dataset.require(tasks)
    check_classes(classes, dataset)
    items = dataset.split(split)
    scores = {task: new_score(task, classes) for task in tasks}
    for image, truth in track(_read_ahead(items, dataset, tasks), len(items), f"evaluating {split}"):
        for task, result in predictor.results_at_own_size(image).items():
            count(scores[task], result, truth)
    return Evaluation({task: score.compute() for task, score in scores.items()}, classes, split, len(items))


def check_classes(classes: Classes | None, dataset: Dataset) -> None:
    """Raise InputError unless model and data name the same classes in the same order; a model without takes any."""
    if classes is None:
        return
    found = dataset.classes.names if dataset.classes else ("none",)
    if classes.names != found:
        raise InputError(
            f"{dataset.root}: wanted the classes of the model ({', '.join(classes.names)}), "
            f"got those of the data ({', '.join(found)}); "
            "take the model that was trained for these classes, or name and order them alike in dataset.yaml"
        )


def _read_ahead(items: Sequence[Item], dataset: Dataset, tasks: Collection[str]) -> Iterator[Labelled]:
    with ThreadPoolExecutor(1, "read") as reader:
        rest = iter(items)
        waiting = [reader.submit(dataset.read, item, tasks) for item in islice(rest, _AHEAD)]
        while waiting:
            labelled = waiting.pop(0).result()
            waiting += [reader.submit(dataset.read, item, tasks) for item in islice(rest, 1)]
            yield labelled
