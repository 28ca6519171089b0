"""Checkpoints: written whole or not at all, read without running code in them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from denselab.classes import Classes
from denselab.depth_unit import DepthUnit
from denselab.errors import InputError
from denselab.files import atomic_path
from denselab.model import Model
from denselab.tasks.task import Task, make_task
from denselab.zoo import build

KEY = "denselab"
"""Where a checkpoint says, in plain data, what its weights are."""


@dataclass(frozen=True)
class ModelCard:
    """What a checkpoint's weights are.

    tasks: what it was trained for, in order; choices: of the model (backbone, width, ...) that are not its defaults;
    classes: None where no task has any; train_hw: usual size of the training images in px; score: figures and where
    they are from.
    """

    tasks: tuple[str, ...]
    model: str
    choices: Mapping[str, Any]
    classes: Classes | None
    train_hw: tuple[int, int] | None
    score: Mapping[str, Any] | None
    licence: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint or an artifact."""
        return {
            "tasks": list(self.tasks),
            "model": self.model,
            "choices": dict(self.choices),
            "classes": None if self.classes is None else self.classes.to_dict(),
            "train_hw": None if self.train_hw is None else list(self.train_hw),
            "score": None if self.score is None else dict(self.score),
            "licence": self.licence,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "ModelCard":
        """The inverse of `to_dict`."""
        train_hw, classes = data["train_hw"], data["classes"]
        return cls(
            tasks=tuple(data["tasks"]),
            model=data["model"],
            choices=dict(data["choices"]),
            classes=None if classes is None else Classes.from_dict(classes),
            train_hw=None if train_hw is None else (train_hw[0], train_hw[1]),
            score=data["score"],
            licence=data["licence"],
        )

    def build(self) -> Model:
        """The model with new weights."""
        return build(self.model, self.tasks, 0 if self.classes is None else len(self.classes), self.choices)

    def make_tasks(self) -> tuple[Task, ...]:
        """What is asked of the model."""
        return tuple(make_task(name, self.classes) for name in self.tasks)


@dataclass(frozen=True)
class LoadedModel:
    """A trained model, in evaluation mode on the CPU, and what it is.

    network_hw: the size in px at which it runs inside an artifact, None where it runs at any. note: what a user should
    know. depth_unit: of its depth, if it gives any.
    """

    model: Model
    card: ModelCard
    network_hw: tuple[int, int] | None = None
    note: str = ""
    depth_unit: DepthUnit = DepthUnit.METRES


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
