"""Which bits each group of sites gets: the least total loss within one budget, solved exactly.

Each group l chooses one of its options b. With x_lb = 1 where it does (Mix-QViT, arXiv:2501.06357, and CLADO,
arXiv:2307.05657, which adds the pair terms G):

    minimise    sum_l w_l sum_b loss_lb x_lb  +  sum_(lb, mc) G_lb,mc x_lb x_mc
    subject to  sum_b x_lb = 1 for every l,    sum_lb cost_lb x_lb <= budget

w_l is the group's relevance, so that the loss is Omega = sum_l w_l ||error_l|| (LRP-QViT, arXiv:2401.11243; how the
two are combined is ours, as the papers' code is not public). How it is solved: `knapsack`. Of allocations with equal
loss the one with fewer bits is taken (of weights and activations, counted by their elements), where it is found.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import assert_never

import numpy as np

from denselab.compress.budgets import Bops, Budget, Bytes, FloatShare, MeanBits, Milliseconds, budget_text, scaled
from denselab.compress.knapsack import Floats, Infeasible, Knapsack, Limit, NotFound, Solved, solve
from denselab.errors import InputError


@dataclass(frozen=True)
class Option:
    """Bits a group may take, what they lose, and where measured, what they cost.

    weight_bytes: on disk; None: elements times bits, in whole bytes. milliseconds: None where nobody measured.
    """

    weight_bits: int
    activation_bits: int
    loss: float
    weight_bytes: int | None = None
    milliseconds: float | None = None

    def __post_init__(self) -> None:
        if min(self.weight_bits, self.activation_bits) < 1:
            raise InputError(f"option: wanted at least 1 bit, got W{self.weight_bits}A{self.activation_bits}")
        for name, cost in (("weight_bytes", self.weight_bytes), ("milliseconds", self.milliseconds)):
            if cost is not None and not (math.isfinite(cost) and cost >= 0):
                raise InputError(f"option: {name} is {cost}; wanted a finite number from 0 up, or None if not known")


@dataclass(frozen=True)
class Group:
    """Sites that share one choice. weights, activations: elements; macs: multiply-accumulates of one image.

    What nobody may choose (the first layer at 8 bits, the bytes of the graph) is a group with one option.
    relevance: weight w_l on the loss of its options.
    """

    key: str
    options: tuple[Option, ...]
    weights: int = 0
    activations: int = 0
    macs: int = 0
    relevance: float = 1.0

    def __post_init__(self) -> None:
        if not self.options:
            raise InputError(f"site {self.key}: has no options; wanted at least one")
        if min(self.weights, self.activations, self.macs) < 0:
            raise InputError(f"site {self.key}: wanted counts of elements and MACs from 0 up, got a negative one")
        if not (math.isfinite(self.relevance) and self.relevance >= 0):
            raise InputError(f"site {self.key}: relevance is {self.relevance}; wanted a finite number from 0 up")
        for option in self.options:
            if not math.isfinite(option.loss):
                bits = f"W{option.weight_bits}A{option.activation_bits}"
                raise InputError(f"site {self.key}: its loss at {bits} is {option.loss}; wanted a finite number")


@dataclass(frozen=True)
class Pair:
    """A loss that is added where two groups both take these options, given by their place among the group's own."""

    first: str
    first_option: int
    second: str
    second_option: int
    loss: float


@dataclass(frozen=True)
class Totals:
    """What a choice costs, in every unit; nan where there is no element, None where a time was not measured."""

    mean_weight_bits: float
    mean_activation_bits: float
    weight_bytes: int
    bops: int
    milliseconds: float | None


@dataclass(frozen=True)
class Allocation:
    """The chosen option of every group by key, its total loss, and a proven lower bound on any within the budget."""

    budget: Budget
    chosen: dict[str, Option]
    loss: float
    loss_bound: float
    totals: Totals

    @property
    def gap(self) -> float:
        """How much less than this loss might be reached, relative to it; 0: proven least."""
        apart = self.loss - self.loss_bound
        return apart / max(abs(self.loss), abs(self.loss_bound)) if apart else 0.0


def tied(key: str, groups: Sequence[Group]) -> Group:
    """One group of several that shall choose the same bits; elements, MACs, bytes, times and weighed losses add up.

    Raises InputError if they do not offer the same bits in the same order.
    """
    offered = [tuple((option.weight_bits, option.activation_bits) for option in group.options) for group in groups]
    if not groups or len(set(offered)) > 1:
        names = ", ".join(group.key for group in groups) or "none"
        raise InputError(f"group {key}: wanted sites that offer the same bits in the same order, got {names}")
    together = [
        Option(
            weight_bits,
            activation_bits,
            sum(group.relevance * group.options[index].loss for group in groups),
            sum(_weight_bytes(group, group.options[index]) for group in groups),
            _sum_or_none([group.options[index].milliseconds for group in groups]),
        )
        for index, (weight_bits, activation_bits) in enumerate(offered[0])
    ]
    weights, activations = sum(group.weights for group in groups), sum(group.activations for group in groups)
    return Group(key, tuple(together), weights, activations, sum(group.macs for group in groups))


def allocate(
    groups: Sequence[Group], budget: Budget, pairs: Sequence[Pair] = (), time_limit_s: float = 60.0
) -> Allocation:
    """The options of least total loss within the budget.

    Ends with the best allocation found, and how far from the least it may be, after time_limit_s. Raises InputError
    for a budget below what any choice needs, naming the least that can be met; for times nobody measured; for keys
    that are there twice or unknown; and where no allocation was found in time.
    """
    keys = [group.key for group in groups]
    if not groups or len(set(keys)) < len(keys):
        twice = ", ".join(sorted({key for key in keys if keys.count(key) > 1})) or "no group at all"
        raise InputError(f"groups: wanted at least one, each under a key of its own, got {twice}")
    match solve(_knapsack(groups, pairs, _limits(groups, budget)), time_limit_s):
        case Solved(picked, loss, bound):
            options = [option for group in groups for option in group.options]
            chosen = {group.key: options[index] for group, index in zip(groups, picked.tolist(), strict=True)}
            return Allocation(budget, chosen, loss, bound, totals(groups, chosen))
        case Infeasible(times):
            raise InputError(
                f"budget: {budget_text(budget)} is below what any choice of bits needs; "
                f"the nearest that can be met is {budget_text(scaled(budget, times))}"
            )
        case NotFound(reason):
            raise InputError(
                f"allocation: nothing within {budget_text(budget)} was found in {time_limit_s:g} s ({reason}); "
                "allow more time or give fewer pair terms"
            )


def pareto(
    groups: Sequence[Group], budgets: Sequence[Budget], pairs: Sequence[Pair] = (), time_limit_s: float = 60.0
) -> tuple[Allocation, ...]:
    """The allocation for each budget, in the order given; time_limit_s and errors are those of `allocate`, for each."""
    return tuple(allocate(groups, budget, pairs, time_limit_s) for budget in budgets)


def totals(groups: Sequence[Group], chosen: dict[str, Option]) -> Totals:
    """What a choice costs in every unit, so that any plan, edited by hand or not, can be reported."""
    both = [(group, chosen[group.key]) for group in groups]
    weights, activations = sum(group.weights for group in groups), sum(group.activations for group in groups)
    return Totals(
        sum(group.weights * option.weight_bits for group, option in both) / weights if weights else math.nan,
        sum(group.activations * option.activation_bits for group, option in both) / activations
        if activations
        else math.nan,
        sum(_weight_bytes(group, option) for group, option in both),
        sum(group.macs * option.weight_bits * option.activation_bits for group, option in both),
        _sum_or_none([option.milliseconds for _, option in both]),
    )


def _limits(groups: Sequence[Group], budget: Budget) -> tuple[Limit, ...]:
    """What must stay within what. Raises InputError where there is nothing to limit."""
    match budget:
        case MeanBits(weights, activations):
            by_weights = _costs(groups, lambda group, option: group.weights * option.weight_bits)
            by_activations = _costs(groups, lambda group, option: group.activations * option.activation_bits)
            weight_count, activation_count = (sum(g.weights for g in groups), sum(g.activations for g in groups))
            limits = [
                Limit(costs, most * count)
                for costs, most, count in (
                    (by_weights, weights, weight_count),
                    (by_activations, activations, activation_count),
                )
                if most is not None and count
            ]
        case Bytes(most):
            limits = [Limit(_costs(groups, _weight_bytes), most)]
        case FloatShare(most, float_bytes):
            limits = [Limit(_costs(groups, _weight_bytes), most * float_bytes)]
        case Bops(most):
            costs = _costs(groups, lambda group, option: group.macs * option.weight_bits * option.activation_bits)
            limits = [Limit(costs, most)]
        case Milliseconds(most):
            limits = [Limit(_costs(groups, _milliseconds), most)]
        case _:
            assert_never(budget)
    if not limits:
        raise InputError("budget: limits nothing; give the mean bits of weights or activations that the model has")
    if any(limit.most <= 0 for limit in limits):
        raise InputError(f"budget: wanted more than 0, got {budget_text(budget)}")
    return tuple(limits)


def _costs(groups: Sequence[Group], cost: Callable[[Group, Option], float]) -> Floats:
    return np.array([cost(group, option) for group in groups for option in group.options], np.float64)


def _weight_bytes(group: Group, option: Option) -> int:
    return -(-group.weights * option.weight_bits // 8) if option.weight_bytes is None else option.weight_bytes


def _milliseconds(group: Group, option: Option) -> float:
    if option.milliseconds is None:
        bits = f"W{option.weight_bits}A{option.activation_bits}"
        raise InputError(
            f"site {group.key}: {bits} has no measured milliseconds; measure them, or budget in MB or bits"
        )
    return option.milliseconds


def _sum_or_none(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _knapsack(groups: Sequence[Group], pairs: Sequence[Pair], limits: tuple[Limit, ...]) -> Knapsack:
    return Knapsack(
        tuple(len(group.options) for group in groups),
        _costs(groups, lambda group, option: group.relevance * option.loss),
        _products(groups, pairs),
        _costs(groups, lambda g, option: g.weights * option.weight_bits + g.activations * option.activation_bits),
        limits,
    )


def _products(groups: Sequence[Group], pairs: Sequence[Pair]) -> tuple[tuple[int, int, float], ...]:
    """Two places among all options, and the loss, of every pair. Raises InputError for a pair of what is not there."""
    starts = itertools.accumulate((len(group.options) for group in groups), initial=0)
    place = {group.key: (start, len(group.options)) for group, start in zip(groups, starts, strict=False)}

    def column(key: str, option: int) -> int:
        if key not in place:
            raise InputError(f"pair term: there is no site {key} among those to allocate")
        start, count = place[key]
        if not 0 <= option < count:
            raise InputError(f"pair term: site {key} has options 0..{count - 1}, got {option}")
        return start + option

    for pair in pairs:
        if pair.first == pair.second or not math.isfinite(pair.loss):
            raise InputError(
                f"pair term: wanted a finite loss of two sites, got {pair.loss} of {pair.first} and {pair.second}"
            )
    return tuple((column(p.first, p.first_option), column(p.second, p.second_option), p.loss) for p in pairs)
