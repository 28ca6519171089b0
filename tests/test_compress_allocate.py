"""Allocation against brute force over all combinations, values worked by hand, and budgets at the edge."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
from scipy.optimize import OptimizeResult

from denselab.compress import knapsack
from denselab.compress.allocate import Allocation, Group, Option, Pair, allocate, pareto, tied, totals
from denselab.compress.budgets import (
    Bops,
    Budget,
    Bytes,
    FloatShare,
    MeanBits,
    Milliseconds,
    budget_text,
    parse_budget,
)
from denselab.errors import InputError


def random_groups(rng: np.random.Generator, count: int, options: int, whole_losses: bool = False) -> list[Group]:
    groups = []
    for index in range(count):
        offered = []
        for _ in range(options):
            loss = float(rng.integers(-1, 4)) if whole_losses else float(rng.lognormal(0, 2))
            bits = (int(rng.integers(2, 9)), int(rng.integers(2, 9)))
            offered.append(Option(*bits, loss, milliseconds=float(rng.uniform(0.1, 1))))
        counts = (int(rng.integers(1, 50)), int(rng.integers(1, 50)), int(rng.integers(1, 1000)))
        groups.append(Group(f"site{index}", tuple(offered), *counts, relevance=float(rng.integers(0, 3))))
    return groups


def spent(groups: list[Group], chosen: dict[str, Option], budget: Budget) -> list[tuple[float, float]]:
    both = [(group, chosen[group.key]) for group in groups]
    disk = sum(-(-group.weights * option.weight_bits // 8) for group, option in both)
    match budget:
        case MeanBits(weights, activations):
            of_weights = sum(g.weights * o.weight_bits for g, o in both) / sum(g.weights for g in groups)
            of_activations = sum(g.activations * o.activation_bits for g, o in both) / sum(
                g.activations for g in groups
            )
            return [(of_weights, weights or math.inf), (of_activations, activations or math.inf)]
        case Bytes(most):
            return [(disk, most)]
        case FloatShare(most, float_bytes):
            return [(disk / float_bytes, most)]
        case Bops(most):
            return [(sum(g.macs * o.weight_bits * o.activation_bits for g, o in both), most)]
        case Milliseconds(most):
            return [(sum(o.milliseconds or 0 for _, o in both), most)]


def loss_of(groups: list[Group], picked: tuple[int, ...], pairs: list[Pair]) -> float:
    place = {group.key: index for group, index in zip(groups, picked, strict=True)}
    own = sum(group.relevance * group.options[index].loss for group, index in zip(groups, picked, strict=True))
    return own + sum(p.loss for p in pairs if place[p.first] == p.first_option and place[p.second] == p.second_option)


def brute_force(groups: list[Group], budget: Budget, pairs: list[Pair]) -> tuple[float, float] | None:
    """Least loss, and the fewest bits with it."""
    found = []
    for picked in itertools.product(*(range(len(group.options)) for group in groups)):
        chosen = {g.key: g.options[index] for g, index in zip(groups, picked, strict=True)}
        if all(cost <= most * (1 + 1e-9) for cost, most in spent(groups, chosen, budget)):
            found.append((loss_of(groups, picked, pairs), bits_of(groups, chosen)))
    if not found:
        return None
    least = min(loss for loss, _ in found)
    return least, min(bits for loss, bits in found if loss <= least + 1e-9)


def bits_of(groups: list[Group], chosen: dict[str, Option]) -> float:
    return sum(g.weights * chosen[g.key].weight_bits + g.activations * chosen[g.key].activation_bits for g in groups)


def random_budget(rng: np.random.Generator, groups: list[Group], kind: int) -> Budget:
    """What a random choice costs: met exactly by at least one."""
    chosen = {group.key: group.options[rng.integers(len(group.options))] for group in groups}
    cost = totals(groups, chosen)
    assert cost.milliseconds is not None
    budgets = (
        MeanBits(cost.mean_weight_bits, cost.mean_activation_bits),
        MeanBits(weights=cost.mean_weight_bits),
        MeanBits(activations=cost.mean_activation_bits),
        Bytes(cost.weight_bytes),
        FloatShare(cost.weight_bytes / 997, 997),
        Bops(cost.bops),
        Milliseconds(cost.milliseconds),
    )
    return budgets[kind]


def check_optimal(groups: list[Group], budget: Budget, pairs: list[Pair]) -> Allocation:
    answer = allocate(groups, budget, pairs)
    expected = brute_force(groups, budget, pairs)
    assert expected is not None
    assert answer.loss == pytest.approx(expected[0], rel=1e-9, abs=1e-9)
    assert answer.gap == 0
    assert all(cost <= most * (1 + 1e-9) for cost, most in spent(groups, answer.chosen, budget))
    assert bits_of(groups, answer.chosen) == expected[1]
    return answer


@pytest.mark.parametrize("kind", range(7))
def test_equals_brute_force(kind: int) -> None:
    rng = np.random.default_rng(kind)
    for repeat in range(6):
        groups = random_groups(rng, 5, 4, whole_losses=repeat % 2 == 0)
        check_optimal(groups, random_budget(rng, groups, kind), [])


@pytest.mark.parametrize("kind", [0, 3, 6])
def test_pair_terms_equal_brute_force(kind: int) -> None:
    rng = np.random.default_rng(kind)
    for _ in range(4):
        groups = random_groups(rng, 4, 3, whole_losses=True)
        every = [
            Pair(f"site{a}", i, f"site{b}", j, float(rng.integers(-3, 4)))
            for a, b in itertools.combinations(range(4), 2)
            for i, j in itertools.product(range(3), repeat=2)
        ]
        pairs = [every[index] for index in rng.choice(len(every), 25, replace=False)]
        check_optimal(groups, random_budget(rng, groups, kind), pairs)


def two_sites(relevance: float = 1.0) -> list[Group]:
    """Site a: 100 weights; b: 300. 8 bits lose nothing, 4 lose 1, 2 lose 5."""
    options = (Option(8, 8, 0), Option(4, 4, 1), Option(2, 2, 5))
    return [Group("a", options, 100, 100, 10, relevance), Group("b", options, 300, 300, 10)]


def test_by_hand() -> None:
    # mean 5 bits are 2000 bits: a at 8 and b at 4 take 800 + 1200; a at 4 and b at 8 would take 2800
    answer = allocate(two_sites(), MeanBits(5, 5))
    assert {key: option.weight_bits for key, option in answer.chosen.items()} == {"a": 8, "b": 4}
    assert (answer.loss, answer.gap) == (1, 0)
    assert answer.totals.mean_weight_bits == 5
    assert answer.totals.weight_bytes == 250
    assert answer.totals.bops == 10 * 64 + 10 * 16
    # 3 bits are 1200: a 2, b 2 lose 10; a 4, b 2 (1000) lose 6; a 8, b 2 (1400) is too much, a 2, b 4 (1400) too
    assert allocate(two_sites(), MeanBits(3)).loss == 6
    # 110 bytes are 880 bits, which a 2, b 2 (800) alone keep
    assert allocate(two_sites(), Bytes(110)).loss == 10


def test_relevance_weighs_the_loss() -> None:
    # 3.5 bits are 1400: a 8, b 2 lose 5; a 2, b 4 lose 5 w + 1
    assert allocate(two_sites(0.5), MeanBits(3.5)).chosen["b"].weight_bits == 4
    assert allocate(two_sites(0.5), MeanBits(3.5)).loss == 3.5
    assert allocate(two_sites(2.0), MeanBits(3.5)).chosen["b"].weight_bits == 2


def test_ties_take_fewer_bits() -> None:
    silent = [Group("a", (Option(8, 8, 3), Option(2, 3, 3), Option(4, 2, 3)), 10, 10)]
    assert allocate(silent, MeanBits(8, 8)).chosen["a"] == Option(2, 3, 3)
    assert {option.weight_bits for option in allocate(two_sites(0), MeanBits(8)).chosen.values()} == {2, 8}


def test_one_site_one_option_at_its_budget() -> None:
    only = [Group("a", (Option(3, 3, 7, milliseconds=0.3),), 5, 5, 2)]
    for budget in (MeanBits(3, 3), Bytes(2), FloatShare(0.1, 20), Bops(18), Milliseconds(0.3)):
        answer = allocate(only, budget)
        assert (answer.chosen["a"], answer.loss, answer.gap) == (only[0].options[0], 7, 0)
    assert math.isnan(allocate([Group("a", (Option(3, 3, 7),), 5)], MeanBits(3, 3)).totals.mean_activation_bits)


@pytest.mark.parametrize(
    ("budget", "nearest"),
    [
        (MeanBits(1.5, 1.5), "1.5bits is below what any choice of bits needs; the nearest that can be met is 2bits"),
        (MeanBits(activations=1), "1bits of activations .* is 2bits of activations"),
        (MeanBits(1, 4), "1bits of weights and 4bits of activations .* is 2bits of weights and 8bits of activations"),
        (Bytes(99), "99B .* is 100B"),
        (FloatShare(0.01, 1600), "0.01x .* is 0.0625x"),
        (Bops(60), "0.00000006GBOPs .* is 0.00000008GBOPs"),
    ],
)
def test_a_budget_too_small_names_the_nearest(budget: Budget, nearest: str) -> None:
    with pytest.raises(InputError, match=nearest):
        allocate(two_sites(), budget)


def test_the_nearest_budget_can_be_met() -> None:
    rng = np.random.default_rng(5)
    groups = random_groups(rng, 6, 3)
    for text in ("0.5bits", "1B", "0.001x", "0.01ms"):
        with pytest.raises(InputError, match="nearest") as caught:
            allocate(groups, parse_budget(text, 4000))
        nearest = str(caught.value).rpartition(" is ")[2]
        assert allocate(groups, parse_budget(nearest, 4000)).gap == 0


def test_limits_that_no_choice_meets_together() -> None:
    groups = [Group("a", (Option(2, 8, 0), Option(8, 2, 0)), 10, 10)]
    with pytest.raises(InputError, match=r"4bits .* the nearest that can be met is 8bits"):
        allocate(groups, MeanBits(4, 4))


def test_pair_terms_by_hand() -> None:
    # 5 bits: a 8, b 4 lose 1 + 9; a 4, b 4 lose 2 - 1
    pairs = [Pair("a", 0, "b", 1, 9.0), Pair("b", 1, "a", 1, -1.0)]
    answer = allocate(two_sites(), MeanBits(5), pairs)
    assert answer.loss == 1
    assert {option.weight_bits for option in answer.chosen.values()} == {4}


def test_two_hundred_sites() -> None:
    rng = np.random.default_rng(0)
    bits = range(2, 9)
    groups = []
    for index in range(200):
        sensitivity = rng.lognormal(0, 1.5)
        options = tuple(Option(b, b, float(sensitivity * 4.0**-b * rng.uniform(0.8, 1.2))) for b in bits)
        groups.append(Group(f"site{index}", options, int(rng.integers(1000, 600000)), 1000))
    curve = pareto(groups, [MeanBits(3), MeanBits(4), MeanBits(6)])
    assert [answer.gap for answer in curve] == [0, 0, 0]
    assert curve[0].loss > curve[1].loss > curve[2].loss
    assert all(answer.totals.mean_weight_bits <= most for answer, most in zip(curve, (3, 4, 6), strict=True))
    uniform = sum(group.options[2].loss for group in groups)
    assert curve[1].loss < uniform / 2


def test_says_how_far_from_the_least_it_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    solve = knapsack.milp

    def out_of_time(*args: Any, **kwargs: Any) -> OptimizeResult:
        answer = solve(*args, **kwargs)
        answer.status, answer.mip_dual_bound = 1, answer.fun / 2
        return answer

    monkeypatch.setattr(knapsack, "milp", out_of_time)
    answer = allocate(two_sites(), MeanBits(3))
    assert (answer.loss, answer.loss_bound) == pytest.approx((6, 3))
    assert answer.gap == pytest.approx(0.5)
    monkeypatch.setattr(
        knapsack, "milp", lambda *_, **__: OptimizeResult(x=None, status=1, message="Time limit reached.")
    )
    with pytest.raises(InputError, match=r"nothing within 3bits of weights was found in 9 s \(Time limit reached"):
        allocate(two_sites(), MeanBits(3), time_limit_s=9)


def test_sites_that_share_a_choice() -> None:
    q = Group("q", (Option(8, 8, 0, milliseconds=1), Option(4, 4, 1, milliseconds=0.5)), 10, 20, 30, relevance=2)
    k = Group("k", (Option(8, 8, 1, 11, milliseconds=2), Option(4, 4, 3, milliseconds=1)), 1, 2, 3)
    both = tied("qk", [q, k])
    assert both == Group("qk", (Option(8, 8, 1, 21, 3), Option(4, 4, 5, 6, 1.5)), 11, 22, 33)
    assert allocate([both], Bytes(6)).loss == 5
    with pytest.raises(InputError, match=r"group qv: .* same bits in the same order, got q, v"):
        tied("qv", [q, Group("v", (Option(4, 4, 0),))])


@pytest.mark.parametrize(
    ("text", "budget", "shown"),
    [
        ("4.0bits", MeanBits(4, 4), "4bits"),
        (" 3.25 bits", MeanBits(3.25, 3.25), "3.25bits"),
        ("2.5MB", Bytes(2500000), "2.500000MB"),
        ("4.35mb", Bytes(4350000), "4.350000MB"),
        ("1MiB", Bytes(1048576), "1.048576MB"),
        ("300B", Bytes(300), "300B"),
        ("0.25x", FloatShare(0.25, 1000), "0.25x"),
        (".5x", FloatShare(0.5, 1000), "0.5x"),
        ("8ms", Milliseconds(8), "8ms"),
        ("3.5GBOPs", Bops(3.5e9), "3.5GBOPs"),
    ],
)
def test_budgets_as_text(text: str, budget: Budget, shown: str) -> None:
    assert parse_budget(text, float_bytes=1000) == budget
    assert budget_text(budget) == shown
    assert parse_budget(shown, float_bytes=1000) == budget


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "wanted a number and a unit"),
        ("4", "wanted a number and a unit"),
        ("2,5MB", "wanted a number and a unit, such as 4.0bits, 2.5MB, 0.25x or 8ms, got '2,5MB'"),
        ("-1ms", "wanted a number and a unit"),
        ("nanms", "wanted a number and a unit"),
        ("0bits", "wanted more than 0, got '0bits'"),
        ("3miles", "wanted bits, B, kB, MB, GB, x, ms or GBOPs as its unit, got '3miles'"),
    ],
)
def test_text_that_is_no_budget(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_budget(text, 1000)


def test_what_cannot_be_allocated() -> None:
    option = Option(4, 4, 0)
    with pytest.raises(InputError, match="site a: its loss at W4A4 is nan"):
        Group("a", (Option(4, 4, math.nan),))
    with pytest.raises(InputError, match="site a: has no options"):
        Group("a", ())
    with pytest.raises(InputError, match=r"site a: relevance is -1\.0; wanted a finite number from 0 up"):
        Group("a", (option,), relevance=-1.0)
    with pytest.raises(InputError, match="site a: wanted counts of elements"):
        Group("a", (option,), weights=-1)
    with pytest.raises(InputError, match="at least 1 bit, got W0A4"):
        Option(0, 4, 0)
    with pytest.raises(InputError, match="option: milliseconds is nan; wanted a finite number from 0 up"):
        Option(4, 4, 0, milliseconds=math.nan)
    with pytest.raises(InputError, match="under a key of its own, got a"):
        allocate([Group("a", (option,)), Group("a", (option,))], Bytes(1))
    with pytest.raises(InputError, match="got no group at all"):
        allocate([], Bytes(1))
    with pytest.raises(InputError, match="budget: limits nothing"):
        allocate([Group("a", (option,))], MeanBits(4, 4))
    with pytest.raises(InputError, match="site a: W4A4 has no measured milliseconds"):
        allocate([Group("a", (option,))], Milliseconds(1))
    with pytest.raises(InputError, match="budget: wanted more than 0, got 0B"):
        allocate([Group("a", (option,), 1)], Bytes(0))
    with pytest.raises(InputError, match="no site z among"):
        allocate([Group("a", (option,), 1)], Bytes(1), [Pair("a", 0, "z", 0, 1.0)])
    with pytest.raises(InputError, match=r"site b has options 0\.\.2, got 3"):
        allocate(two_sites(), Bytes(400), [Pair("a", 0, "b", 3, 1.0)])
    with pytest.raises(InputError, match=r"finite loss of two sites, got 1\.0 of a and a"):
        allocate(two_sites(), Bytes(400), [Pair("a", 0, "a", 1, 1.0)])
