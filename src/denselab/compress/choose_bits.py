"""The bits of least loss within a budget, from losses that were measured once (`measure_losses`).

A group of sites (`site_groups`) chooses a pair, bits of its weights and bits of its activations, and loses what its
importance makes of the measured losses (`bit_losses`). What a model stores beside its weights (biases, norms,
embeddings) stays float32 and is a group with one option, so that bytes count it. Bytes, and other budgets that do not
limit activations, give these `activation_bits` everywhere.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from denselab.compress.allocate import Allocation, Group, Option, Pair, allocate
from denselab.compress.bit_losses import Importance, Interaction, Measured, side_losses
from denselab.compress.budgets import Budget, limits_activations
from denselab.compress.graph import Graph
from denselab.compress.measure_losses import IMAGES, WIDTHS, measure
from denselab.compress.methods.method import Calibration, Method
from denselab.compress.observing import Stats
from denselab.compress.plan import KEPT, MOST_WEIGHT_BITS, Kept, allocated_bits
from denselab.compress.relevance.scores import Start
from denselab.compress.site_groups import FLOAT_BYTES, SiteGroup, float_elements, site_groups
from denselab.errors import InputError
from denselab.export.packed_weights import packed_bytes

CANDIDATES = tuple(itertools.product(WIDTHS, WIDTHS))
"""Pairs of bits that a group may choose: of weights, of activations."""

EXACT_CANDIDATES = tuple(
    itertools.product((*(width for width in WIDTHS if width < MOST_WEIGHT_BITS), MOST_WEIGHT_BITS), WIDTHS)
)
"""The same for what becomes a file: see MOST_WEIGHT_BITS."""

FLOATS = "float32 parameters"
"""Key of the group of what is stored as float32."""

_KEPT_BITS = 8

Times = Mapping[str, Mapping[tuple[int, int], float]]
"""Measured milliseconds of every group by key, at pairs of bits."""


@dataclass(frozen=True)
class ChosenBits:
    """Bits for every site by key, and how they came about. groups: as given to the solver, with the losses of every
    option, and the floats among them (`FLOATS`). members: sites of every group that has some.
    """

    bits: dict[str, int]
    allocation: Allocation
    groups: tuple[Group, ...]
    members: dict[str, tuple[str, ...]]


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
    limited = limits_activations(budget)
    widths = {width for pair in candidates for width in (pair if limited else pair[:1])}
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
        activation_bits=None if limited else activation_bits,
    )
    return bits_within(graph, measured, budget, importance, candidates, activation_bits, calibration.seed)


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
    limited = limits_activations(budget)
    if not limited:
        candidates = [(weight_bits, activation_bits) for weight_bits, _ in candidates]
    found = site_groups(graph, measured.kept)
    losses = side_losses(measured, importance, seed)
    groups = [_group(each, measured, losses, candidates, limited, milliseconds) for each in found]
    floats = Option(32, 32, 0.0, weight_bytes=FLOAT_BYTES * float_elements(graph), milliseconds=0.0)
    everything = (*groups, Group(FLOATS, (floats,)))
    pairs = _pairs(groups, measured.interactions)
    allocation = allocate(everything, budget, pairs, time_limit_s)
    members = {group.key: group.sites for group in found}
    of_sites = replace(allocation, chosen={key: allocation.chosen[key] for key in members})
    return ChosenBits(allocated_bits(graph, of_sites, members, measured.kept), allocation, everything, members)


def _group(
    group: SiteGroup,
    measured: Measured,
    losses: tuple[dict[str, dict[int, float]], dict[str, dict[int, float]]],
    candidates: Sequence[tuple[int, int]],
    limited: bool,
    milliseconds: Times | None,
) -> Group:
    """A group with an option for every pair of bits that differs where it is free.

    limited: whether the budget counts activations; else all options lose the same there, and nobody need know what.
    """
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

    def loss(of_bits: Mapping[int, float], bits: int, counts: bool) -> float:
        if counts and bits not in of_bits:
            raise InputError(
                f"candidates: {bits} bits were not measured at {group.key!r}, but {', '.join(map(str, of_bits))}; "
                "measure these widths too"
            )
        return of_bits[bits] if counts else 0.0

    options = tuple(
        Option(
            weight_bits,
            activation_bits,
            loss(of_weights, weight_bits, bool(group.free_weights))
            + loss(of_activations, activation_bits, limited and not group.activations_kept),
            packed_bytes(group.weight_elements, weight_bits) + parameters,
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
