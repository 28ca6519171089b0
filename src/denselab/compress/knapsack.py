"""The multiple-choice knapsack with products of choices: one option of every group, for the least loss within limits.

With x_lb = 1 where group l takes its option b,

    minimise    sum_lb loss_lb x_lb  +  sum_(lb, mc) loss_lb,mc x_lb x_mc
    subject to  sum_b x_lb = 1 for every l,    sum_lb cost_lb x_lb <= most, for every limit

A product of two binaries y = x z is linear with the one side of McCormick's envelope that the sign of its loss makes
bind: y >= x + z - 1 or y <= x, y <= z. HiGHS solves it by branch and bound, without a gap, through SciPy.

Losses are told apart down to 1e-9 of their spread, as the solver's tolerances are absolute. Of choices with equal loss
the one of least weight is taken, so far as a second search of at most 1000 nodes finds it.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

_SLACK = 1e-9
_SCALE = 1e3
_TIE_NODES = 1000

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Limit:
    """The costs of what is taken stay within `most`. costs: of every option of every group, one after another."""

    costs: Floats
    most: float

    def met(self, picked: NDArray[np.intp]) -> bool:
        """By a choice, given by its places among all options."""
        return math.fsum(self.costs[picked]) <= self.most * (1 + _SLACK)


@dataclass(frozen=True, eq=False)
class Knapsack:
    """sizes: how many options every group has. losses, weights: of every option of every group, one after another.

    products: two places among these, and the loss where both are taken. weights: what decides between equal losses.
    """

    sizes: tuple[int, ...]
    losses: Floats
    products: tuple[tuple[int, int, float], ...]
    weights: Floats
    limits: tuple[Limit, ...]

    @cached_property
    def starts(self) -> NDArray[np.intp]:
        """The place of every group's first option."""
        return np.concatenate([[0], np.cumsum(self.sizes)[:-1]]).astype(np.intp)

    def loss(self, picked: NDArray[np.intp]) -> float:
        """Of a choice."""
        taken = set(picked.tolist())
        pairs = (loss for x, z, loss in self.products if x in taken and z in taken)
        return math.fsum([*self.losses[picked], *pairs])

    def picked(self, x: Floats) -> NDArray[np.intp]:
        """The place that each group chooses in a solution."""
        parts = np.split(x[: len(self.losses)], self.starts[1:])
        return self.starts + np.array([int(part.argmax()) for part in parts])


@dataclass(frozen=True, eq=False)
class Solved:
    """picked: places among all options, one of each group. bound: proven to lie below the loss of any choice."""

    picked: NDArray[np.intp]
    loss: float
    bound: float


@dataclass(frozen=True)
class Infeasible:
    """No choice stays within the limits; the nearest needs so many times each of them."""

    times: float


@dataclass(frozen=True)
class NotFound:
    """Nothing was found in time. reason: the solver's."""

    reason: str


def solve(knapsack: Knapsack, time_limit_s: float) -> Solved | Infeasible | NotFound:
    """The choice of least loss; the best found, with how far from the least it may be, when the time is up."""
    until = time.monotonic() + time_limit_s
    program = _Program.of(knapsack)
    cuts: list[NDArray[np.intp]] = []
    while True:
        answer = program.solve(until, cuts)
        if answer.status == 2:
            return Infeasible(_least_times(knapsack, time_limit_s))
        if answer.x is None:
            return NotFound(answer.message.strip())
        picked = knapsack.picked(answer.x)
        if all(limit.met(picked) for limit in knapsack.limits):
            break
        cuts.append(picked)  # within the solver's tolerance of the limit, and above it
    if answer.status == 0:
        picked = _lightest(program, until, cuts, picked)
        return Solved(picked, loss := knapsack.loss(picked), loss)
    loss, bound = knapsack.loss(picked), program.least + float(answer.mip_dual_bound) * program.unit
    return Solved(picked, loss, min(bound, loss))


@dataclass(frozen=True, eq=False)
class _Program:
    """The knapsack as columns: every option of every group, then every product. Loss = least + unit x objective.

    Losses are counted from each group's least, and all scaled well above the solver's absolute tolerances of 1e-6.
    """

    knapsack: Knapsack
    objective: Floats
    least: float
    unit: float
    constraints: tuple[LinearConstraint, ...]

    @classmethod
    def of(cls, knapsack: Knapsack) -> "_Program":
        losses, products, starts = knapsack.losses, knapsack.products, knapsack.starts
        own_least = np.minimum.reduceat(losses, starts)
        above = losses - np.repeat(own_least, knapsack.sizes)
        pair_losses = np.array([loss for _, _, loss in products])
        unit = float(np.maximum.reduceat(above, starts).sum() + np.abs(pair_losses).sum()) / _SCALE or 1.0
        columns = len(losses) + len(products)
        constraints = [
            LinearConstraint(_one_each(knapsack.sizes, columns), 1, 1),
            *_mccormick(products, len(losses)),
            *(
                LinearConstraint(_row(limit.costs * (_SCALE / limit.most), columns), -np.inf, _SCALE)
                for limit in knapsack.limits
            ),
        ]
        objective = np.concatenate([above, pair_losses]) / unit
        return cls(knapsack, objective, float(own_least.sum()), unit, tuple(constraints))

    def solve(
        self,
        until: float,
        cuts: Sequence[NDArray[np.intp]],
        objective: Floats | None = None,
        also: Sequence[LinearConstraint] = (),
        **options: int,
    ) -> Any:
        """cuts: choices that are not allowed."""
        columns = len(self.objective)
        forbidden = [
            LinearConstraint(_row(np.isin(np.arange(columns), cut).astype(np.float64), columns), 0, len(cut) - 1)
            for cut in cuts
        ]
        return milp(
            self.objective if objective is None else objective,
            integrality=np.arange(columns) < len(self.knapsack.losses),
            bounds=Bounds(0, 1),
            constraints=[*self.constraints, *also, *forbidden],
            options={"mip_rel_gap": 0, "time_limit": max(until - time.monotonic(), 0.01), **options},
        )


def _lightest(
    program: _Program, until: float, cuts: Sequence[NDArray[np.intp]], picked: NDArray[np.intp]
) -> NDArray[np.intp]:
    """Among choices of this least loss, one of less weight, if a bounded search finds it; else the one given."""
    knapsack = program.knapsack
    weights = knapsack.weights / (knapsack.weights.max() or 1.0)
    columns = len(program.objective)
    taken = set(picked.tolist())
    least = float(program.objective[picked].sum())
    least += sum(loss for x, z, loss in knapsack.products if x in taken and z in taken) / program.unit
    no_worse = LinearConstraint(sparse.csr_matrix(program.objective[None]), -np.inf, least)
    answer = program.solve(until, cuts, np.pad(weights, (0, columns - len(weights))), [no_worse], node_limit=_TIE_NODES)
    if answer.x is None:
        return picked
    other = knapsack.picked(answer.x)
    equal = knapsack.loss(other) <= knapsack.loss(picked) + 1e-12 * _SCALE * program.unit
    lighter = knapsack.weights[other].sum() < knapsack.weights[picked].sum()
    return other if equal and lighter and all(limit.met(other) for limit in knapsack.limits) else picked


def _least_times(knapsack: Knapsack, time_limit_s: float) -> float:
    """The least t for which some choice stays within t times every limit."""
    count = len(knapsack.losses)
    within = [LinearConstraint(np.append(limit.costs / limit.most, -1)[None], -np.inf, 0) for limit in knapsack.limits]
    highest: Any = np.append(np.ones(count), np.inf)
    answer: Any = milp(
        np.append(np.zeros(count), 1),
        integrality=np.append(np.ones(count), 0),
        bounds=Bounds(0, highest),
        constraints=[LinearConstraint(_one_each(knapsack.sizes, count + 1), 1, 1), *within],
        options={"mip_rel_gap": 0, "time_limit": max(time_limit_s, 10)},
    )
    picked = knapsack.picked(answer.x)
    return max(math.fsum(limit.costs[picked]) / limit.most for limit in knapsack.limits)


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


def _one_each(sizes: Sequence[int], columns: int) -> sparse.csr_matrix:
    entries = (np.ones(sum(sizes)), (np.repeat(np.arange(len(sizes)), sizes), np.arange(sum(sizes))))
    return sparse.csr_matrix(entries, shape=(len(sizes), columns))


def _row(values: Floats, columns: int) -> sparse.csr_matrix:
    return sparse.csr_matrix(np.pad(values, (0, columns - len(values)))[None])
