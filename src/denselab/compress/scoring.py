"""What a subject is scored and compared on; how good a session is, and how often two say the same."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol, assert_never

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from denselab.compress.classifier_file import LOGITS
from denselab.compress.photos import Labelled, PhotoFile, labelled
from denselab.compress.subject import Classifier, Dense, Subject
from denselab.data.dataset import Dataset
from denselab.data.descriptor import open_dataset
from denselab.evaluate import check_classes, evaluate
from denselab.export.examples import PARITY_SPLITS, Examples, from_dataset
from denselab.export.parity import CLOSE_IN_FEW_BITS, Answers, agreement
from denselab.export.torch_session import describe
from denselab.metrics.headline import Headline
from denselab.runtime.predictor import Predictor
from denselab.runtime.session import Session

_COMPARED = 16

Photo = NDArray[np.uint8]


class Track(Protocol):
    """Shows how far a loop is."""

    def __call__(self, items: Iterable[Any], total: int, label: str, /) -> Iterable[Any]: ...


@dataclass(frozen=True, eq=False)
class Data:
    """What a subject is scored on. source: as the user gave it."""

    source: Path
    split: str
    images: int
    held: Dataset | Labelled


def open_data(subject: Subject, source: Path) -> Data:
    """Labelled photos: for a classifier folders of classes, else a data set. Raises InputError if unlike the model."""
    match subject.kind:
        case Classifier(classes=classes, names=names):
            found = labelled(source, names, classes)
            return Data(source, found.split, len(found.photos), found)
        case Dense(loaded):
            dataset = open_dataset(source)
            dataset.require(loaded.card.tasks)
            check_classes(loaded.card.classes, dataset)
            split = next(name for name in (*PARITY_SPLITS, *dataset.splits) if dataset.splits.get(name))
            return Data(source, split, len(dataset.split(split)), dataset)
        case _:
            assert_never(subject.kind)


def photos_to_compare(subject: Subject, data: Data | None, seen: Sequence[Tensor]) -> Examples:
    """Photos [H, W, 3] on which files and networks are compared: of the data if there are any, else of calibration."""
    most = 4 * _COMPARED if isinstance(subject.kind, Classifier) else _COMPARED
    if data is not None and isinstance(data.held, Dataset):
        assert isinstance(subject.kind, Dense)
        found = from_dataset(data.held, subject.kind.loaded.card.tasks, (data.split,), most)
        return replace(found, truths=None)
    if data is not None and isinstance(data.held, Labelled):
        every = data.held.photos
        step = max(1, len(every) // most)
        images = tuple(photo_array(subject.seen(photo.read())) for photo, _ in every[::step][:most])
        return Examples(f"{data.source.name} {data.split}", images)
    return Examples("calibration photos", tuple(photo_array(each) for each in seen[:most]))


def score(subject: Subject, session: Session, data: Data, track: Track, label: str) -> list[Headline]:
    """The figures that rank, of the whole split. Raises InputError for a photo that cannot be read."""
    match subject.kind, data.held:
        case Dense(loaded), Dataset() as dataset:
            predictor = Predictor(session, describe(loaded, subject.name))

            def tracked(items: Iterable[Any], total: int, _: str) -> Iterable[Any]:
                return track(items, total, label)

            return [each.headline for each in evaluate(predictor, dataset, data.split, tracked).figures.values()]
        case Classifier(), Labelled(photos=photos):
            right = 0

            def said(photo: PhotoFile) -> int:
                return _class_of(session, photo_array(subject.seen(photo.read())))

            for photo, wanted in track(photos, len(photos), label):
                right += said(photo) == wanted
            return [Headline("top-1", right / len(photos), higher_is_better=True)]
        case _:
            raise AssertionError


def same_answers(subject: Subject, full: Session, small: Sequence[Answers], images: Sequence[Photo]) -> float:
    """Share of answers that a session gives too: of photos, or of pixels (`parity.agreement`; the least of tasks)."""
    both = [(full.run(photo), got) for photo, got in zip(images, small, strict=True)]
    match subject.kind:
        case Classifier():
            return fmean(float(wanted[LOGITS].argmax() == got[LOGITS].argmax()) for wanted, got in both)
        case Dense(loaded):
            unit = loaded.depth_unit
            return min(
                fmean(agreement(task, *each, CLOSE_IN_FEW_BITS, unit) for each in both) for task in loaded.card.tasks
            )
        case _:
            assert_never(subject.kind)


class Asked:
    """A function of seen photos, asked for the class of one [H, W, 3] as engines are."""

    def __init__(self, logits: Callable[[Tensor], Tensor], engine: str = "torch") -> None:
        self._logits = logits
        self.engine = engine

    @torch.no_grad()
    def run(self, image: Photo) -> dict[str, NDArray[Any]]:
        """logits [K]."""
        return {LOGITS: self._logits(photo_tensor(image))[0].numpy()}


def photo_tensor(photo: Photo) -> Tensor:
    """A photo [H, W, 3] as [1, 3, H, W]."""
    return torch.tensor(photo).permute(2, 0, 1)[None]


def photo_array(seen: Tensor) -> Photo:
    """A photo [3, H, W] as [H, W, 3]."""
    return np.ascontiguousarray(seen.permute(1, 2, 0).numpy())


def _class_of(session: Session, photo: Photo) -> int:
    return int(session.run(photo)[LOGITS].argmax())


def all_logits(session: Session, images: Sequence[Photo]) -> NDArray[np.floating]:
    """[photos, classes]."""
    return np.stack([session.run(photo)[LOGITS] for photo in images])
