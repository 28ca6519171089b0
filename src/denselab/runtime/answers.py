"""The outputs of a graph become results: the one place that knows what they are called and how they are coded."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from denselab.classes import VOID, Classes
from denselab.depth_unit import DepthUnit
from denselab.errors import InputError
from denselab.results import DepthMap, InstanceSet, NormalMap, PanopticMap, Result, SemanticMap
from denselab.results.enlarge import nearest
from denselab.results.runs import enlarged
from denselab.segments import Segment

Answers = Mapping[str, NDArray[Any]]
"""Outputs of a graph for one image, by name, without a batch axis."""

_OUTPUTS = {
    "semantic": ("class_ids",),
    "panoptic": ("panoptic_ids", "segment_classes", "segment_scores"),
    "instance": ("instance_masks", "instance_classes", "instance_scores"),
    "depth": ("depth_m",),
    "normals": ("normals",),
}

PER_PIXEL = frozenset({"class_ids", "panoptic_ids", "instance_masks", "depth_m", "normals"})
"""Outputs whose last two axes are height and width."""


def outputs_of(task: str) -> tuple[str, ...]:
    """Names of the outputs that answer a task.

    semantic: class_ids uint8 [H, W]. panoptic: panoptic_ids int32 [H, W], 0 void and n for slot n - 1,
    segment_classes int32 [S] and segment_scores float32 [S] of the slots. instance: instance_masks uint8 [N, H, W] of
    0 and 1, instance_classes int32 [N], instance_scores float32 [N], 0 for unused slots. depth: depth_m float32 [H, W],
    metres, unless the artifact says that they are relative. normals: normals float32 [3, H, W], unit, x right, y down,
    z forward.
    """
    return _OUTPUTS[task]


def to_result(
    task: str,
    answers: Answers,
    classes: Classes | None,
    source_hw: tuple[int, int] | None = None,
    *,
    void: int = VOID,
    model: str = "",
    min_score: float = 0.0,
    depth_unit: DepthUnit = DepthUnit.METRES,
) -> Result:
    """What the answers say of one task, at source_hw; at their own size if not given.

    min_score: instances of lower score are dropped, and so are empty masks and slots of score 0, which are unused.
    Raises InputError where the answers lack an output or hold what is no result.
    """
    missing = [name for name in _OUTPUTS[task] if name not in answers]
    if missing:
        raise InputError(
            f"the model: wanted outputs {missing} for the task {task}, got {sorted(answers)}; export it again"
        )
    match task, classes:
        case "depth", _:
            depth_m = answers["depth_m"].astype(np.float32, copy=False)
            return DepthMap(depth_m, ~(depth_m <= 0), model, source_hw=source_hw, unit=depth_unit)
        case "normals", _:
            return NormalMap(_unit(answers["normals"]), model, source_hw=source_hw)
        case "semantic", Classes():
            class_ids = answers["class_ids"]
            return SemanticMap(nearest(class_ids, source_hw or class_ids.shape[:2]), classes, void, model)
        case "panoptic", Classes():
            ids = answers["panoptic_ids"].astype(np.int32, copy=False)
            return PanopticMap(ids, _segments(ids, answers), classes, model, source_hw=source_hw)
        case "instance", Classes():
            return _instances(answers, classes, source_hw or answers["instance_masks"].shape[1:], model, min_score)
        case _:
            raise InputError(f"classes: wanted those of the task {task}, got none; give the classes of the model")


def _segments(ids: NDArray[np.int32], answers: Answers) -> tuple[Segment, ...]:
    """The slots that have pixels; a segment's id is that of its slot, counted from 1."""
    class_ids, scores = answers["segment_classes"], answers["segment_scores"]
    pixels = np.bincount(ids.clip(0, len(class_ids) + 1).ravel(), minlength=len(class_ids) + 1)
    used = np.flatnonzero(pixels[1 : len(class_ids) + 1]).tolist()
    return tuple(Segment(slot + 1, int(class_ids[slot]), float(scores[slot])) for slot in used)


def _instances(answers: Answers, classes: Classes, hw: tuple[int, ...], model: str, min_score: float) -> InstanceSet:
    masks, class_ids, scores = (answers[name] for name in _OUTPUTS["instance"])
    size_hw = (int(hw[0]), int(hw[1]))
    kept = [i for i in range(len(scores)) if scores[i] > 0 and scores[i] >= min_score and masks[i].any()]
    return InstanceSet(
        tuple(enlarged(masks[i] > 0, size_hw) for i in kept),
        class_ids[kept].astype(np.int32),
        np.minimum(scores[kept], 1).astype(np.float32),
        size_hw,
        classes,
        model,
    )


def _unit(normals: NDArray[Any]) -> NDArray[np.float32]:
    """[3, H, W] to [H, W, 3], of unit length again where an engine computed in 16 bits; zeros stay."""
    vectors = np.ascontiguousarray(normals.transpose(1, 2, 0), np.float32)
    length = np.sqrt(np.einsum("hwc,hwc->hw", vectors, vectors))[:, :, None]
    return np.divide(vectors, length, out=np.zeros_like(vectors), where=length != 0)
