"""Bits for a whole file: what `choose_bits` finds for the network, held to the size of what is written.

A budget of bytes is one of the file. What the file holds beside codes and scales (the graph, its names) is found by
looking at drafts. A budget of milliseconds is met at 8 bits or not at all: engines compute in integers of 8 bits, so
that fewer bits make no layer faster, and 8 lose least.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from denselab.compress.bit_losses import Importance, Measured, side_losses
from denselab.compress.budgets import Budget, Bytes, FloatShare, MeanBits, Milliseconds, budget_text
from denselab.compress.choose_bits import EXACT_CANDIDATES, ChosenBits, bits_within
from denselab.compress.graph import Graph
from denselab.compress.plan import MOST_WEIGHT_BITS, QuantPlan
from denselab.compress.receipt import Receipt
from denselab.compress.site_groups import FLOAT_BYTES, float_elements, site_groups
from denselab.errors import InputError
from denselab.export.packed_weights import packed_bytes

CURVE_BITS = (2.5, 3, 3.5, 4, 5, 6, 7, 8)
METADATA_BYTES = 4096
"""Left for what an artifact says about itself."""

_ANY = 10**15
_DRAFTS = 4
_MISSED = 1.03
_CURVE_S = 5.0
_FLOAT_BITS = 32


@dataclass(frozen=True)
class CurvePoint:
    """What a plan is expected to need and to lose: bytes of the parameters, and the sum of the measured losses."""

    budget: str
    bytes: int
    loss: float

    @classmethod
    def of(cls, chosen: ChosenBits) -> "CurvePoint":
        """The point of a choice."""
        allocation = chosen.allocation
        return cls(budget_text(allocation.budget), allocation.totals.weight_bytes, allocation.loss)


def only_8(budget: Budget) -> bool:
    """Whether a budget leaves nothing to choose."""
    match budget:
        case MeanBits(weights, activations):
            return min(8.0 if each is None else each for each in (weights, activations)) >= 8
        case Milliseconds():
            return True
        case _:
            return False


def candidates(budget: Budget) -> tuple[tuple[int, int], ...]:
    """The pairs of bits that a file within a budget may choose from."""
    return ((MOST_WEIGHT_BITS, 8),) if only_8(budget) else EXACT_CANDIDATES


def float_products(graph: Graph) -> frozenset[str]:
    """Keys of the operands of products of two activations, such as those of attention.

    Engines gain nothing from integers there: OpenVINO computes them in float all the same and quantizes for nothing.
    """
    sites = graph.found.by_key
    return frozenset(
        key
        for product in graph.found.products
        for key in (product.left, product.right)
        if not sites[product.left].is_weight and not sites[product.right].is_weight
    )


def bits_for(
    graph: Graph,
    measured: Measured,
    budget: Budget,
    importance: Importance,
    seed: int,
    draft_bytes: Callable[[ChosenBits], int],
) -> ChosenBits:
    """The bits of least loss within a budget. draft_bytes: the size of the file that a choice makes.

    Raises InputError for a budget that cannot be met, naming what can.
    """

    def solved(wanted: Budget) -> ChosenBits:
        return bits_within(graph, measured, wanted, importance, candidates(wanted), seed=seed)

    match budget:
        case Milliseconds():
            return solved(MeanBits(8))
        case Bytes() | FloatShare():
            fewest = [(min(pair[0] for pair in EXACT_CANDIDATES), 8)]
            smallest = bits_within(graph, measured, Bytes(_ANY), importance, fewest, seed=seed)
            return _within_bytes(budget, solved, smallest, draft_bytes)
        case _:
            return solved(budget)


def check_met(budget: Budget, receipt: Receipt) -> None:
    """Raise InputError, naming what can be had, where the file or its time is above the budget."""
    match budget:
        case Milliseconds(most):
            engine = min(receipt.small_ms, key=receipt.small_ms.__getitem__)
            best = receipt.small_ms[engine]
            if best > most * _MISSED:
                raise InputError(
                    f"--budget {budget_text(budget)}: cannot be met; the nearest is {best:.2f}ms ({engine}, all in "
                    f"integers, {receipt.threads} threads), as no engine computes faster in fewer bits"
                )
        case Bytes() | FloatShare():
            most = _most_bytes(budget)
            if receipt.file_bytes > most:
                raise InputError(
                    f"--budget {budget_text(budget)}: wanted at most {most} bytes, got a file of {receipt.file_bytes} "
                    f"by {receipt.method}; ask for {2 * most - receipt.file_bytes}B to get it"
                )
        case _:
            pass


def curve(graph: Graph, measured: Measured, importance: Importance, seed: int) -> tuple[CurvePoint, ...]:
    """What budgets of CURVE_BITS would be expected to lose; those that cannot be met are left out.

    Of weights and activations, or of weights alone where no activations were measured.
    """
    found: list[CurvePoint] = []
    for bits in CURVE_BITS:
        budget = MeanBits(bits, bits if measured.of_activations else None)
        try:
            chosen = bits_within(
                graph, measured, budget, importance, EXACT_CANDIDATES, seed=seed, time_limit_s=_CURVE_S
            )
        except InputError:
            continue
        found.append(CurvePoint.of(chosen))
    return tuple(found)


def plan_point(graph: Graph, measured: Measured, importance: Importance, plan: QuantPlan) -> CurvePoint | None:
    """Where a plan lies among the points of `curve`; None for bits that were not measured."""
    losses = side_losses(measured, importance)
    total, parameters = 0.0, FLOAT_BYTES * float_elements(graph)
    for group in site_groups(graph, measured.kept):
        for weighs, keys in ((True, group.weights), (False, group.activations)):
            side = (measured.weights if weighs else measured.activations)[group.key]
            widths = {plan.specs[key].bits if key in plan.specs else _FLOAT_BITS for key in keys}
            parameters += side.parameter_bytes
            if weighs and keys:
                bits = max(widths)
                few = bits < _FLOAT_BITS
                parameters += packed_bytes(group.weight_elements, bits) if few else FLOAT_BYTES * group.weight_elements
            widths -= {_FLOAT_BITS}
            found = losses[0 if weighs else 1][group.key]
            if found and not widths <= found.keys():
                return None
            total += max((found[width] for width in widths), default=0.0) if found else 0.0
    return CurvePoint("this plan", parameters, total)


def _within_bytes(
    budget: Bytes | FloatShare,
    solved: Callable[[Budget], ChosenBits],
    smallest: ChosenBits,
    draft_bytes: Callable[[ChosenBits], int],
) -> ChosenBits:
    most, graph_bytes = _most_bytes(budget), 0
    for _ in range(_DRAFTS):
        if most - graph_bytes < smallest.allocation.totals.weight_bytes:
            break
        chosen = solved(Bytes(most - graph_bytes))
        size = draft_bytes(chosen) + METADATA_BYTES
        if size <= most:
            return chosen
        graph_bytes = max(size - chosen.allocation.totals.weight_bytes, graph_bytes + 1)
    least = draft_bytes(smallest) + METADATA_BYTES
    if least <= most:
        return smallest
    raise InputError(
        f"--budget {budget_text(budget)}: at most {most} bytes cannot be met; the nearest that can is {least}B, "
        "with the fewest bits everywhere"
    )


def _most_bytes(budget: Bytes | FloatShare) -> int:
    return budget.most if isinstance(budget, Bytes) else math.floor(budget.most * budget.float_bytes)
