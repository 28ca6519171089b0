"""From a captured network to bits for every site: what every choice loses is measured once, then budgets are met.

Sites that must take the same bits are one group: the two operands of a product (a weight and its input; query and key;
attention map and value), and all products that read the same tensor, as those share its quantizer. A group chooses a
pair (bits of its weights, bits of its activations). It loses the sum of what its two sides lose; with S the change of
the output (`Calibration.change`) when one side alone is quantized, e the error of a site, and R relevance, the loss of
a side at b bits is one of `Importance`:

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
errors are squared and relative, is ours.) F e^2 is computed element by element.

Sensitivity costs a pass forward per side, width and batch, so it is measured at the few lowest widths, where it stands
above rounding; S at a higher width is that at the nearest measured one, times E_b / E of that. No loss grows with bits:
what noise makes look worse counts as no better. Errors, changes and gradients are of the method's own quantizers, in
the network as it folds it: give a method that fits in seconds, not one that optimises.

Pair terms (CLADO, arXiv:2307.05657; Mix-QViT's integer quadratic program) are measured at one width for the groups that
change the output most: with S_ij the change when both are quantized, c = (S_ij - S_i - S_j) / sqrt(S_i S_j), and every
pair of their options loses c sqrt(loss_i loss_j) more, as it does where the output is linear in small errors. Negative
c count as 0: that two errors cancel is luck of one width, on which no width should be chosen lower.

What a model stores beside its weights (biases, norms, embeddings) stays float32 and is a group with one option, so
that bytes count it. Bytes, and other budgets that do not limit activations, give these `activation_bits` everywhere.
"""

import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, assert_never

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, fx

from denselab.compress.allocate import (
    Allocation,
    Bops,
    Budget,
    Bytes,
    FloatShare,
    Group,
    MeanBits,
    Milliseconds,
    Option,
    Pair,
    allocate,
)
from denselab.compress.graph import Axis, Graph, Hook
from denselab.compress.methods.method import Calibration, Method
from denselab.compress.observe import Stats
from denselab.compress.plan import KEPT, Kept, QuantPlan, allocated_bits, equal_bits, kept_sites
from denselab.compress.quantizers import Quantizer, quantized
from denselab.compress.relevance.scores import (
    Batches,
    Score,
    Start,
    gradient_times_activation,
    single_images,
    site_gradients,
)
from denselab.compress.relevance.start import log_likelihood
from denselab.compress.saved_file import check_version, reading
from denselab.compress.simulate import QuantizedGraph
from denselab.compress.sites import ModelHash
from denselab.errors import InputError
from denselab.files import write_json

WIDTHS = (2, 3, 4, 6, 8)
CANDIDATES = tuple(itertools.product(WIDTHS, WIDTHS))
"""Pairs of bits that a group may choose: of weights, of activations."""

IMAGES = 16
"""How many calibration images losses are measured with."""

MEASURED_FORMAT = 1
FLOATS = "float32 parameters"
"""Key of the group of what is stored as float32."""

_KEPT_BITS = 8
_FLOAT_BYTES = 4
_LEAST_VARIANCE = 1e-9

Times = Mapping[str, Mapping[tuple[int, int], float]]
"""Measured milliseconds of every group by key, at pairs of bits."""


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
class SiteGroup:
    """Sites that choose together. key: of its first weight, or of its first site.

    weights, activations: keys of the sites. weight_elements; activation_elements: per image, a tensor counted once;
    macs: per image. weights_kept, activations_kept: at 8 bits, whatever is chosen.
    """

    key: str
    weights: tuple[str, ...]
    activations: tuple[str, ...]
    weight_elements: int
    activation_elements: int
    macs: int
    weights_kept: bool
    activations_kept: bool

    @property
    def sites(self) -> tuple[str, ...]:
        """All of them, activations first."""
        return self.activations + self.weights

    @property
    def free(self) -> tuple[str, ...]:
        """Those whose bits are to be chosen."""
        return (() if self.activations_kept else self.activations) + (() if self.weights_kept else self.weights)


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

    method: whose quantizers. images: how many. kept: what stays at 8 bits, and is not measured. interactions: of
    pairs of groups, where asked for.
    """

    model: ModelHash
    method: str
    images: int
    kept: frozenset[Kept]
    weights: Mapping[str, Side]
    activations: Mapping[str, Side]
    interactions: tuple[Interaction, ...] = ()

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


@dataclass(frozen=True)
class ChosenBits:
    """Bits for every site by key, and how they came about. groups: as given to the solver, with the losses of every
    option, and the floats among them (`FLOATS`). members: sites of every group that has some.
    """

    bits: dict[str, int]
    allocation: Allocation
    groups: tuple[Group, ...]
    members: dict[str, tuple[str, ...]]


def site_groups(graph: Graph, kept: Iterable[Kept] = KEPT) -> tuple[SiteGroup, ...]:
    """The sites of a graph by what must take the same bits, in order of execution.

    Readers of a tensor that is kept at 8 bits anywhere read it at 8 bits; it ties no weights together.
    """
    at_8, sites = kept_sites(graph, kept), graph.found.by_key
    tensors_at_8 = {sites[key].tensor for key in at_8 if not sites[key].is_weight}
    leader = {key: key for key in sites}

    def lead(key: str) -> str:
        while leader[key] != key:
            key = leader[key]
        return key

    def tie(one: str, other: str) -> None:
        leader[lead(one)] = lead(other)

    for product in graph.found.products:
        tie(product.left, product.right)
    for site in sites.values():
        if site.tensor not in tensors_at_8:
            tie(site.key, site.tensor)
    together: dict[str, list[str]] = {}
    for key in sites:
        together.setdefault(lead(key), []).append(key)
    macs = dict.fromkeys(together, 0)
    for product in graph.found.products:
        macs[lead(product.left)] += product.macs
    found: list[SiteGroup] = []
    counted: set[str] = set()
    for leading, keys in together.items():
        weights = tuple(key for key in keys if sites[key].is_weight)
        activations = tuple(key for key in keys if not sites[key].is_weight)
        tensors = {sites[key].tensor: sites[key].elements for key in activations if sites[key].tensor not in counted}
        counted |= tensors.keys()
        found.append(
            SiteGroup(
                (weights or activations)[0],
                weights,
                activations,
                sum(sites[key].elements for key in weights),
                sum(tensors.values()),
                macs[leading],
                any(key in at_8 for key in weights),
                any(sites[key].tensor in tensors_at_8 for key in activations),
            )
        )
    return tuple(found)


def float_elements(graph: Graph) -> int:
    """Numbers that a graph stores and that no site replaces: biases, norms, embeddings, and buffers such as masks."""
    weights = {
        (place.node, place.argument) for site in graph.sites if site.is_weight for place in graph.found.places[site.key]
    }
    stored: list[fx.Node] = []
    seen = {graph.module.graph.output_node()}
    waiting = [*seen]
    while waiting:
        node = waiting.pop()
        if node.op == "get_attr":
            stored.append(node)
        replaced = [each for number, each in enumerate(node.args) if (node, number) in weights]
        for each in node.all_input_nodes:
            if each not in seen and not any(each is weight for weight in replaced):
                seen.add(each)
                waiting.append(each)
    tensors = {id(value): value for value in (_stored(graph, node) for node in stored) if value.is_floating_point()}
    return sum(value.numel() for value in tensors.values())


def float_bytes(graph: Graph) -> int:
    """Bytes that the model takes as float32: what `FloatShare` and `parse_budget` ask for."""
    return _FLOAT_BYTES * (float_elements(graph) + sum(site.elements for site in graph.sites if site.is_weight))


def choose_bits(
    graph: Graph,
    stats: Stats,
    method: Method,
    calibration: Calibration,
    budget: Budget,
    importance: Importance = Importance.SENSITIVITY,
    candidates: Sequence[tuple[int, int]] = CANDIDATES,
    kept: Iterable[Kept] = KEPT,
    start: Start | None = None,
    activation_bits: int = 8,
    most_pairs_of: int = 0,
    images: int = IMAGES,
) -> ChosenBits:
    """The bits of least loss within a budget: `measure`, then `bits_within`, whose arguments and errors these are."""
    widths = {width for pair in candidates for width in pair} | {activation_bits}
    measured = measure(
        graph,
        stats,
        method,
        calibration,
        {importance},
        widths,
        kept=kept,
        start=start,
        most_pairs_of=most_pairs_of,
        images=images,
    )
    return bits_within(graph, measured, budget, importance, candidates, activation_bits, calibration.seed)


def measure(
    graph: Graph,
    stats: Stats,
    method: Method,
    calibration: Calibration,
    importances: Iterable[Importance] = (Importance.SENSITIVITY,),
    widths: Iterable[int] = WIDTHS,
    sensitivity_widths: int = 3,
    kept: Iterable[Kept] = KEPT,
    start: Start | None = None,
    relevance: Mapping[str, Score] | None = None,
    most_pairs_of: int = 0,
    images: int = IMAGES,
) -> Measured:
    """What each side of each group loses at each width, as far as the importances need it.

    method: whose quantizers; it is asked to fit every width once. sensitivity_widths: how many, from the lowest up,
    the change of the output is measured at. start: what relevance and Fisher ask about; needed for models that return
    more than the logits of classes. relevance: LRP of the sites, if it is known, as in `relevance.json`. most_pairs_of:
    so many groups have pair terms, those that change the output most. images: of the calibration images, the first.

    Raises InputError for no images, no widths, a start that is needed, and as the method and its parts do. Only for an
    importance with relevance propagation it is run (see `relevance.lrp`, which is patented for some uses).
    """
    asked, bits = set(importances), sorted(set(widths))
    if not bits:
        raise InputError("widths: wanted at least one number of bits to measure, got none")
    batches = _first(graph, calibration.batches, images)
    used = sum(map(len, batches))
    found = site_groups(graph, kept)
    sides = [each for group in found for each in (_side_of(group, True), _side_of(group, False)) if each]
    values = _Values(
        errors={side: dict[int, float]() for side in sides},
        changes={side: dict[int, float]() for side in sides},
        fisher={side: dict[int, float]() for side in sides},
    )
    by_change = bits[: max(sensitivity_widths, 1)] if asked & _WITH_CHANGES or most_pairs_of else []
    pairs_at = by_change[len(by_change) // 2] if most_pairs_of else None
    interactions: tuple[Interaction, ...] = ()
    parameter_bytes: dict[str, int] = {}
    for width in bits:
        calibration.say(f"losses at {width} bits: fitting the quantizers of {method.name}")
        plan = QuantPlan.make(graph, method.name, method.spec, equal_bits(graph, width, width, kept), kept)
        fitted = method.quantize(graph, stats, plan, calibration)
        parameter_bytes = {key: _parameter_bytes(each) for key, each in fitted.quantizers.items()}
        errors = _errors(fitted, batches)
        for side in sides:
            values.errors[side][width] = sum(errors[key] for key in side)
        if width in by_change:
            _changes(fitted, batches, calibration, width, values)
        if Importance.FISHER in asked:
            by_site = _fisher(fitted, batches, start)
            for side in sides:
                values.fisher[side][width] = sum(by_site[key] for key in side)
        if width == pairs_at:
            interactions = _interactions(fitted, batches, calibration, found, values, width, most_pairs_of)
    lrp = (relevance or _lrp(graph, batches, start)) if asked & _WITH_LRP else None
    gradient = (
        gradient_times_activation(graph, batches, start or _winning)
        if Importance.GRADIENT_TIMES_ACTIVATION in asked
        else None
    )

    def side_of(group: SiteGroup, weights: bool) -> Side:
        side = _side_of(group, weights)
        keys = group.weights if weights else group.activations
        return Side(
            values.errors.get(side, {}),
            values.changes.get(side, {}),
            values.fisher.get(side, {}),
            None if lrp is None else _summed(lrp, keys),
            None if gradient is None else _summed(gradient, keys),
            sum(parameter_bytes[key] for key in keys),
        )

    return Measured(
        graph.model,
        method.name,
        used,
        frozenset(kept),
        {group.key: side_of(group, True) for group in found},
        {group.key: side_of(group, False) for group in found},
        interactions,
    )


def bits_within(
    graph: Graph,
    measured: Measured,
    budget: Budget,
    importance: Importance = Importance.SENSITIVITY,
    candidates: Sequence[tuple[int, int]] = CANDIDATES,
    activation_bits: int = 8,
    seed: int = 0,
    milliseconds: Times | None = None,
    time_limit_s: float = 60.0,
) -> ChosenBits:
    """The bits of least loss within a budget, from what was measured.

    activation_bits: of all activations, where the budget does not limit them (bytes, a share of them, milliseconds,
    mean bits of weights alone). seed: of a random importance. Raises InputError as `allocate`, and for widths and an
    importance that were not measured.
    """
    if not _limits_activations(budget):
        candidates = [(weight_bits, activation_bits) for weight_bits, _ in candidates]
    found = site_groups(graph, measured.kept)
    losses = side_losses(measured, importance, seed)
    groups = [_group(each, measured, losses, candidates, milliseconds) for each in found]
    floats = Option(32, 32, 0.0, weight_bytes=_FLOAT_BYTES * float_elements(graph), milliseconds=0.0)
    everything = (*groups, Group(FLOATS, (floats,)))
    pairs = _pairs(groups, measured.interactions)
    allocation = allocate(everything, budget, pairs, time_limit_s)
    members = {group.key: group.sites for group in found}
    of_sites = replace(allocation, chosen={key: allocation.chosen[key] for key in members})
    return ChosenBits(allocated_bits(graph, of_sites, members, measured.kept), allocation, everything, members)


def bits_curve(
    graph: Graph,
    measured: Measured,
    budgets: Sequence[Budget],
    importance: Importance = Importance.SENSITIVITY,
    candidates: Sequence[tuple[int, int]] = CANDIDATES,
    activation_bits: int = 8,
    seed: int = 0,
    milliseconds: Times | None = None,
    time_limit_s: float = 60.0,
) -> tuple[ChosenBits, ...]:
    """The Pareto curve: the choice for each budget, in the order given, from one measurement (see `bits_within`)."""
    return tuple(
        bits_within(graph, measured, budget, importance, candidates, activation_bits, seed, milliseconds, time_limit_s)
        for budget in budgets
    )


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


_WITH_LRP = {Importance.LRP, Importance.LRP_TIMES_SENSITIVITY}
_WITH_CHANGES = {Importance.SENSITIVITY, Importance.LRP_TIMES_SENSITIVITY}

_Sites = tuple[str, ...]
"""Keys of the free sites of a side."""


@dataclass(frozen=True)
class _Values:
    """What is measured, by side and bits."""

    errors: dict[_Sites, dict[int, float]]
    changes: dict[_Sites, dict[int, float]]
    fisher: dict[_Sites, dict[int, float]]


def _side_of(group: SiteGroup, weights: bool) -> _Sites:
    """The sites of a side whose bits are free."""
    if weights:
        return () if group.weights_kept else group.weights
    return () if group.activations_kept else group.activations


def _first(graph: Graph, batches: Batches, images: int) -> list[Tensor]:
    """The first images, in batches that the graph takes. Raises InputError if there are none."""
    at_once = None if Axis.BATCH in graph.free else graph.example_shapes[0][0]
    found: list[Tensor] = []
    for batch in batches:
        for part in batch[: max(images - sum(map(len, found)), 0)].split(at_once or max(len(batch), 1)):
            if len(part) == (at_once or len(part)) and len(part):
                found.append(part)
        if sum(map(len, found)) >= images:
            break
    if not found:
        raise InputError(f"images: wanted at least {at_once or 1} to measure losses with, got none; add images")
    return found


def _hooks(fitted: QuantizedGraph, keys: Iterable[str]) -> dict[str, Hook]:
    return {key: partial(quantized, fitted.quantizers[key]) for key in keys}


class _Noise:
    """Noise to signal of one site over batches: sums of squares of errors, and of what is quantized."""

    def __init__(self, quantizer: Quantizer, axis: int | None, stored: bool) -> None:
        self.quantizer = quantizer
        self.axis = None if stored else axis
        self.noise = self.squares = self.count = 0.0
        self.sums: Tensor | float = 0.0

    def see(self, x: Tensor) -> Tensor:
        exact = x.double()
        self.noise += (quantized(self.quantizer, x).double() - exact).square().sum().item()
        self.squares += exact.square().sum().item()
        dims = tuple(dim for dim in range(x.ndim) if dim != self.axis)
        sums = exact.sum(dims) if dims else exact
        self.sums = self.sums + sums
        self.count += x.numel() / max(sums.numel(), 1)
        return x

    def compute(self) -> float:
        means = torch.as_tensor(self.sums).square().sum().item() / self.count
        spread = max(self.squares - means, _LEAST_VARIANCE * self.squares)
        return self.noise / spread if self.noise else 0.0


def _errors(fitted: QuantizedGraph, batches: Sequence[Tensor]) -> dict[str, float]:
    """E of every site, in one pass."""
    sites = fitted.graph.found.by_key
    noises = {
        key: _Noise(each, sites[key].channel_axis, sites[key].is_weight) for key, each in fitted.quantizers.items()
    }
    with torch.no_grad():
        for number, pixels in enumerate(batches):
            seen = noises if number == 0 else {key: each for key, each in noises.items() if not sites[key].is_weight}
            fitted.graph.run(pixels, hooks={key: each.see for key, each in seen.items()})
    return {key: each.compute() for key, each in noises.items()}


def _mean_change(
    fitted: QuantizedGraph, batches: Sequence[Tensor], wanted: Sequence[Any], calibration: Calibration, keys: _Sites
) -> float:
    """Of the output, when some sites are quantized. Raises InputError, naming the first, for NaN and infinity."""
    with torch.no_grad():
        changes = [
            calibration.change(fitted.graph.run(pixels, hooks=_hooks(fitted, keys)), answer).double()
            for pixels, answer in zip(batches, wanted, strict=True)
        ]
    mean = torch.cat(changes).mean().item()
    if not math.isfinite(mean):
        raise InputError(f"change: wanted finite numbers, got NaN or infinity when {keys[0]!r} is quantized")
    return max(mean, 0.0)


def _answers(fitted: QuantizedGraph, batches: Sequence[Tensor]) -> list[Any]:
    with torch.no_grad():
        return [fitted.graph.run(pixels) for pixels in batches]


def _changes(
    fitted: QuantizedGraph, batches: Sequence[Tensor], calibration: Calibration, width: int, values: _Values
) -> None:
    wanted = _answers(fitted, batches)
    for number, side in enumerate(values.changes, start=1):
        values.changes[side][width] = _mean_change(fitted, batches, wanted, calibration, side)
        calibration.say(f"losses at {width} bits: sensitivity of {number} of {len(values.changes)}")


def _interactions(
    fitted: QuantizedGraph,
    batches: Sequence[Tensor],
    calibration: Calibration,
    found: Sequence[SiteGroup],
    values: _Values,
    width: int,
    most_pairs_of: int,
) -> tuple[Interaction, ...]:
    """Of all pairs of the groups that change the output most at one width."""

    def own(group: SiteGroup) -> float:
        sides = (_side_of(group, True), _side_of(group, False))
        return sum(values.changes[side][width] for side in sides if side)

    ranked = sorted((group for group in found if group.free), key=own, reverse=True)[:most_pairs_of]
    pairs = list(itertools.combinations(ranked, 2))
    wanted = _answers(fitted, batches)
    alone = {group.key: _mean_change(fitted, batches, wanted, calibration, group.free) for group in ranked}
    interactions: list[Interaction] = []
    for number, (one, other) in enumerate(pairs, start=1):
        both = _mean_change(fitted, batches, wanted, calibration, one.free + other.free)
        size = math.sqrt(alone[one.key] * alone[other.key])
        # A quadratic form that is nowhere negative has no share above 2.
        share = min(max((both - alone[one.key] - alone[other.key]) / size, 0.0), 2.0) if size else 0.0
        interactions.append(Interaction(one.key, other.key, share))
        calibration.say(f"losses at {width} bits: pair {number} of {len(pairs)}")
    return tuple(interactions)


def _fisher(fitted: QuantizedGraph, batches: Sequence[Tensor], start: Start | None) -> dict[str, float]:
    """Sum over every site of (df/dx)^2 (x^ - x)^2, in the mean over images."""
    keys = list(fitted.quantizers)
    sums = dict.fromkeys(keys, 0.0)
    count = 0
    for pixels in single_images(fitted.graph, batches):
        count += 1
        found = site_gradients(fitted.graph, pixels, start or _log_likelihood, keys)
        for key, site in found.items():
            error = quantized(fitted.quantizers[key], site.value) - site.value
            sums[key] += (site.gradient.double() * error.double()).square().sum().item()
    return {key: value / count for key, value in sums.items()}


def _logits_of(output: Any) -> Float[Tensor, "B K ..."]:
    if not isinstance(output, Tensor) or output.ndim < 2:
        raise InputError(
            "start: wanted one for a model that returns more than the logits of classes [B, K] or [B, K, H, W]; "
            "take one of denselab.compress.relevance.start"
        )
    return output


def _winning(output: Any) -> Float[Tensor, "B"]:
    """The logit of the winning class, summed over pixels if there are any."""
    best = _logits_of(output).amax(dim=1)
    return best.flatten(1).sum(dim=1) if best.ndim > 1 else best


def _log_likelihood(output: Any) -> Float[Tensor, "B"]:
    return log_likelihood(_logits_of(output))


def _lrp(graph: Graph, batches: Batches, start: Start | None) -> dict[str, Score]:
    from denselab.compress.relevance.lrp import lrp  # patented for some uses: nobody gets it who does not ask for it

    return lrp(graph, batches, start or _winning)


def _summed(scores: Mapping[str, Score], keys: Iterable[str]) -> float:
    return math.fsum(scores[key].magnitude for key in keys)


def _parameter_bytes(quantizer: Quantizer) -> int:
    """Of scales, as float32, and zero points, as bytes."""
    values = [getattr(quantizer, each.name) for each in fields(quantizer)]
    return sum(
        value.numel() * (_FLOAT_BYTES if value.is_floating_point() else 1)
        for value in values
        if isinstance(value, Tensor)
    )


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


def _limits_activations(budget: Budget) -> bool:
    match budget:
        case MeanBits(_, activations):
            return activations is not None
        case Bops():
            return True
        case Bytes() | FloatShare() | Milliseconds():
            return False
        case _:
            assert_never(budget)


def _group(
    group: SiteGroup,
    measured: Measured,
    losses: tuple[dict[str, dict[int, float]], dict[str, dict[int, float]]],
    candidates: Sequence[tuple[int, int]],
    milliseconds: Times | None,
) -> Group:
    """A group with an option for every pair of bits that differs where it is free."""
    pairs = dict.fromkeys(
        (
            _KEPT_BITS if group.weights_kept else weight_bits if group.weights else activation_bits,
            _KEPT_BITS if group.activations_kept else activation_bits,
        )
        for weight_bits, activation_bits in candidates
    )
    if not pairs:
        raise InputError("candidates: wanted at least one pair of bits, got none")
    of_weights, of_activations = (each[group.key] for each in losses)
    parameters = measured.weights[group.key].parameter_bytes + measured.activations[group.key].parameter_bytes
    times = {} if milliseconds is None else milliseconds.get(group.key, {})

    def loss(of_bits: Mapping[int, float], bits: int, free: bool) -> float:
        if free and bits not in of_bits:
            raise InputError(
                f"candidates: {bits} bits were not measured at {group.key!r}, but {', '.join(map(str, of_bits))}; "
                "measure these widths too"
            )
        return of_bits[bits] if free else 0.0

    options = tuple(
        Option(
            weight_bits,
            activation_bits,
            loss(of_weights, weight_bits, bool(group.weights) and not group.weights_kept)
            + loss(of_activations, activation_bits, not group.activations_kept),
            -(-group.weight_elements * weight_bits // 8) + parameters,
            times.get((weight_bits, activation_bits)),
        )
        for weight_bits, activation_bits in pairs
    )
    return Group(group.key, options, group.weight_elements, group.activation_elements, group.macs)


def _pairs(groups: Sequence[Group], interactions: Sequence[Interaction]) -> list[Pair]:
    by_key = {group.key: group for group in groups}
    return [
        Pair(each.first, one, each.second, other, each.share * math.sqrt(first.loss * second.loss))
        for each in interactions
        if each.share
        for one, first in enumerate(by_key[each.first].options)
        for other, second in enumerate(by_key[each.second].options)
    ]


def _stored(graph: Graph, node: fx.Node) -> Tensor:
    folder, _, name = str(node.target).rpartition(".")
    return getattr(graph.module.get_submodule(folder), name)


def _side(entry: Mapping[str, Any]) -> Side:
    errors, changes, fisher = (
        {int(bits): float(value) for bits, value in entry[name].items()} for name in ("errors", "changes", "fisher")
    )
    lrp, gradient = (None if entry[name] is None else float(entry[name]) for name in ("lrp", "gradient"))
    numbers = [*errors.values(), *changes.values(), *fisher.values(), lrp or 0.0, gradient or 0.0]
    if not all(map(math.isfinite, numbers)):
        raise ValueError("a loss is not finite")
    return Side(errors, changes, fisher, lrp, gradient, int(entry["parameter_bytes"]))
