"""Checkpoints: written whole or not at all, read without running code in them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from denselab.classes import Classes
from denselab.errors import InputError
from denselab.files import atomic_path
from denselab.model import DensePredictor
from denselab.zoo import build

KEY = "denselab"
"""Where a checkpoint says, in plain data, what its weights are."""


@dataclass(frozen=True)
class ModelCard:
    """What a checkpoint's weights are.

    train_hw: usual size of the training images in px; score: figures and where they are from.
    """

    model: str
    backbone: str | None
    output_stride: int | None
    classes: Classes
    ignore: int
    train_hw: tuple[int, int] | None
    score: Mapping[str, Any] | None
    licence: str
    task: str = "semantic"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint or an artifact."""
        return {
            "task": self.task,
            "model": self.model,
            "backbone": self.backbone,
            "output_stride": self.output_stride,
            "classes": self.classes.to_dict(),
            "ignore": self.ignore,
            "train_hw": None if self.train_hw is None else list(self.train_hw),
            "score": None if self.score is None else dict(self.score),
            "licence": self.licence,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "ModelCard":
        """The inverse of `to_dict`."""
        train_hw = data["train_hw"]
        return cls(
            model=data["model"],
            backbone=data["backbone"],
            output_stride=data["output_stride"],
            classes=Classes.from_dict(data["classes"]),
            ignore=data["ignore"],
            train_hw=None if train_hw is None else (train_hw[0], train_hw[1]),
            score=data["score"],
            licence=data["licence"],
            task=data["task"],
        )

    def build(self) -> DensePredictor:
        """The model with new weights."""
        return build(self.model, self.backbone, len(self.classes), output_stride=self.output_stride)


@dataclass(frozen=True)
class LoadedModel:
    """A trained model, in evaluation mode on the CPU, and what it is."""

    model: DensePredictor
    card: ModelCard

    @property
    def classes(self) -> Classes:
        """The classes it was trained for."""
        return self.card.classes


def save_atomically(checkpoint: Mapping[str, Any], path: Path) -> None:
    """torch.save; a failure or a kill leaves `path` as it was."""
    with atomic_path(path) as partial, partial.open("wb") as file:  # given a path, torch.save hides a full disk
        torch.save(dict(checkpoint), file)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The contents of a checkpoint, tensors on the CPU. Raises InputError if it is none of ours."""
    if not path.is_file():
        raise InputError(f"{path}: wanted a checkpoint, got no such file; check the path")
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"{path}: wanted a checkpoint of denselab fit, got a file torch cannot load: {reason}"
        ) from error
    if not isinstance(contents, dict) or KEY not in contents:
        raise InputError(f"{path}: wanted a checkpoint of denselab fit, got one without the key '{KEY}'")
    return contents


def load_checkpoint(path: str | Path) -> LoadedModel:
    """The model of a checkpoint with its averaged weights. Raises InputError."""
    contents = read_checkpoint(Path(path))
    card = ModelCard.from_dict(contents[KEY])
    model = card.build()
    prefix = "averaged.model."
    state = contents["state_dict"]
    try:
        model.load_state_dict({name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)})
    except RuntimeError as error:
        raise InputError(f"{path}: the weights do not fit {card.model} as this version builds it: {error}") from error
    return LoadedModel(model.eval(), card)


def note_score(path: Path, score: Mapping[str, Any]) -> None:
    """Write the final figures into a checkpoint that is already there."""
    contents = read_checkpoint(path)
    save_atomically({**contents, KEY: {**contents[KEY], "score": dict(score)}}, path)
