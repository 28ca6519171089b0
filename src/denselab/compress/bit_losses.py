"""What bits lose at every group of sites: as it was measured, saved in a file, and as an importance weighs it.

A group (`site_groups`) loses the sum of what its two sides lose. With S the change of the output
(`Calibration.change`) when one side alone is quantized, e the error of a site, and R relevance, the loss of a side at b
bits is one of `Importance`:

    SENSITIVITY               S_b                     ZeroQ (Cai et al., CVPR 2020); Mix-QViT's sensitivity
    LRP_TIMES_SENSITIVITY     Omega S_b               Mix-QViT (Ranjan and Savakis, arXiv:2501.06357)
    LRP                       Omega E_b               LRP-QViT (Ranjan and Savakis, arXiv:2401.11243)
    GRADIENT_TIMES_ACTIVATION Omega E_b               the same, with R = |x df/dx| (Molchanov et al., ICLR 2017)
    FISHER                    sum F e^2               diagonal of the empirical Fisher matrix (BRECQ, Li et al., ICLR
                                                      2021; HAWQ-V2, Dong et al., NeurIPS 2020, has a Hessian's trace)
    UNIFORM                   E_b                     no site counts more than another
    RANDOM                    u E_b                   u even in 0..1, of each side: what chance would choose

E_b is the sum over the side's sites of |x^ - x|^2 / |x - mean|^2, the mean of each channel: noise to signal, which no
folding of scales into other layers changes much. Omega is the side's R over the mean R of its kind: sides at the same
place of repeated blocks, paths that differ in numbers alone. (The papers' code is not public. That scores are
normalised within kinds is theirs; that kinds have mean 1, so that one with fewer blocks does not count more, and that
errors are squared and relative, is ours.) F e^2 is computed element by element. S at a width where it was not measured
is that at the nearest measured one, times E_b / E of that. No loss grows with bits: what noise makes look worse counts
as no better.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, assert_never

import numpy as np

from denselab.compress.graph import Graph
from denselab.compress.plan import Kept
from denselab.compress.saved_file import check_version, reading
from denselab.compress.site_groups import site_groups
from denselab.compress.sites import ModelHash
from denselab.errors import InputError
from denselab.files import write_json

MEASURED_FORMAT = 1


class Importance(Enum):
    """What a side of a group loses at so many bits: see the formulas above."""

    SENSITIVITY = "sensitivity"
    LRP = "lrp"
    LRP_TIMES_SENSITIVITY = "lrp x sensitivity"
    FISHER = "fisher"
    GRADIENT_TIMES_ACTIVATION = "gradient x activation"
    UNIFORM = "uniform"
    RANDOM = "random"


@dataclass(frozen=True)
class Side:
    """The weights of a group, or its activations, quantized together and nothing else.

    errors: E by bits. changes: S at the bits where it was measured. fisher: by bits. lrp, gradient: relevance, in the
    mean over images. Empty or None: not measured. parameter_bytes: of scales and zero points on disk.
    """

    errors: Mapping[int, float]
    changes: Mapping[int, float] = field(default_factory=dict[int, float])
    fisher: Mapping[int, float] = field(default_factory=dict[int, float])
    lrp: float | None = None
    gradient: float | None = None
    parameter_bytes: int = 0


@dataclass(frozen=True)
class Interaction:
    """What two groups lose more together: share of sqrt(loss of one times loss of the other)."""

    first: str
    second: str
    share: float


@dataclass(frozen=True)
class Measured:
    """`sensitivity.json`: what was measured of both sides of every group by its key.

    method: whose quantizers. images: how many. kept: what stays at 8 bits, and is not measured; nor are activations
    for budgets that do not count their bits. interactions: of pairs of groups, where asked for.
    """

    model: ModelHash
    method: str
    images: int
    kept: frozenset[Kept]
    weights: Mapping[str, Side]
    activations: Mapping[str, Side]
    interactions: tuple[Interaction, ...] = ()

    @property
    def of_activations(self) -> bool:
        """Whether activations were measured, as budgets need that count their bits."""
        return any(side.errors for side in self.activations.values())

    def write(self, path: Path) -> None:
        """As readable JSON, atomically."""
        data = {
            "format_version": MEASURED_FORMAT,
            "model": vars(self.model),
            "method": self.method,
            "images": self.images,
            "kept_at_8_bits": sorted(each.value for each in self.kept),
            "weights": {key: vars(side) for key, side in self.weights.items()},
            "activations": {key: vars(side) for key, side in self.activations.items()},
            "interactions": [vars(each) for each in self.interactions],
        }
        write_json(path, data)

    @classmethod
    def read(cls, path: Path, graph: Graph) -> "Measured":
        """Raises InputError, naming the file: missing, damaged, a newer format, made for another model."""
        with reading(path, "what bits lose at every site", "measure it again"):
            data = json.loads(path.read_bytes())
            check_version(path, data["format_version"], MEASURED_FORMAT)
            weights, activations = (
                {key: _side(entry) for key, entry in data[name].items()} for name in ("weights", "activations")
            )
            kept = frozenset(Kept(each) for each in data["kept_at_8_bits"])
            interactions = tuple(Interaction(**each) for each in data["interactions"])
            model, images = ModelHash(**data["model"]), int(data["images"])
            measured = cls(model, str(data["method"]), images, kept, weights, activations, interactions)
        graph.model.check_same(measured.model, path)
        wanted = {group.key for group in site_groups(graph, measured.kept)}
        for found in (measured.weights, measured.activations):
            if unlike := wanted ^ found.keys():
                raise InputError(f"{path}: wanted the groups of this model, mend {min(unlike)!r}; measure it again")
        return measured


def side_losses(
    measured: Measured, importance: Importance, seed: int = 0
) -> tuple[dict[str, dict[int, float]], dict[str, dict[int, float]]]:
    """What the weights, and what the activations, of every group lose by bits; empty where they are kept.

    Raises InputError if that was not measured.
    """
    both = (measured.weights, measured.activations)
    losses: list[dict[str, dict[int, float]]] = []
    random = np.random.default_rng(seed)
    for sides in both:
        omega = _omegas(sides, importance, random)
        losses.append({key: _losses(key, side, importance, omega[key]) for key, side in sides.items()})
    return losses[0], losses[1]


def within_kinds(scores: Mapping[str, float]) -> dict[str, float]:
    """Omega: scores over the mean score of their kind, which are keys that differ in numbers alone; 1 if that is 0."""
    kinds: dict[str, list[float]] = {}
    for key, score in scores.items():
        kinds.setdefault(_kind(key), []).append(score)
    means = {kind: math.fsum(each) / len(each) for kind, each in kinds.items()}
    return {key: score / means[_kind(key)] if means[_kind(key)] else 1.0 for key, score in scores.items()}


def _kind(key: str) -> str:
    """What is the same of sites at the same place of repeated blocks."""
    return re.sub(r"\d+", "#", key)


def _omegas(sides: Mapping[str, Side], importance: Importance, random: np.random.Generator) -> dict[str, float]:
    """What the loss of every side is multiplied with."""
    match importance:
        case Importance.SENSITIVITY | Importance.FISHER | Importance.UNIFORM:
            return dict.fromkeys(sides, 1.0)
        case Importance.RANDOM:
            return {key: float(random.uniform()) for key in sides}
        case Importance.LRP | Importance.LRP_TIMES_SENSITIVITY:
            scores = {key: _measured(key, side.lrp, importance) for key, side in sides.items()}
        case Importance.GRADIENT_TIMES_ACTIVATION:
            scores = {key: _measured(key, side.gradient, importance) for key, side in sides.items()}
        case _:
            assert_never(importance)
    return within_kinds(scores)


def _measured(key: str, score: float | None, importance: Importance) -> float:
    if score is None:
        raise InputError(f"importance: {importance.value} was not measured at {key!r}; measure it first")
    return score


def _losses(key: str, side: Side, importance: Importance, omega: float) -> dict[int, float]:
    if not side.errors:
        return {}
    match importance:
        case Importance.SENSITIVITY | Importance.LRP_TIMES_SENSITIVITY:
            if not side.changes:
                raise InputError(f"importance: {importance.value} was not measured at {key!r}; measure it first")
            losses = {bits: _change_at(bits, side) for bits in side.errors}
        case Importance.FISHER:
            if not side.fisher:
                raise InputError(f"importance: {importance.value} was not measured at {key!r}; measure it first")
            losses = dict(side.fisher)
        case Importance.LRP | Importance.GRADIENT_TIMES_ACTIVATION | Importance.UNIFORM | Importance.RANDOM:
            losses = dict(side.errors)
        case _:
            assert_never(importance)
    least = 0.0
    found: dict[int, float] = {}
    for bits in sorted(losses, reverse=True):
        least = max(least, omega * losses[bits])
        found[bits] = least
    return dict(sorted(found.items()))


def _change_at(bits: int, side: Side) -> float:
    """S as measured, or S at the nearest width times the ratio of the errors."""
    nearest = min(side.changes, key=lambda each: (abs(each - bits), each))
    error = side.errors[nearest]
    return side.changes[nearest] * (side.errors[bits] / error if error and nearest != bits else 1.0)


def _side(entry: Mapping[str, Any]) -> Side:
    errors, changes, fisher = (
        {int(bits): float(value) for bits, value in entry[name].items()} for name in ("errors", "changes", "fisher")
    )
    lrp, gradient = (None if entry[name] is None else float(entry[name]) for name in ("lrp", "gradient"))
    numbers = [*errors.values(), *changes.values(), *fisher.values(), lrp or 0.0, gradient or 0.0]
    if not all(map(math.isfinite, numbers)):
        raise ValueError("a loss is not finite")
    return Side(errors, changes, fisher, lrp, gradient, int(entry["parameter_bytes"]))
