"""denselab.from_hf: a pretrained model of the Hugging Face hub, or of a folder, as one of ours."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from denselab import _vision as _vision  # before transformers, which imports torchvision

# isort: split
from transformers import (
    DepthAnythingForDepthEstimation,
    DPTForDepthEstimation,
    DPTForSemanticSegmentation,
    EomtForUniversalSegmentation,
    Mask2FormerForUniversalSegmentation,
    PreTrainedModel,
    SegformerForSemanticSegmentation,
)

from denselab.classes import Classes
from denselab.errors import InputError
from denselab.hub.coco_names import COCO_NAMES, COCO_THINGS
from denselab.hub.dpt import LEAST_INVERSE_DEPTH, depth_anything, dpt
from denselab.hub.eomt import eomt, masked_blocks
from denselab.hub.mask2former import mask2former
from denselab.hub.parts import HubModel, HubSettings, thing_ids
from denselab.hub.saved import Saved, architecture_of, check_complete, class_names, pixel_statistics
from denselab.hub.segformer import segformer
from denselab.model import DensePredictor

_FAMILIES: dict[str, tuple[type[PreTrainedModel], Callable[[Any, HubSettings], DensePredictor]]] = {
    net.__name__: (net, family)
    for net, family in (
        (SegformerForSemanticSegmentation, segformer),
        (DPTForDepthEstimation, dpt),
        (DPTForSemanticSegmentation, dpt),
        (DepthAnythingForDepthEstimation, depth_anything),
        (Mask2FormerForUniversalSegmentation, mask2former),
        (EomtForUniversalSegmentation, eomt),
    )
}


def from_hf(
    source: str | Path,
    *,
    task: str | None = None,
    things: Sequence[int | str] | None = None,
    metric_depth: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> HubModel:
    """Load a model that transformers saved, with weights in safetensors: SegFormer, DPT, Depth Anything, Mask2Former
    or EoMT.

    source: a folder, or a name on the hub ("org/name"), fetched and cached by transformers at `revision` with `token`.
    task: what masks with classes are: semantic, instance or panoptic. things: ids or names of the classes whose objects
        are told apart. Files on the hub say neither. With neither given, COCO's 133 classes are panoptic (the first 80
        are things), COCO's 80 are instance, all others semantic; with things given, panoptic.
    metric_depth: whether depth is in metres. Depth Anything says that itself; DPT counts as relative unless told.

    Relative networks give inverse depth of unknown scale and shift; depth is then 1 / max(inverse, 1e-3), so that
    farther is more, and must be aligned, in inverse depth, before it is scored.
    Raises InputError: no such folder or model, not reachable or not permitted, another architecture, weights that are
    missing or no safetensors, no file on normalisation, options that do not fit.
    """
    saved = Saved(source, revision, token)
    config = saved.config()
    architecture = architecture_of(config)
    if architecture not in _FAMILIES:
        raise InputError(
            f"{saved.name}: wanted one of {', '.join(_FAMILIES)}, got the architecture {architecture} "
            f"(model_type {config.model_type}); choose another model"
        )
    net_class, family = _FAMILIES[architecture]
    processor = saved.processor()
    net, missing = saved.network(net_class)
    relative = _is_relative(net, metric_depth)
    settings = HubSettings(
        *pixel_statistics(processor),
        relative,
        masked_blocks(net) if isinstance(net, EomtForUniversalSegmentation) else (),
    )
    model = family(net, settings)
    check_complete(saved.name, net, _lacking(net, model, missing))
    tasks, classes, notes = _meaning(net, task, things)
    if relative:
        notes.append(
            "Depth is relative: its inverse is known up to scale and shift. Align it before scoring; it is in no unit "
            f"and ends at {1 / LEAST_INVERSE_DEPTH:g}."
        )
    if getattr(processor, "do_reduce_labels", False):
        notes.append("Class 0 is 1 in the masks of its training data, where 0 is void (do_reduce_labels).")
    train_hw = _usual_hw(processor.size)
    # Window and deformable attention trace at one size only; tracing a hybrid at any size took over 15 minutes.
    fixed = isinstance(net, Mask2FormerForUniversalSegmentation) or getattr(config, "is_hybrid", False)
    return HubModel(
        model.eval(),
        saved.name,
        tasks,
        classes,
        relative,
        train_hw,
        train_hw if fixed else None,
        saved.licence(),
        " ".join(notes),
    )


def _lacking(net: PreTrainedModel, model: DensePredictor, missing: Sequence[str]) -> list[str]:
    """Of the missing tensors those that our model uses."""
    used = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    owned = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    return sorted(key for key in missing if key in owned and id(owned[key]) in used)


def _is_relative(net: PreTrainedModel, metric_depth: bool | None) -> bool:
    config: Any = net.config
    match net:
        case DepthAnythingForDepthEstimation():
            says_metric = config.depth_estimation_type == "metric"
            if metric_depth not in (None, says_metric):
                raise InputError(
                    f"metric_depth: wanted what the model says itself (depth_estimation_type: "
                    f"{config.depth_estimation_type}), got {metric_depth}; leave it out"
                )
            return not says_metric
        case DPTForDepthEstimation():
            return not metric_depth
        case _:
            if metric_depth is not None:
                raise InputError(f"metric_depth: {type(net).__name__} gives no depth, got {metric_depth}; leave it out")
            return False


def _meaning(
    net: PreTrainedModel, task: str | None, things: Sequence[int | str] | None
) -> tuple[tuple[str, ...], Classes | None, list[str]]:
    """Tasks, classes and notes."""
    match net:
        case DPTForDepthEstimation() | DepthAnythingForDepthEstimation():
            _only("depth", net, task, things)
            return ("depth",), None, []
        case SegformerForSemanticSegmentation() | DPTForSemanticSegmentation():
            _only("semantic", net, task, things)
            return ("semantic",), Classes.named(_names(net)), []
        case _:
            return _meaning_of_masks(_names(net), task, things)


def _only(only: str, net: PreTrainedModel, task: str | None, things: Sequence[int | str] | None) -> None:
    if task not in (None, only):
        raise InputError(f"task: {type(net).__name__} wanted {only}, got {task!r}; leave it out")
    if things:
        raise InputError(f"things: {type(net).__name__} tells no objects apart, got {list(things)}; leave them out")


def _meaning_of_masks(
    names: tuple[str, ...], task: str | None, things: Sequence[int | str] | None
) -> tuple[tuple[str, ...], Classes, list[str]]:
    ids = None if things is None else thing_ids(names, things)
    is_coco = names[:1] == ("person",) and names[COCO_THINGS - 1 : COCO_THINGS] == ("toothbrush",)
    if ids is None and is_coco and len(names) in (COCO_THINGS, len(COCO_NAMES)):
        ids = tuple(range(COCO_THINGS))
    notes: list[str] = []
    if task is None:
        task = "semantic" if not ids else "instance" if len(ids) == len(names) else "panoptic"
        if things is None and not ids:
            notes.append("Its files do not say what the masks are: taken as semantic. Else give task= and things=.")
    match task:
        case "semantic":
            return ("semantic",), Classes.named(names), notes
        case "instance":
            return ("instance",), Classes.named(names, range(len(names))), notes
        case "panoptic":
            if not ids:
                raise InputError("things: panoptic needs the classes whose objects are told apart, got none; name them")
            return ("panoptic", "semantic"), Classes.named(names, ids), notes
        case _:
            raise InputError(f"task: wanted semantic, instance or panoptic, got {task!r}")


def _names(net: PreTrainedModel) -> tuple[str, ...]:
    labels: Any = net.config.id2label
    return class_names(labels)


def _usual_hw(size: Any) -> tuple[int, int] | None:
    """Height and width of a training photo of 4:3, as an image processor resizes it."""
    if not size:
        return None
    if size.get("height") and size.get("width"):
        return size["height"], size["width"]
    shortest, longest = size.get("shortest_edge"), size.get("longest_edge")
    return (shortest, min(longest or math.inf, round(shortest * 4 / 3))) if shortest else None
