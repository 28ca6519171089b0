"""Every option of a training run, stated once: the command line, `run.yaml` and the code read them from here.

Nothing here imports torch, so `denselab fit --help` stays fast.
"""

import difflib
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Self, get_args, get_type_hints

import yaml

from denselab.errors import InputError
from denselab.files import atomic_path
from denselab.runtime.artifact import TASKS


class Precision(StrEnum):
    """Arithmetic of the forward pass; `auto` takes what the machine runs fast."""

    AUTO = "auto"
    FP32 = "32"
    BF16 = "bf16"
    FP16 = "16"


class ClassWeighting(StrEnum):
    """How much a class counts in the cross entropy; `inverse-log` is ENet's 1 / ln(1.1 + share of pixels)."""

    NONE = "none"
    INVERSE_LOG = "inverse-log"


class Decay(StrEnum):
    """How the learning rate falls after warm-up."""

    COSINE = "cosine"
    POLY = "poly"


_LOSSES = {"ce": "cross_entropy", "ohem": "ohem", "dice": "dice", "lovasz": "lovasz"}


@dataclass(frozen=True)
class About:
    """What an option is for, its least value, and what happens where it is not given and has no fixed default."""

    text: str
    at_least: float | None = None
    unset: str | None = None


@dataclass(frozen=True)
class FitOptions:
    """One training run. None means: chosen when the run starts, and written into its `run.yaml`.

    Raises InputError for a value out of range.
    """

    data: Annotated[str, About("Data folder, or the YAML that describes it.")] = ""
    out: Annotated[str, About("Run folder: checkpoints, logs, pictures, run.yaml.")] = ""
    task: Annotated[
        str, About("semantic, instance, panoptic, depth, normals, or a sum such as panoptic+0.3*depth.")
    ] = "semantic"
    model: Annotated[str, About("Architecture (denselab catalog lists them).")] = "deeplabv3plus"
    backbone: Annotated[str | None, About("Backbone: a timm model.", unset="the model's own")] = None
    pretrained: Annotated[bool, About("Start from timm's pretrained backbone.")] = False
    start: Annotated[str | None, About("Start from the weights of FILE.ckpt, hf:NAME, kmax:FILE or street.")] = None
    output_stride: Annotated[int | None, About("Stride of the coarsest map, if the model has a choice.", 1)] = None
    width: Annotated[int | None, About("Channels of decoder and head, if the model has a choice.", 8)] = None
    queries: Annotated[int | None, About("Masks that the head predicts, if the model has a choice.", 1)] = None
    norm: Annotated[str | None, About("batch or group norm, if the model has a choice.", unset="batch")] = None
    max_depth: Annotated[float | None, About("Largest depth in metres, for depth.", 0.1, unset="10")] = None
    epochs: Annotated[int | None, About("Passes over the data.", 1, "60; no limit with --max-time")] = None
    max_time: Annotated[str | None, About("Stop after HH:MM:SS; the learning rate then follows the time.")] = None
    batch_size: Annotated[int, About("Images per step and device.", 1)] = 8
    crop: Annotated[str | None, About("Training crop in px, WIDTHxHEIGHT.", unset="as images, up to 512x512")] = None
    zoom_min: Annotated[float | None, About("Smallest random zoom.", 0.01, unset="0.5; 1 for depth")] = None
    zoom_max: Annotated[float | None, About("Largest random zoom.", 0.01, unset="2; 1 for depth")] = None
    flip: Annotated[bool, About("Mirror half of the crops.")] = True
    jitter: Annotated[float, About("Random change of brightness, contrast and saturation; 0 for none.", 0)] = 0.4
    copy_paste: Annotated[float, About("Share of images that get objects of another one pasted in.", 0)] = 0.0
    lr: Annotated[float, About("Highest learning rate (AdamW).", 0)] = 1e-3
    backbone_lr: Annotated[float, About("Learning rate of the backbone as a share of --lr.", 0)] = 1.0
    weight_decay: Annotated[float, About("AdamW weight decay, of weights with two or more dimensions.", 0)] = 0.01
    decay: Annotated[Decay, About("Fall of the learning rate.")] = Decay.COSINE
    warmup_steps: Annotated[int, About("Steps to the full learning rate, at most a tenth of the run.", 0)] = 100
    clip_norm: Annotated[float, About("Clip gradients to this norm; 0 for never.", 0)] = 0.0
    loss: Annotated[
        str | None, About("Loss of classes per pixel, such as ohem, ce+0.5*dice or ce+lovasz.", unset="as published")
    ] = None
    remax: Annotated[bool, About("Relax masks and classes while training (ReMaX); for kmax.")] = False
    class_weights: Annotated[ClassWeighting, About("Class weights of the cross entropy.")] = ClassWeighting.NONE
    ema_decay: Annotated[float, About("Decay of the averaged weights that are evaluated; 0 for none.", 0)] = 0.999
    precision: Annotated[Precision, About("Arithmetic of the forward pass.")] = Precision.AUTO
    devices: Annotated[int | None, About("Processes per machine.", 1, "one per GPU, else one")] = None
    nodes: Annotated[int, About("Machines (started by torchrun or SLURM).", 1)] = 1
    workers: Annotated[int, About("Processes per device that load images.", 0)] = 2
    cache_mb: Annotated[int, About("Keep decoded images in memory if they fit into this.", 0)] = 2000
    picture_epochs: Annotated[int, About("Epochs between pictures of validation images; 0 for none.", 0)] = 5
    seed: Annotated[int, About("Seed of weights, order and augmentation.", 0)] = 0
    licence: Annotated[str, About("Licence of the trained weights, noted in the checkpoint.")] = ""

    def __post_init__(self) -> None:
        """Check ranges."""
        for option in options():
            value, at_least = getattr(self, option.name), option.about.at_least
            if value is not None and at_least is not None and not value >= at_least:
                raise InputError(f"{option.name}: must be at least {at_least}, got {value}")
        for name in ("data", "out"):
            if not getattr(self, name):
                raise InputError(f"{name}: wanted a folder, got none; give --{name}")
        low, high = self.zoom
        if low > high:
            raise InputError(f"zoom_min: must be at most zoom_max {high}, got {low}")
        if self.ema_decay >= 1:
            raise InputError(f"ema_decay: must be below 1, got {self.ema_decay}")
        _ = self.crop_hw, self.max_seconds, self.task_weights, self.loss_weights

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks."""
        return tuple(self.task_weights)

    @property
    def task_weights(self) -> dict[str, float]:
        """How much the loss of each task counts: `panoptic+0.3*depth` is {"panoptic": 1, "depth": 0.3}."""
        weights = _weighted_sum(self.task, TASKS)
        if weights is None:
            raise InputError(f"task: wanted {', '.join(TASKS)} or a sum such as panoptic+0.3*depth, got {self.task!r}")
        return weights

    @property
    def choices(self) -> dict[str, Any]:
        """What was chosen of the model: its own defaults left out."""
        names = ("backbone", "output_stride", "width", "queries", "norm", "max_depth")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def zoom(self) -> tuple[float, float]:
        """Smallest and largest random zoom. For depth none: a zoomed image looks nearer than it is."""
        low, high = (1.0, 1.0) if "depth" in self.tasks else (0.5, 2.0)
        return self.zoom_min or low, self.zoom_max or high

    @property
    def crop_hw(self) -> tuple[int, int] | None:
        """Height and width of the training crop in px."""
        if self.crop is None:
            return None
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", self.crop)
        if not match:
            raise InputError(f"crop: wanted WIDTHxHEIGHT in px such as 352x256, got {self.crop}")
        return int(match[2]), int(match[1])

    @property
    def max_seconds(self) -> float | None:
        """The time limit in seconds."""
        if self.max_time is None:
            return None
        match = re.fullmatch(r"(?:(?:(\d+):)?(\d+):)?(\d+)", self.max_time)
        hours, minutes, rest = (int(part or 0) for part in match.groups()) if match else (0, 0, 0)
        seconds = 3600 * hours + 60 * minutes + rest
        if not seconds:
            raise InputError(f"max_time: wanted HH:MM:SS above zero such as 00:45:00, got {self.max_time}")
        return seconds

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weights by the names of `denselab.losses.pixel.LossWeights`: `ohem+0.5*dice` is {"ohem": 1, "dice": 0.5}."""
        weights = _weighted_sum(self.loss or "ce", _LOSSES)
        if weights is None:
            raise InputError(f"loss: wanted {', '.join(_LOSSES)} or a sum such as ce+0.5*dice, got {self.loss}")
        return {full: weights.get(short, 0.0) for short, full in _LOSSES.items()}

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], source: str = "options") -> Self:
        """Options from plain values. Raises InputError for unknown names, naming the closest, and for wrong types."""
        known = {option.name: option for option in options()}
        for name in values:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                mend = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
                raise InputError(f"{source}: no option is named {name}; {mend}")
        return cls(**{name: _converted(known[name], value, source) for name, value in values.items()})

    @classmethod
    def load(cls, path: Path) -> dict[str, Any]:
        """The values in a YAML file, checked by `from_mapping` once the command line's are laid over them."""
        try:
            values = yaml.safe_load(path.read_text("utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise InputError(f"{path}: wanted a YAML file of options, got {error}") from error
        if not isinstance(values, dict):
            raise InputError(f"{path}: wanted a YAML mapping of option names to values, got {type(values).__name__}")
        return {str(name): value for name, value in values.items()}

    def save(self, path: Path) -> None:
        """Write every option; the file can be given to --config."""
        plain = {name: str(value) if isinstance(value, StrEnum) else value for name, value in asdict(self).items()}
        with atomic_path(path) as partial:
            partial.write_text(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), "utf-8")


@dataclass(frozen=True)
class Option:
    """A field of FitOptions. `kind` is its type without None, which `optional` says it may be too."""

    name: str
    kind: type
    optional: bool
    default: Any
    about: About


@cache
def options() -> tuple[Option, ...]:
    """Every field of FitOptions."""
    hints = get_type_hints(FitOptions, include_extras=True)
    found: list[Option] = []
    for each in fields(FitOptions):
        hint, about = get_args(hints[each.name])
        arms = [arm for arm in get_args(hint) if arm is not type(None)] or [hint]
        found.append(Option(each.name, arms[0], arms[0] is not hint, each.default, about))
    return tuple(found)


def _weighted_sum(text: str, known: Collection[str]) -> dict[str, float] | None:
    """Weights by name of "a+0.5*b"; None where a name is not known or comes twice."""
    weights: dict[str, float] = {}
    for term in text.replace(" ", "").split("+"):
        match = re.fullmatch(r"(?:(\d+\.?\d*|\.\d+)\*)?(\w+)", term)
        if not match or match[2] not in known or match[2] in weights:
            return None
        weights[match[2]] = float(match[1] or 1)
    return weights


def _converted(option: Option, value: object, source: str) -> Any:
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else None
    # YAML 1.1 reads 1e-3 as text, and 00:45:00 as the number 2700
    text = str(number) if number is not None else value if isinstance(value, str) else None
    try:
        if value is None and option.optional:
            return None
        if option.kind is bool and isinstance(value, bool):
            return value
        if option.kind is int and number is not None and number == int(number):
            return int(number)
        if (option.kind is float or issubclass(option.kind, str)) and text is not None:
            return option.kind(text)
    except (ValueError, OverflowError):
        pass
    wanted = " or ".join(option.kind) if issubclass(option.kind, StrEnum) else option.kind.__name__
    raise InputError(f"{source}: {option.name}: wanted {wanted}, got {value!r}")
