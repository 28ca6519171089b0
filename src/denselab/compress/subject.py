"""What is compressed: a network, how photos become its input, how far an answer moved, and where relevance starts.

Nothing after this file knows whether it works on a classifier or on a dense model of one task or of several.
"""

import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from denselab import _vision as _vision  # before timm, which imports torchvision

# isort: split
import timm
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn

from denselab.checkpoint import LoadedModel
from denselab.compress.graph import ANY_SIZE, Axis
from denselab.compress.relevance import start as starts
from denselab.compress.relevance.scores import Start
from denselab.compress.relevance.sensitivity import Change, kl_change, segments_change, squared_change
from denselab.errors import InputError
from denselab.export.graph import ArtifactGraph
from denselab.export.torch_session import TorchSession, describe
from denselab.model import JointPredictor
from denselab.runtime.predictor import Predictor
from denselab.tasks.blend import blended
from denselab.tasks.semantic import class_scores
from denselab.types import HeadSpec, QueryOutput, ValueKind

if TYPE_CHECKING:
    from denselab.hub.image_classifier import HubClassifier

TIMM = "timm:"
MOST_PX = 1_000_000
"""Dense models see photos of calibration shrunk to so many pixels: an observed batch must fit in memory."""

_WITH_CLASSES = ("semantic", "panoptic", "instance")


@dataclass(frozen=True, eq=False)
class Classifier:
    """mean, std: of normalised pixels, RGB in [0, 1]. data: how photos are resized and cropped, for whoever runs the
    file: timm's own data config, or the settings of an image processor of transformers.

    names: of the classes, None where the model does not say.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    data: Mapping[str, Any]
    classes: int
    names: tuple[str, ...] | None


@dataclass(frozen=True, eq=False)
class Dense:
    """A model that answers every pixel, and what is known of it."""

    loaded: LoadedModel


@dataclass(frozen=True, eq=False)
class Subject:
    """A network to compress.

    network: in evaluation mode; takes pixels [B, 3, H, W] that `pixels` makes. free: dimensions that its file leaves
    open. seen: the photo as the network sees it, uint8 [3, H, W]. pixels: a batch of those as its input. change: how
    far an answer is from another. start: what relevance is asked about. likelihood: the start of the Fisher
    information.
    """

    name: str
    kind: Classifier | Dense
    network: nn.Module
    free: frozenset[Axis]
    seen: Callable[[NDArray[Any]], UInt8[Tensor, "3 H W"]]
    pixels: Callable[[Tensor], Float[Tensor, "B 3 H W"]]
    change: Change
    start: Start
    likelihood: Start
    licence: str
    note: str = ""


class Photos:
    """Calibration photos as batches that a captured network takes; every loop starts anew.

    Photos of one size that follow each other are taken together, `at_once` at most.
    """

    def __init__(self, subject: Subject, seen: tuple[UInt8[Tensor, "3 H W"], ...], at_once: int = 8) -> None:
        self._pixels = subject.pixels
        self.images = len(seen)
        self.groups: list[tuple[Tensor, ...]] = []
        for photo in seen:
            last = self.groups[-1] if self.groups else ()
            if last and last[0].shape == photo.shape and len(last) < at_once:
                self.groups[-1] = (*last, photo)
            else:
                self.groups.append((photo,))

    def __iter__(self):
        for group in self.groups:
            yield self._pixels(torch.stack(group))

    def __len__(self) -> int:
        return len(self.groups)


def open_classifier(source: str, weights: Path | None = None) -> Subject:
    """timm:NAME with a file of weights (.safetensors or .pth), or timm:FOLDER as timm's "local-dir:" reads it.

    Nothing is fetched. Raises InputError: unknown model, no weights, weights that do not fit, a damaged file.
    """
    name = source.removeprefix(TIMM)
    if not name:
        raise InputError(f"{source}: wanted timm:NAME, or timm:FOLDER that timm saved; give one")
    network = _from_folder(Path(name), weights) if Path(name).is_dir() else _from_weights(name, weights)
    data = cast("dict[str, Any]", resolve_model_data_config(network))
    classes = int(network.num_classes)
    if classes < 1:
        raise InputError(f"{source}: wanted a classifier, got a model without classes; give one with a head")
    if data["input_size"][0] != 3:
        raise InputError(f"{source}: wanted a model of RGB photos, got {data['input_size'][0]} channels")
    names = cast("dict[str, Any]", network.pretrained_cfg).get("label_names")
    kind = Classifier(tuple(data["mean"]), tuple(data["std"]), data, classes, tuple(map(str, names)) if names else None)
    wanted = ("input_size", "interpolation", "crop_pct", "crop_mode")
    options = {option: data[option] for option in wanted if option in data}
    transform: Any = create_transform(**options, is_training=False, normalize=False)
    licence = str(cast("dict[str, Any]", network.pretrained_cfg).get("license") or "unknown")
    return _classifier(Path(name).name, kind, network, lambda photo: transform(Image.fromarray(photo)), licence)


def hub_classifier_subject(hub: "HubClassifier") -> Subject:
    """An image classifier of transformers that was opened."""
    data = {"input_size": [3, *hub.hw], "mean": hub.mean, "std": hub.std, "image_processor": hub.preparation}
    kind = Classifier(hub.mean, hub.std, data, hub.classes, hub.names)
    return _classifier(Path(hub.source).name, kind, hub.network, hub.seen, hub.licence)


def dense_subject(loaded: LoadedModel, name: str) -> Subject:
    """A dense model that was opened, of one task or of several."""
    model = loaded.model.eval().requires_grad_(False)
    tasks = loaded.card.tasks
    if isinstance(model, JointPredictor):
        of_task = {task: model.specs[task] for task in tasks}
        change = _several_changes({task: dense_change(task, spec) for task, spec in of_task.items()})
        start = _several_starts({task: dense_start(task, spec) for task, spec in of_task.items()})
        likelihood = _several_starts({task: dense_likelihood(task, spec) for task, spec in of_task.items()})
    else:
        change = dense_change(tasks[0], model.spec)
        start = dense_start(tasks[0], model.spec)
        likelihood = dense_likelihood(tasks[0], model.spec)
    return Subject(
        name=name,
        kind=Dense(loaded),
        network=model,
        free=ANY_SIZE if loaded.network_hw is None else frozenset({Axis.BATCH}),
        seen=_seen_by_dense(loaded),
        pixels=lambda seen: seen.float() / 255,
        change=change,
        start=start,
        likelihood=likelihood,
        licence=loaded.card.licence,
        note=loaded.note,
    )


def dense_change(task: str, spec: HeadSpec) -> Change:
    """How far the answer of a head moved: a divergence of classes and segments, a relative error, an angle.

    Classes of pixels: KL, in the mean over pixels. Masks that say classes: `segments_change`. Centres and offsets: KL
    of the classes plus the relative squared error of the rest. Depth: the relative squared error. Normals: 1 - cosine.
    """
    if spec.value_kind is ValueKind.CLASS_LOGITS:
        return segments_change(spec)
    if task == "depth":
        return lambda output, wanted: squared_change(blended(output, spec), blended(wanted, spec))
    if task == "normals":
        return lambda output, wanted: _angles(blended(output, spec), blended(wanted, spec))
    classes = kl_change(logits=lambda output: class_scores(output, spec))
    if spec.value_kind is ValueKind.CENTRE_OFFSET:
        return lambda output, wanted: (
            classes(output, wanted) + squared_change(output.mask_logits[:, -3:], wanted.mask_logits[:, -3:])
        )
    return classes


def dense_start(task: str, spec: HeadSpec) -> Start:
    """What relevance of a head is asked about (see `relevance.start`)."""
    match task:
        case "depth":
            return starts.depth(spec)
        case "normals":
            return starts.normals(spec)
        case "panoptic" | "instance" if spec.value_kind is ValueKind.CLASS_LOGITS:
            return starts.segments(spec)
        case _:
            return starts.classes(spec)


def dense_likelihood(task: str, spec: HeadSpec) -> Start:
    """The log probability of the winning classes; of numbers, which have none, what `dense_start` begins with."""
    if task not in _WITH_CLASSES:
        return dense_start(task, spec)
    if spec.value_kind is ValueKind.CLASS_LOGITS:
        return lambda output: class_scores(output, spec).amax(dim=1).clamp(min=1e-6).log().flatten(1).sum(dim=1)
    return lambda output: starts.log_likelihood(class_scores(output, spec))


def _classifier(
    name: str, kind: Classifier, network: nn.Module, seen: Callable[[NDArray[Any]], Tensor], licence: str
) -> Subject:
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (kind.mean, kind.std))
    return Subject(
        name=name,
        kind=kind,
        network=network.eval().requires_grad_(False),
        free=frozenset({Axis.BATCH}),
        seen=seen,
        pixels=lambda seen: (seen.float() / 255 - mean) / std,
        change=kl_change(),
        start=starts.logit,
        likelihood=starts.log_likelihood,
        licence=licence,
    )


def _angles(got: Float[Tensor, "B 3 h w"], wanted: Float[Tensor, "B 3 h w"]) -> Float[Tensor, "B"]:
    return (1 - F.cosine_similarity(got, wanted, dim=1)).flatten(1).mean(dim=1)


def _several_changes(changes: Mapping[str, Change]) -> Change:
    """The mean over tasks."""

    def change(output: Mapping[str, QueryOutput], wanted: Mapping[str, QueryOutput]) -> Tensor:
        return torch.stack([each(output[task], wanted[task]) for task, each in changes.items()]).mean(dim=0)

    return change


def _several_starts(begins: Mapping[str, Start]) -> Start:
    """The sum over tasks, each relative to its own size, so that metres do not drown logits."""

    def start(output: Mapping[str, QueryOutput]) -> Tensor:
        each = [begin(output[task]) for task, begin in begins.items()]
        return torch.stack([value / value.detach().abs().clamp(min=1e-6) for value in each]).sum(dim=0)

    return start


def _seen_by_dense(loaded: LoadedModel) -> Callable[[NDArray[Any]], UInt8[Tensor, "3 H W"]]:
    """As the predictor shrinks photos, and to at most MOST_PX; to the network's own size where it has one."""
    graph = ArtifactGraph(loaded.model, loaded.card.make_tasks(), loaded.network_hw)
    predictor = Predictor(TorchSession(graph), describe(loaded, loaded.card.model))

    def seen(photo: NDArray[Any]) -> Tensor:
        height, width = loaded.network_hw or predictor.seen_hw((photo.shape[0], photo.shape[1]))
        scale = min(1.0, (MOST_PX / (height * width)) ** 0.5)
        hw = (max(1, int(height * scale)), max(1, int(width * scale)))
        picture = Image.fromarray(photo)
        if hw != photo.shape[:2]:
            picture = picture.resize((hw[1], hw[0]), Image.Resampling.BILINEAR, reducing_gap=3)
        return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(*hw, 3).permute(2, 0, 1)

    return seen


def _from_folder(folder: Path, weights: Path | None) -> Any:
    config = folder / "config.json"
    try:
        architecture = json.loads(config.read_bytes())["architecture"]
    except FileNotFoundError as error:
        raise InputError(f"{folder}: wanted a folder that timm saved, got one without config.json") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{config}: wanted timm's description of a model, but it is damaged ({error})") from error
    files = [folder / name for name in ("model.safetensors", "pytorch_model.bin") if (folder / name).is_file()]
    if not weights and not files:
        raise InputError(f"{folder}: wanted weights, got no model.safetensors; save the model again or give --weights")
    file = weights or files[0]
    return _created(f"local-dir:{folder}", str(architecture), file, {})


def _from_weights(name: str, weights: Path | None) -> Any:
    if not timm.is_model(name.partition(".")[0]):
        close = difflib.get_close_matches(name, timm.list_models(), 1)
        hint = f"; did you mean {TIMM}{close[0]}?" if close else ", or a folder that timm saved"
        raise InputError(f"model: wanted timm:NAME of a model that timm has, got {name!r}{hint}")
    if weights is None:
        raise InputError(f"{TIMM}{name}: wanted trained weights; give --weights FILE (.safetensors or .pth)")
    return _created(name, name, weights, {"num_classes": _classes_in(name, weights)})


def _created(name: str, shown: str, weights: Path, options: Mapping[str, Any]) -> Any:
    """The model with the tensors of a file, changed as timm changes older checkpoints."""
    state = _state(weights)
    try:
        network = timm.create_model(name, pretrained=False, **options)
        overlay = {"state_dict": state, "num_classes": network.num_classes, "custom_load": False, "label_offset": 0}
        if not name.startswith("local-dir:"):
            return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **options)
        network.load_state_dict(state)
    except Exception as error:  # timm raises whatever its builders and filters do
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{weights}: wanted the weights of {shown}, but they do not fit ({reason})") from error
    return network


def _classes_in(name: str, weights: Path) -> int:
    """How many classes the weights know: the rows of the layer that timm names as the classifier."""
    config = timm.get_pretrained_cfg(name.partition(".")[0])
    layers = getattr(config, "classifier", None) or "head"
    layer = layers if isinstance(layers, str) else layers[0]
    matrix = _state(weights).get(f"{layer}.weight")
    if matrix is None:
        raise InputError(f"{weights}: wanted the weights of a classifier {name}, got none named {layer}.weight")
    return len(matrix)


def _state(weights: Path) -> dict[str, Tensor]:
    """The tensors of a file by name; nothing in it is run."""
    if not weights.is_file():
        raise InputError(f"{weights}: wanted a file of weights, got no such file; check the path")
    try:
        if weights.suffix == ".safetensors":
            return load_file(weights)
        found = torch.load(weights, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise InputError(f"{weights}: wanted a file of weights, but it is damaged ({error})") from error
    except Exception as error:  # unpickling has many
        reason = str(error).partition("\n")[0] or "it is empty or cut off"
        raise InputError(f"{weights}: wanted a file of weights, but torch cannot load it: {reason}") from error
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
            break
    if not isinstance(found, dict) or not found or not all(isinstance(each, Tensor) for each in found.values()):
        raise InputError(f"{weights}: wanted a file of weights, got something else; save model.state_dict()")
    return {name.removeprefix("module."): value for name, value in found.items()}
