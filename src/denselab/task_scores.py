"""Any task's results against the truth: what validation and evaluation count with. Needs no torch."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from denselab.classes import VOID, Classes
from denselab.data.truth import Truth
from denselab.errors import InputError
from denselab.metrics.depth import DepthScore
from denselab.metrics.instance import InstanceScore
from denselab.metrics.normals import NormalScore
from denselab.metrics.panoptic import PanopticScore
from denselab.metrics.semantic import SemanticScore
from denselab.results import DepthMap, InstanceSet, NormalMap, PanopticMap, Result, SemanticMap
from denselab.rle import encode

Score = SemanticScore | PanopticScore | InstanceScore | DepthScore | NormalScore
"""Counts of one task over a data set: `merge` adds those of another process, `compute` gives the figures."""


def new_score(task: str, classes: Classes | None, boundary: bool = True) -> Score:
    """Counts at zero. boundary: whether semantic scores count boundary IoU, which takes most of their time."""
    match task, classes:
        case "depth", _:
            return DepthScore()
        case "normals", _:
            return NormalScore()
        case "semantic", Classes():
            return SemanticScore(len(classes), VOID, boundary)
        case "panoptic", Classes():
            return PanopticScore(len(classes), classes.things)
        case "instance", Classes():
            return InstanceScore(len(classes))
        case _:
            raise InputError(f"task: wanted one that can be scored, got {_described(task, classes)}")


def count(score: Score, result: Result, truth: Truth) -> None:
    """Count one image. result: of the score's task."""
    match score, result:
        case SemanticScore(), SemanticMap():
            assert truth.class_ids is not None
            score.update(result.class_ids, truth.class_ids)
        case PanopticScore(), PanopticMap():
            assert truth.segments is not None
            score.update(result.to_segments(), truth.segments)
        case InstanceScore(), InstanceSet():
            assert truth.segments is not None
            score.update(result.masks, result.class_ids.tolist(), result.scores.tolist(), truth.segments)
        case DepthScore(), DepthMap():
            assert truth.depth_m is not None
            score.update(result.metres, truth.depth_m)
        case NormalScore(), NormalMap():
            assert truth.normals is not None
            score.update(result.xyz, truth.normals)
        case _:
            raise TypeError(f"result: wanted one for {type(score).__name__}, got {type(result).__name__}")


def true_result(task: str, truth: Truth, classes: Classes | None) -> Result:
    """The truth as if a model had given it, to be drawn."""
    match task, classes:
        case "depth", _:
            assert truth.depth_m is not None
            return DepthMap(truth.depth_m, truth.depth_m > 0)
        case "normals", _:
            assert truth.normals is not None
            return NormalMap(truth.normals)
        case "semantic", Classes():
            assert truth.class_ids is not None
            return SemanticMap(truth.class_ids, classes)
        case "panoptic", Classes():
            assert truth.segments is not None
            return PanopticMap(truth.segments.layers[0], truth.segments.segments, classes)
        case "instance", Classes():
            assert truth.segments is not None
            segments = truth.segments.segments
            return InstanceSet(
                tuple(map(encode, truth.segments.masks())),
                np.array([segment.class_id for segment in segments], np.int32),
                np.ones(len(segments), np.float32),
                truth.segments.hw,
                classes,
            )
        case _:
            raise InputError(f"task: wanted one that can be drawn, got {_described(task, classes)}")


def _described(task: str, classes: Classes | None) -> str:
    return f"{task!r}{'' if classes else ' without classes'}"


def numbers(figures: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Every number in a score's plain data under a flat name; lists of named entries as FIGURE/NAME."""
    found: dict[str, float] = {}
    for key, value in figures.items():
        match value:
            case bool() | str() | None:
                continue
            case int() | float():
                found[prefix + key] = float(value)
            case Mapping():
                found |= numbers(value, f"{prefix}{key}/")
            case list():
                for entry in value:
                    if isinstance(entry, Mapping) and "name" in entry:
                        own = {name: number for name, number in entry.items() if name not in ("name", "id")}
                        found |= {f"{prefix}{name}/{entry['name']}": number for name, number in numbers(own).items()}
            case _:
                continue
    return found
