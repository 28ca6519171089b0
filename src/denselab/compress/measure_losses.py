"""Measuring what bits lose: every side of every group is quantized by itself (`bit_losses` says what for).

Activations are measured where their bits are to be chosen; else they have the bits that they will have.

Sensitivity costs a pass forward per side, width and batch, through what follows the side, so it is measured at the few
lowest widths, where it stands above rounding. Errors, changes and gradients are of the method's own quantizers, in the
network as it folds it: give a method that fits in seconds, not one that optimises.

Pair terms (CLADO, arXiv:2307.05657; Mix-QViT's integer quadratic program) are measured at one width for the groups that
change the output most: with S_ij the change when both are quantized, c = (S_ij - S_i - S_j) / sqrt(S_i S_j), and every
pair of their options loses c sqrt(loss_i loss_j) more, as it does where the output is linear in small errors. Negative
c count as 0: that two errors cancel is luck of one width, on which no width should be chosen lower.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from denselab.compress.bit_losses import Importance, Interaction, Measured, Side
from denselab.compress.blocks import Blocks, Values, find_blocks
from denselab.compress.graph import Axis, Graph, Hook
from denselab.compress.methods.method import Calibration, Method
from denselab.compress.observing import Stats
from denselab.compress.plan import KEPT, Kept, QuantPlan, equal_bits
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
from denselab.compress.simulate import QuantizedGraph
from denselab.compress.site_groups import FLOAT_BYTES, SiteGroup, site_groups
from denselab.errors import InputError

WIDTHS = (2, 3, 4, 6, 8)
"""Numbers of bits that are measured."""

IMAGES = 16
"""How many calibration images losses are measured with."""

_WITH_LRP = {Importance.LRP, Importance.LRP_TIMES_SENSITIVITY}
_WITH_CHANGES = {Importance.SENSITIVITY, Importance.LRP_TIMES_SENSITIVITY}
_LEAST_VARIANCE = 1e-9

_Sites = tuple[str, ...]
"""Keys of the free sites of a side."""

_Sides = Mapping[str, tuple[_Sites, ...]]
"""What is measured of every group by its key: the sides that are free, activations last."""


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
    activation_bits: int | None = None,
) -> Measured:
    """What each side of each group loses at each width, as far as the importances need it.

    method: whose quantizers; it is asked to fit every width once. sensitivity_widths: how many, from the lowest up,
    the change of the output is measured at. start: what relevance and Fisher ask about; needed for models that return
    more than the logits of classes. relevance: LRP of the sites, if it is known, as in `relevance.json`. most_pairs_of:
    so many groups have pair terms, those that change the output most. images: of the calibration images, the first.
    activation_bits: of all activations, where the budget limits weights alone: activations are not measured then.

    Raises InputError for no images, no widths, a start that is needed, and as the method and its parts do. Only for an
    importance with relevance propagation it is run (see `relevance.lrp`, which is patented for some uses).
    """
    asked, bits = set(importances), sorted(set(widths))
    if not bits:
        raise InputError("widths: wanted at least one number of bits to measure, got none")
    batches = _first(graph, calibration.batches, images)
    used = sum(map(len, batches))
    found = site_groups(graph, kept)
    of_groups = {group.key: _free_sides(group, activation_bits is None) for group in found}
    sides = [side for each in of_groups.values() for side in each]
    keys = [key for side in sides for key in side]
    values = _OfSides(
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
        bits_of_sites = equal_bits(graph, width, activation_bits or width, kept)
        plan = QuantPlan.make(graph, method.name, method.spec, bits_of_sites, kept)
        fitted = method.quantize(graph, stats, plan, calibration)
        parameter_bytes = {key: _parameter_bytes(each) for key, each in fitted.quantizers.items()}
        errors = _errors(fitted, batches, keys)
        for side in sides:
            values.errors[side][width] = sum(errors[key] for key in side)
        if width in by_change:
            _changes(fitted, batches, calibration, width, values)
        if Importance.FISHER in asked and keys:
            by_site = _fisher(fitted, batches, start, keys)
            for side in sides:
                values.fisher[side][width] = sum(by_site[key] for key in side)
        if width == pairs_at:
            interactions = _interactions(fitted, batches, calibration, of_groups, values, width, most_pairs_of)
    lrp = (relevance or _lrp(graph, batches, start)) if asked & _WITH_LRP else None
    gradient = (
        gradient_times_activation(graph, batches, start or _winning)
        if Importance.GRADIENT_TIMES_ACTIVATION in asked
        else None
    )

    def side_of(sites: _Sites, free: _Sites) -> Side:
        return Side(
            values.errors.get(free, {}),
            values.changes.get(free, {}),
            values.fisher.get(free, {}),
            None if lrp is None else _summed(lrp, sites),
            None if gradient is None else _summed(gradient, sites),
            sum(parameter_bytes[key] for key in sites),
        )

    return Measured(
        graph.model,
        method.name,
        used,
        frozenset(kept),
        {group.key: side_of(group.weights, group.free_weights) for group in found},
        {group.key: side_of(group.activations, group.free_activations) for group in found},
        interactions,
    )


@dataclass(frozen=True)
class _OfSides:
    """What is measured, by side and bits."""

    errors: dict[_Sites, dict[int, float]]
    changes: dict[_Sites, dict[int, float]]
    fisher: dict[_Sites, dict[int, float]]


def _free_sides(group: SiteGroup, activations: bool) -> tuple[_Sites, ...]:
    both = (group.free_weights, group.free_activations if activations else ())
    return tuple(side for side in both if side)


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


def _errors(fitted: QuantizedGraph, batches: Sequence[Tensor], keys: Iterable[str]) -> dict[str, float]:
    """E of some sites, in one pass; of stored ones, in one batch."""
    sites = fitted.graph.found.by_key
    noises = {key: _Noise(fitted.quantizers[key], sites[key].channel_axis, sites[key].is_weight) for key in keys}
    computed = {key: each.see for key, each in noises.items() if not sites[key].is_weight}
    with torch.no_grad():
        for number, pixels in enumerate(batches if computed else batches[:1]):
            hooks = computed if number else {key: each.see for key, each in noises.items()}
            fitted.graph.run(pixels, hooks=hooks)
    return {key: each.compute() for key, each in noises.items()}


def _mean_changes(
    fitted: QuantizedGraph, batches: Sequence[Tensor], calibration: Calibration, asked: Iterable[_Sites], label: str
) -> dict[_Sites, float]:
    """Of the output, when the sites of each entry, and no others, are quantized.

    A run begins at the block that first reads one of them: until there it would be that of the float network.
    Raises InputError, naming the first site of an entry, for NaN and infinity.
    """
    work = find_blocks(fitted.graph)
    first_read: dict[str, int] = {}
    for number, block in enumerate(work.blocks):
        for key in block.graph.found.places:
            first_read.setdefault(key, number)
    begun_at: dict[int, list[_Sites]] = {}
    for sites in dict.fromkeys(asked):
        begun_at.setdefault(min(first_read[key] for key in sites), []).append(sites)
    total = sum(map(len, begun_at.values()))
    means: dict[_Sites, float] = {}
    with torch.no_grad():
        wanted = [fitted.graph.run(pixels) for pixels in batches]
        before = [work.start(pixels) for pixels in batches]
        for number, block in enumerate(work.blocks):
            for sites in begun_at.get(number, ()):
                hooks = _hooks(fitted, sites)
                changes = [
                    calibration.change(_answer(work, number, values, hooks), answer).double()
                    for values, answer in zip(before, wanted, strict=True)
                ]
                mean = torch.cat(changes).mean().item()
                if not math.isfinite(mean):
                    raise InputError(
                        f"change: wanted finite numbers, got NaN or infinity when {sites[0]!r} is quantized"
                    )
                means[sites] = max(mean, 0.0)
                calibration.say(f"{label} {len(means)} of {total}")
            before = [block.run(values) for values in before]
    return means


def _answer(work: Blocks, number: int, values: Values, hooks: Mapping[str, Hook]) -> Any:
    """What comes out at the end of what goes into a block, with hooks there and behind it."""
    for block in work.blocks[number:]:
        values = block.run(values, {key: hook for key, hook in hooks.items() if key in block.graph.found.places})
    return work.answer(values)


def _changes(
    fitted: QuantizedGraph, batches: Sequence[Tensor], calibration: Calibration, width: int, values: _OfSides
) -> None:
    label = f"losses at {width} bits: sensitivity of"
    for side, mean in _mean_changes(fitted, batches, calibration, values.changes, label).items():
        values.changes[side][width] = mean


def _interactions(
    fitted: QuantizedGraph,
    batches: Sequence[Tensor],
    calibration: Calibration,
    of_groups: _Sides,
    values: _OfSides,
    width: int,
    most_pairs_of: int,
) -> tuple[Interaction, ...]:
    """Of all pairs of the groups that change the output most at one width."""

    def own(group: str) -> float:
        return sum(values.changes[side][width] for side in of_groups[group])

    def free(group: str) -> _Sites:
        return tuple(itertools.chain(*of_groups[group]))

    ranked = sorted((group for group, sides in of_groups.items() if sides), key=own, reverse=True)[:most_pairs_of]
    pairs = list(itertools.combinations(ranked, 2))
    alone_and_together = [free(group) for group in ranked] + [free(one) + free(other) for one, other in pairs]
    label = f"losses at {width} bits: pair terms of"
    changes = _mean_changes(fitted, batches, calibration, alone_and_together, label)
    interactions: list[Interaction] = []
    for one, other in pairs:
        alone, both = (changes[free(one)], changes[free(other)]), changes[free(one) + free(other)]
        size = math.sqrt(alone[0] * alone[1])
        # A quadratic form that is nowhere negative has no share above 2.
        share = min(max((both - sum(alone)) / size, 0.0), 2.0) if size else 0.0
        interactions.append(Interaction(one, other, share))
    return tuple(interactions)


def _fisher(
    fitted: QuantizedGraph, batches: Sequence[Tensor], start: Start | None, keys: Sequence[str]
) -> dict[str, float]:
    """Sum over some sites of (df/dx)^2 (x^ - x)^2, in the mean over images."""
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
        value.numel() * (FLOAT_BYTES if value.is_floating_point() else 1)
        for value in values
        if isinstance(value, Tensor)
    )
