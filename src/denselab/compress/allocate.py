"""Which bits each group of sites gets: the least total loss within one budget, solved exactly.

Each group l chooses one of its options b. With x_lb = 1 where it does (Mix-QViT, arXiv:2501.06357, and CLADO,
arXiv:2307.05657, which adds the pair terms G):

    minimise    sum_l w_l sum_b loss_lb x_lb  +  sum_(lb, mc) G_lb,mc x_lb x_mc
    subject to  sum_b x_lb = 1 for every l,    sum_lb cost_lb x_lb <= budget

w_l is the group's relevance, so that the loss is Omega = sum_l w_l ||error_l|| (LRP-QViT, arXiv:2401.11243; how the
two are combined is ours, as the papers' code is not public). Without pair terms this is the multiple-choice knapsack;
a product of two binaries y = x z is linear with the one side of McCormick's envelope that the sign of G makes bind:
y >= x + z - 1 or y <= x, y <= z. HiGHS solves it by branch and bound, without a gap, through SciPy.

Losses are told apart down to 1e-9 of their spread, as the solver's tolerances are absolute. Of allocations with equal
loss the one with fewer bits is taken (of weights and activations, counted by their elements), so far as a second search
of at most 1000 nodes finds it.
"""

import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, assert_never

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from denselab.errors import InputError

_SLACK = 1e-9
_SCALE = 1e3
_TIE_NODES = 1000
_BYTE_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}

Floats = NDArray[np.float64]


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
class MeanBits:
    """At most so many bits in the mean over all elements of weights, and of activations; None: not limited."""

    weights: float | None = None
    activations: float | None = None


@dataclass(frozen=True)
class Bytes:
    """At most so many bytes of weights on disk."""

    most: int


@dataclass(frozen=True)
class FloatShare:
    """At most this share of the bytes that the model takes as float32."""

    most: float
    float_bytes: int


@dataclass(frozen=True)
class Bops:
    """At most so many bit operations: the sum of MACs x bits of weights x bits of activations."""

    most: float


@dataclass(frozen=True)
class Milliseconds:
    """At most this sum of the options' measured milliseconds."""

    most: float


Budget = MeanBits | Bytes | FloatShare | Bops | Milliseconds


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


def parse_budget(text: str, float_bytes: int) -> Budget:
    """The budget that "4.0bits" (of weights and of activations), "2.5MB", "0.25x", "3.5GBOPs" or "8ms" says.

    MB is 10^6 bytes, MiB 2^20. float_bytes: the model's size as float32, of which "x" is a share. Raises InputError.
    """
    found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([a-z]+)\s*", text.lower())
    if not found:
        raise InputError(f"budget: wanted a number and a unit, such as 4.0bits, 2.5MB, 0.25x or 8ms, got {text!r}")
    value, unit = float(found[1]), found[2]
    if value <= 0:
        raise InputError(f"budget: wanted more than 0, got {text!r}")
    match unit:
        case "bits" | "bit":
            return MeanBits(value, value)
        case "x":
            return FloatShare(value, float_bytes)
        case "ms":
            return Milliseconds(value)
        case "gbops":
            return Bops(value * 1e9)
        case _ if unit in _BYTE_UNITS:
            return Bytes(math.floor(value * _BYTE_UNITS[unit] * (1 + 1e-12)))
        case _:
            raise InputError(f"budget: wanted bits, B, kB, MB, GB, x, ms or GBOPs as its unit, got {text!r}")


def budget_text(budget: Budget) -> str:
    """A budget as the user wrote it: exact in bytes and BOPs, else to 4 decimals, rounded up."""
    match budget:
        case MeanBits(weights, activations):
            if weights == activations or weights is None or activations is None:
                of = "" if weights == activations else " of activations" if weights is None else " of weights"
                return f"{_up(weights if weights is not None else activations or 0)}bits{of}"
            return f"{_up(weights)}bits of weights and {_up(activations)}bits of activations"
        case Bytes(most):
            return f"{most / 1e6:.6f}MB" if most >= 10**6 else f"{most}B"
        case FloatShare(most):
            return f"{_up(most)}x"
        case Bops(most):
            return f"{_up(most / 1e9, 9)}GBOPs"
        case Milliseconds(most):
            return f"{_up(most)}ms"
        case _:
            assert_never(budget)


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
    until = time.monotonic() + time_limit_s
    limits = _limits(groups, budget)
    program = _program(groups, pairs, limits)
    cuts: list[NDArray[np.intp]] = []
    while True:
        answer = _solve(program, until, cuts)
        if answer.status == 2:
            raise InputError(_infeasible(groups, budget, limits, time_limit_s))
        if answer.x is None:
            raise InputError(
                f"allocation: nothing within {budget_text(budget)} was found in {time_limit_s:g} s "
                f"({answer.message.strip()}); allow more time or give fewer pair terms"
            )
        picked = _picked(program, answer.x)
        if _met(limits, picked):
            break
        cuts.append(picked)  # within the solver's tolerance of the budget, and above it
    loss, bound = _loss(program, picked), program.least + float(answer.mip_dual_bound) * program.unit
    if answer.status == 0:
        picked = _fewest_bits(program, limits, until, cuts, picked)
        loss = bound = _loss(program, picked)
    options = [option for group in groups for option in group.options]
    chosen = {group.key: options[index] for group, index in zip(groups, picked.tolist(), strict=True)}
    return Allocation(budget, chosen, loss, min(bound, loss), totals(groups, chosen))


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


@dataclass(frozen=True, eq=False)
class _Limit:
    """costs: of every option of every group, one after another."""

    costs: Floats
    most: float


@dataclass(frozen=True, eq=False)
class _Program:
    """Columns: every option of every group, then every pair. Loss = least + unit x objective."""

    objective: Floats
    least: float
    unit: float
    losses: Floats
    pairs: tuple[tuple[int, int, float], ...]
    bits: Floats
    starts: NDArray[np.intp]
    constraints: tuple[LinearConstraint, ...]

    @property
    def num_options(self) -> int:
        return len(self.losses)


def _limits(groups: Sequence[Group], budget: Budget) -> list[_Limit]:
    """What must stay within what. Raises InputError where there is nothing to limit."""
    match budget:
        case MeanBits(weights, activations):
            by_weights = _costs(groups, lambda group, option: group.weights * option.weight_bits)
            by_activations = _costs(groups, lambda group, option: group.activations * option.activation_bits)
            weight_count, activation_count = (sum(g.weights for g in groups), sum(g.activations for g in groups))
            limits = [
                _Limit(costs, most * count)
                for costs, most, count in (
                    (by_weights, weights, weight_count),
                    (by_activations, activations, activation_count),
                )
                if most is not None and count
            ]
        case Bytes(most):
            limits = [_Limit(_costs(groups, _weight_bytes), most)]
        case FloatShare(most, float_bytes):
            limits = [_Limit(_costs(groups, _weight_bytes), most * float_bytes)]
        case Bops(most):
            costs = _costs(groups, lambda group, option: group.macs * option.weight_bits * option.activation_bits)
            limits = [_Limit(costs, most)]
        case Milliseconds(most):
            limits = [_Limit(_costs(groups, _milliseconds), most)]
        case _:
            assert_never(budget)
    if not limits:
        raise InputError("budget: limits nothing; give the mean bits of weights or activations that the model has")
    if any(limit.most <= 0 for limit in limits):
        raise InputError(f"budget: wanted more than 0, got {budget_text(budget)}")
    return limits


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


def _program(groups: Sequence[Group], pairs: Sequence[Pair], limits: Sequence[_Limit]) -> _Program:
    """Losses counted from each group's least, and all scaled well above the solver's absolute tolerances of 1e-6."""
    sizes = np.array([len(group.options) for group in groups])
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    losses = np.array([group.relevance * option.loss for group in groups for option in group.options])
    own_least = np.minimum.reduceat(losses, starts)
    above = losses - np.repeat(own_least, sizes)
    products = _products(groups, pairs, starts)
    pair_losses = np.array([loss for _, _, loss in products])
    unit = float(np.maximum.reduceat(above, starts).sum() + np.abs(pair_losses).sum()) / _SCALE or 1.0
    columns = len(losses) + len(products)
    constraints = [LinearConstraint(_one_each(groups, columns), 1, 1), *_mccormick(products, len(losses))]
    for limit in limits:
        constraints.append(LinearConstraint(_row(limit.costs * (_SCALE / limit.most), columns), -np.inf, _SCALE))
    return _Program(
        np.concatenate([above, pair_losses]) / unit,
        float(own_least.sum()),
        unit,
        losses,
        products,
        _costs(groups, lambda g, option: g.weights * option.weight_bits + g.activations * option.activation_bits),
        starts,
        tuple(constraints),
    )


def _products(
    groups: Sequence[Group], pairs: Sequence[Pair], starts: NDArray[np.intp]
) -> tuple[tuple[int, int, float], ...]:
    """The two columns and the loss of every pair. Raises InputError for a pair of what is not there."""
    place = {group.key: (int(start), len(group.options)) for group, start in zip(groups, starts, strict=True)}

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


def _mccormick(products: Sequence[tuple[int, int, float]], num_options: int) -> list[LinearConstraint]:
    """y = x z for binaries x and z, from the side towards which a minimum would pull y."""
    rows: list[tuple[dict[int, float], float]] = []
    for y, (x, z, loss) in enumerate(products, start=num_options):
        if loss > 0:
            rows.append(({x: 1.0, z: 1.0, y: -1.0}, 1.0))
        else:
            rows += [({y: 1.0, x: -1.0}, 0.0), ({y: 1.0, z: -1.0}, 0.0)]
    if not rows:
        return []
    where = [(number, column, value) for number, (row, _) in enumerate(rows) for column, value in row.items()]
    numbers, columns, values = zip(*where, strict=True)
    matrix = sparse.csr_matrix((values, (numbers, columns)), shape=(len(rows), num_options + len(products)))
    most: Any = np.array([right for _, right in rows])
    return [LinearConstraint(matrix, -np.inf, most)]


def _one_each(groups: Sequence[Group], columns: int) -> sparse.csr_matrix:
    sizes = [len(group.options) for group in groups]
    entries = (np.ones(sum(sizes)), (np.repeat(np.arange(len(groups)), sizes), np.arange(sum(sizes))))
    return sparse.csr_matrix(entries, shape=(len(groups), columns))


def _row(values: Floats, columns: int) -> sparse.csr_matrix:
    return sparse.csr_matrix(np.pad(values, (0, columns - len(values)))[None])


def _solve(
    program: _Program,
    until: float,
    cuts: Sequence[NDArray[np.intp]],
    objective: Floats | None = None,
    also: Sequence[LinearConstraint] = (),
    **options: int,
) -> Any:
    """cuts: choices (columns) that are not allowed together."""
    columns = len(program.objective)
    forbidden = [
        LinearConstraint(_row(np.isin(np.arange(columns), cut).astype(np.float64), columns), 0, len(cut) - 1)
        for cut in cuts
    ]
    return milp(
        program.objective if objective is None else objective,
        integrality=np.arange(columns) < program.num_options,
        bounds=Bounds(0, 1),
        constraints=[*program.constraints, *also, *forbidden],
        options={"mip_rel_gap": 0, "time_limit": max(until - time.monotonic(), 0.01), **options},
    )


def _picked(program: _Program, x: Floats) -> NDArray[np.intp]:
    """The column that each group chooses."""
    parts = np.split(x[: program.num_options], program.starts[1:])
    return program.starts + np.array([int(part.argmax()) for part in parts])


def _met(limits: Sequence[_Limit], picked: NDArray[np.intp]) -> bool:
    return all(math.fsum(limit.costs[picked]) <= limit.most * (1 + _SLACK) for limit in limits)


def _loss(program: _Program, picked: NDArray[np.intp]) -> float:
    taken = set(picked.tolist())
    return math.fsum([*program.losses[picked], *(loss for x, z, loss in program.pairs if x in taken and z in taken)])


def _fewest_bits(
    program: _Program,
    limits: Sequence[_Limit],
    until: float,
    cuts: Sequence[NDArray[np.intp]],
    picked: NDArray[np.intp],
) -> NDArray[np.intp]:
    """Among choices of this least loss, one of fewer bits, if a bounded search finds it; else the one given."""
    bits = program.bits / (program.bits.max() or 1.0)
    columns = len(program.objective)
    least = float(program.objective[: program.num_options][picked].sum())
    taken = set(picked.tolist())
    least += sum(loss for x, z, loss in program.pairs if x in taken and z in taken) / program.unit
    no_worse = LinearConstraint(sparse.csr_matrix(program.objective[None]), -np.inf, least)
    answer = _solve(program, until, cuts, np.pad(bits, (0, columns - len(bits))), [no_worse], node_limit=_TIE_NODES)
    if answer.x is None:
        return picked
    other = _picked(program, answer.x)
    equal = _loss(program, other) <= _loss(program, picked) + 1e-12 * _SCALE * program.unit
    fewer = program.bits[other].sum() < program.bits[picked].sum()
    return other if equal and fewer and _met(limits, other) else picked


def _infeasible(groups: Sequence[Group], budget: Budget, limits: Sequence[_Limit], time_limit_s: float) -> str:
    """Names the nearest budget that can be met: the given one times the least t within which some choice stays."""
    num_options = len(limits[0].costs)
    within = [LinearConstraint(np.append(limit.costs / limit.most, -1)[None], -np.inf, 0) for limit in limits]
    highest: Any = np.append(np.ones(num_options), np.inf)
    answer: Any = milp(
        np.append(np.zeros(num_options), 1),
        integrality=np.append(np.ones(num_options), 0),
        bounds=Bounds(0, highest),
        constraints=[LinearConstraint(_one_each(groups, num_options + 1), 1, 1), *within],
        options={"mip_rel_gap": 0, "time_limit": max(time_limit_s, 10)},
    )
    sizes = [len(group.options) for group in groups]
    picked = [int(part.argmax()) for part in np.split(answer.x[:-1], np.cumsum(sizes)[:-1])]
    columns = [sum(sizes[:group]) + option for group, option in enumerate(picked)]
    times = max(math.fsum(limit.costs[columns]) / limit.most for limit in limits)
    return (
        f"budget: {budget_text(budget)} is below what any choice of bits needs; "
        f"the nearest that can be met is {budget_text(_scaled(budget, times))}"
    )


def _scaled(budget: Budget, times: float) -> Budget:
    match budget:
        case MeanBits(weights, activations):
            return MeanBits(weights and weights * times, activations and activations * times)
        case Bytes(most):
            return Bytes(math.ceil(most * times - 1e-6))
        case FloatShare(most, float_bytes):
            return FloatShare(most * times, float_bytes)
        case Bops(most):
            return Bops(most * times)
        case Milliseconds(most):
            return Milliseconds(most * times)
        case _:
            assert_never(budget)


def _up(value: float, decimals: int = 4) -> str:
    return f"{math.ceil(value * 10**decimals - 1e-6) / 10**decimals:.{decimals}f}".rstrip("0").rstrip(".")
