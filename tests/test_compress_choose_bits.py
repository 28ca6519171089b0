"""Choosing bits: what is measured against direct runs, losses by hand, budgets met, and what nobody may choose."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress_models import CLASSES, SIDE_PX, WIDTH, captured, images, small_graph
from denselab.compress.bit_losses import Importance, Measured, Side, side_losses
from denselab.compress.budgets import Bops, Budget, Bytes, FloatShare, MeanBits, Milliseconds
from denselab.compress.choose_bits import FLOATS, ChosenBits, bits_within, choose_bits
from denselab.compress.fold_norms import fold_norms
from denselab.compress.graph import Axis, Graph, capture
from denselab.compress.measure_losses import measure
from denselab.compress.methods.method import Calibration
from denselab.compress.methods.min_max import MIN_MAX
from denselab.compress.methods.repq_vit import REPQ_VIT
from denselab.compress.observing import Stats, observe, weights
from denselab.compress.plan import KEPT, QuantPlan
from denselab.compress.quantizers import quantized
from denselab.compress.relevance.scores import Score, fisher_diagonal, gradient_times_activation
from denselab.compress.relevance.sensitivity import squared_change
from denselab.compress.relevance.start import log_likelihood
from denselab.compress.site_groups import float_bytes, site_groups
from denselab.compress.sites import ModelHash
from denselab.errors import InputError

pytestmark = pytest.mark.usefixtures("one_thread")

QUERY, WIDEN, STEM, HEAD, TAP = (
    f"{name}/weight" for name in ("query/linear", "widen/linear", "stem/conv", "head/linear", "project/linear")
)
PRODUCT = "/matmul/query"
PIXELS = images(8)


def start(output: Any) -> Tensor:
    return log_likelihood(output[0])


@pytest.fixture(scope="module")
def graph() -> Graph:
    return fold_norms(small_graph()[1])


@pytest.fixture(scope="module")
def stats(graph: Graph) -> Stats:
    return observe(graph, [PIXELS])


@pytest.fixture(scope="module")
def measured(graph: Graph, stats: Stats) -> Measured:
    """Everything."""
    return measure(graph, stats, MIN_MAX, Calibration([PIXELS]), Importance, start=start, most_pairs_of=3)


def test_groups_of_a_network(graph: Graph) -> None:
    found = {group.key: group for group in site_groups(graph)}
    assert sorted(key for group in found.values() for key in group.sites) == sorted(site.key for site in graph.sites)
    assert set(found[QUERY].weights) == {f"{name}/linear/weight" for name in ("query", "key", "value")}
    tokens = (SIDE_PX // 4) ** 2
    # One tensor that three layers read is one tensor.
    assert (found[QUERY].weight_elements, found[QUERY].activation_elements) == (3 * WIDTH**2, tokens * WIDTH)
    assert found[QUERY].macs == 3 * tokens * WIDTH**2
    assert set(found[PRODUCT].activations) == {"/matmul/query", "/matmul/key"}
    assert found[PRODUCT].weights == ()
    assert (found[STEM].weights_kept, found[STEM].activations_kept) == (False, True)
    assert found[HEAD].free == found[TAP].free == ()  # the last product before each of the two outputs
    assert not any(group.free != group.sites for key, group in found.items() if key not in (STEM, HEAD, TAP))
    assert all(group.free for group in site_groups(graph, kept=()))


class TwoHeads(nn.Module):
    """The tensor that the head of one output reads is read by a layer before another output too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head, self.other = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 5)
        self.last = nn.Linear(5, 2)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(pixels.mean((2, 3))).relu()
        return self.head(x), self.last(self.other(x).relu())


def test_a_tensor_that_is_kept_ties_no_weights() -> None:
    found = {group.key: group for group in site_groups(captured(TwoHeads()))}
    other = found["other/linear/weight"]
    assert other.weights == ("other/linear/weight",)
    assert (other.weights_kept, other.activations_kept) == (False, True)
    # The head and the other layer read one tensor, which is counted with the head.
    assert [found[f"{name}/linear/weight"].activation_elements for name in ("head", "other")] == [4, 0]


def test_floats_are_counted(graph: Graph) -> None:
    model = small_graph()[0]
    parameters = sum(value.numel() for value in model.parameters())
    folded_away = 2 * WIDTH  # the affine part of the batch norm
    assert float_bytes(graph) == 4 * (parameters - folded_away)


def test_sensitivity_is_the_change_when_one_side_alone_is_quantized(
    graph: Graph, stats: Stats, measured: Measured
) -> None:
    groups = {group.key: group for group in site_groups(graph)}
    for key, sides, sites in (
        (QUERY, measured.weights, groups[QUERY].weights),
        (QUERY, measured.activations, groups[QUERY].activations),
        (PRODUCT, measured.activations, groups[PRODUCT].activations),
    ):
        assert list(sides[key].changes) == [2, 3, 4]
        plan = QuantPlan.make(graph, MIN_MAX.name, MIN_MAX.spec, dict.fromkeys(sites, 3))
        alone = MIN_MAX.quantize(graph, stats, plan, Calibration(()))
        with torch.no_grad():
            change = squared_change(alone.run(PIXELS), graph.run(PIXELS)).mean().item()
        assert sides[key].changes[3] == pytest.approx(change, rel=1e-4)
    assert measured.images == len(PIXELS)
    assert measured.weights[HEAD].errors == {}


def test_activations_are_measured_only_where_their_bits_are_given_out(
    graph: Graph, stats: Stats, measured: Measured
) -> None:
    asked: list[Tensor] = []

    def change(output: Any, wanted: Any) -> Tensor:
        asked.append(squared_change(output, wanted))
        return asked[-1]

    importances = (Importance.SENSITIVITY, Importance.FISHER)
    some = measure(graph, stats, MIN_MAX, Calibration([PIXELS], change), importances, start=start, activation_bits=8)
    assert len(asked) == 3 * sum(bool(group.free_weights) for group in site_groups(graph))
    assert measured.of_activations
    assert not some.of_activations
    for key, side in some.weights.items():
        assert (side.errors, side.changes) == (measured.weights[key].errors, measured.weights[key].changes)
        assert side.fisher == pytest.approx(measured.weights[key].fisher)
    budget = FloatShare(0.5, float_bytes(graph))
    assert bits_within(graph, some, budget).bits == bits_within(graph, measured, budget).bits
    with pytest.raises(InputError, match=r"candidates: 2 bits were not measured at 'query/linear/weight', but ;"):
        bits_within(graph, some, MeanBits(5, 5))


def test_pairs_of_weights_alone(graph: Graph, stats: Stats) -> None:
    found = measure(graph, stats, MIN_MAX, Calibration([PIXELS]), widths=(3,), most_pairs_of=3, activation_bits=8)
    weights_of = {group.key: group.free_weights for group in site_groups(graph)}
    pair = max(found.interactions, key=lambda each: each.share)
    one, other = weights_of[pair.first], weights_of[pair.second]

    def change(*keys: str) -> float:
        plan = QuantPlan.make(graph, MIN_MAX.name, MIN_MAX.spec, dict.fromkeys(keys, 3))
        with torch.no_grad():
            answer = MIN_MAX.quantize(graph, stats, plan, Calibration(())).run(PIXELS)
            return squared_change(answer, graph.run(PIXELS)).mean().item()

    alone = change(*one), change(*other)
    together = (change(*one, *other) - sum(alone)) / (alone[0] * alone[1]) ** 0.5
    assert pair.share == pytest.approx(together, rel=1e-3)


def test_errors_and_fisher_by_hand(graph: Graph, stats: Stats, measured: Measured) -> None:
    key = "widen/linear/weight"
    plan = QuantPlan.make(graph, MIN_MAX.name, MIN_MAX.spec, {key: 4})
    quantizer = MIN_MAX.quantize(graph, stats, plan, Calibration(())).quantizers[key]
    weight = weights(graph)[key].detach().double()
    error = quantized(quantizer, weight.float()).double() - weight
    noise = error.square().sum() / (weight - weight.mean()).square().sum()
    assert measured.weights[key].errors[4] == pytest.approx(noise.item(), rel=1e-5)
    fisher = fisher_diagonal(graph, [PIXELS], start, [key])[key].double()
    assert measured.weights[key].fisher[4] == pytest.approx((fisher * error.square()).sum().item(), rel=1e-4)


def test_errors_of_channels_do_not_count_their_means(graph: Graph, stats: Stats, measured: Measured) -> None:
    rows: list[Tensor] = []
    graph.run(PIXELS, hooks={"widen/linear/input": lambda x: rows.append(x.detach().flatten(0, 1)) or x})
    seen = rows[0].double()
    plan = QuantPlan.make(graph, MIN_MAX.name, MIN_MAX.spec, {"widen/linear/input": 2})
    quantizer = MIN_MAX.quantize(graph, stats, plan, Calibration(())).quantizers["widen/linear/input"]
    noise = (quantized(quantizer, rows[0]).double() - seen).square().sum() / (seen - seen.mean(0)).square().sum()
    assert measured.activations[WIDEN].errors[2] == pytest.approx(noise.item(), rel=1e-5)


def test_relevance_is_that_of_the_sites(graph: Graph, measured: Measured) -> None:
    scores = gradient_times_activation(graph, [PIXELS], start)
    expected = sum(scores[f"{name}/linear/weight"].magnitude for name in ("query", "key", "value"))
    assert measured.weights[QUERY].gradient == pytest.approx(expected)
    assert measured.activations[PRODUCT].lrp is not None


def test_pair_terms_are_what_two_lose_more_together(graph: Graph, stats: Stats, measured: Measured) -> None:
    groups = {group.key: group for group in site_groups(graph)}
    assert len(measured.interactions) == 3
    pair = max(measured.interactions, key=lambda each: each.share)
    assert all(each.share >= 0 for each in measured.interactions)

    def change(*keys: str) -> float:
        plan = QuantPlan.make(graph, MIN_MAX.name, MIN_MAX.spec, dict.fromkeys(keys, 3))
        with torch.no_grad():
            answer = MIN_MAX.quantize(graph, stats, plan, Calibration(())).run(PIXELS)
            return squared_change(answer, graph.run(PIXELS)).mean().item()

    one, other = groups[pair.first].free, groups[pair.second].free
    alone = change(*one), change(*other)
    together = (change(*one, *other) - sum(alone)) / (alone[0] * alone[1]) ** 0.5
    assert pair.share == pytest.approx(together, rel=1e-3)
    chosen = bits_within(graph, measured, MeanBits(5, 5))
    without = bits_within(graph, replace(measured, interactions=()), MeanBits(5, 5))
    options = chosen.allocation.chosen
    more = sum(
        each.share * (options[each.first].loss * options[each.second].loss) ** 0.5 for each in measured.interactions
    )
    own = sum(option.loss for option in options.values())
    assert chosen.allocation.loss == pytest.approx(own + more)
    assert own >= without.allocation.loss * (1 - 1e-9)


def hand_made(side: Mapping[str, Side]) -> Measured:
    return Measured(ModelHash("", ""), "minmax", 1, KEPT, side, {})


def test_losses_by_hand() -> None:
    errors = {2: 0.2, 3: 0.05, 6: 0.001, 8: 0.002}
    changes = {2: 0.4, 3: 0.1}
    sides = {
        "blocks.0.fc/linear/weight": Side(errors, changes, {2: 7.0, 3: 8.0}, lrp=1.0, gradient=0.0),
        "blocks.1.fc/linear/weight": Side(errors, changes, {2: 7.0, 3: 8.0}, lrp=3.0, gradient=0.0),
        "head/linear/weight": Side(errors, changes, {2: 1.0, 3: 0.5}, lrp=100.0, gradient=5.0),
        "kept/linear/weight": Side({}),
    }
    del sides["kept/linear/weight"]
    first, second, head = sides

    def losses(importance: Importance) -> dict[str, dict[int, float]]:
        return side_losses(hand_made(sides), importance)[0]

    # 6 bits have the error that 8 are found to have; S_6 = 0.1 * 0.002 / 0.05.
    assert losses(Importance.UNIFORM)[first] == {2: 0.2, 3: 0.05, 6: 0.002, 8: 0.002}
    assert losses(Importance.SENSITIVITY)[first] == pytest.approx({2: 0.4, 3: 0.1, 6: 0.004, 8: 0.004})
    assert losses(Importance.LRP)[first] == pytest.approx({2: 0.1, 3: 0.025, 6: 0.001, 8: 0.001})
    assert losses(Importance.LRP_TIMES_SENSITIVITY)[second] == pytest.approx({2: 0.6, 3: 0.15, 6: 0.006, 8: 0.006})
    # Alone in its kind; and a kind without any relevance says nothing.
    assert losses(Importance.LRP)[head] == losses(Importance.UNIFORM)[head]
    assert losses(Importance.GRADIENT_TIMES_ACTIVATION)[first] == losses(Importance.UNIFORM)[first]
    assert losses(Importance.FISHER)[first] == {2: 8.0, 3: 8.0}
    random = [side_losses(hand_made(sides), Importance.RANDOM, seed)[0][first][2] for seed in (0, 0, 1)]
    assert random[0] == random[1] != random[2]


def test_an_importance_that_was_not_measured() -> None:
    bare = hand_made({"a/linear/weight": Side({2: 0.1})})
    for importance in set(Importance) - {Importance.UNIFORM, Importance.RANDOM}:
        with pytest.raises(InputError, match=rf"{importance.value} was not measured at 'a/linear/weight'"):
            side_losses(bare, importance)


def mean_bits(graph: Graph, bits: Mapping[str, int], weight: bool) -> float:
    """Over elements, a tensor counted once."""
    tensors = {site.tensor: (site.elements, bits[site.key]) for site in graph.sites if site.is_weight is weight}
    return sum(count * width for count, width in tensors.values()) / sum(count for count, _ in tensors.values())


@pytest.mark.parametrize("importance", list(Importance))
def test_mean_bits_are_met(graph: Graph, measured: Measured, importance: Importance) -> None:
    chosen = bits_within(graph, measured, MeanBits(4.5, 5), importance)
    assert mean_bits(graph, chosen.bits, weight=True) <= 4.5
    assert mean_bits(graph, chosen.bits, weight=False) <= 5
    assert {chosen.bits[key] for key in ("stem/conv/input", "head/linear/input", HEAD)} == {8}
    readers = [chosen.bits[f"{name}/linear/input"] for name in ("query", "key", "value")]
    assert len(set(readers)) == 1
    assert chosen.allocation.gap == 0


def paid(graph: Graph, chosen: ChosenBits) -> int:
    """Bytes of codes, of scales per output channel, and of what stays float."""
    stored = sum(-(-site.elements * chosen.bits[site.key] // 8) for site in graph.sites if site.is_weight)
    outputs = sum(site.shape[0] for site in graph.sites if site.is_weight)
    activations = sum(not site.is_weight for site in graph.sites)
    of_weights = sum(site.elements for site in graph.sites if site.is_weight)
    return stored + 4 * outputs + 5 * activations + float_bytes(graph) - 4 * of_weights


def test_bytes_count_all_that_is_stored(graph: Graph, measured: Measured) -> None:
    of_float = float_bytes(graph)
    budgets: list[Budget] = [Bytes(round(0.6 * of_float)), FloatShare(0.5, of_float)]
    for budget, most in zip(budgets, (round(0.6 * of_float), 0.5 * of_float), strict=True):
        chosen = bits_within(graph, measured, budget)
        # Weights that choose together are rounded up to bytes together.
        assert paid(graph, chosen) - 4 <= chosen.allocation.totals.weight_bytes <= paid(graph, chosen)
        assert paid(graph, chosen) - 4 <= most
        assert {chosen.bits[site.key] for site in graph.sites if not site.is_weight} == {8}
    few = bits_within(graph, measured, Bytes(of_float), activation_bits=4)
    assert {few.bits[key] for key in (WIDEN.replace("weight", "input"), "/matmul/value")} == {4}
    assert {few.bits[site.key] for site in graph.sites if site.is_weight} == {8}
    with pytest.raises(InputError, match="is below what any choice of bits needs; the nearest that can be met is"):
        bits_within(graph, measured, FloatShare(0.05, of_float))


def test_bit_operations_limit_both(graph: Graph, measured: Measured) -> None:
    macs = sum(group.macs for group in site_groups(graph))
    chosen = bits_within(graph, measured, Bops(macs * 25))
    bits = chosen.bits
    spent = sum(each.macs * bits[each.left] * bits[each.right] for each in graph.found.products)
    assert spent == chosen.allocation.totals.bops <= macs * 25
    assert spent > macs * 20


def test_milliseconds_are_taken_where_measured(graph: Graph, measured: Measured) -> None:
    times = {group.key: {(w, 8): w / 8 for w in (2, 3, 4, 6, 8)} for group in site_groups(graph)}
    count = len(times)
    chosen = bits_within(graph, measured, Milliseconds(count * 0.8), milliseconds=times)
    assert chosen.allocation.totals.milliseconds is not None
    assert chosen.allocation.totals.milliseconds <= count * 0.8
    with pytest.raises(InputError, match="has no measured milliseconds"):
        bits_within(graph, measured, Milliseconds(3))


def test_a_curve_loses_less_with_more(graph: Graph, measured: Measured) -> None:
    budgets = [MeanBits(bits, bits) for bits in (4.5, 5, 6, 8)]
    curve = [bits_within(graph, measured, each) for each in budgets]
    losses = [each.allocation.loss for each in curve]
    assert losses == sorted(losses, reverse=True)
    assert set(curve[-1].bits.values()) == {8}
    assert FLOATS not in curve[0].members
    assert curve[0].groups[-1].key == FLOATS


def test_pairs_of_bits_can_be_given(graph: Graph, measured: Measured) -> None:
    chosen = bits_within(graph, measured, MeanBits(6, 6), candidates=[(4, 4), (6, 6)])
    free = [group for group in site_groups(graph) if group.free == group.sites]
    assert {chosen.bits[key] for group in free for key in group.sites} <= {4, 6}
    assert all(len({chosen.bits[key] for key in group.sites}) == 1 for group in free)
    with pytest.raises(InputError, match=r"candidates: 5 bits were not measured at .*, but 2, 3, 4, 6, 8;"):
        bits_within(graph, measured, MeanBits(5, 5), candidates=[(5, 5)])
    with pytest.raises(InputError, match="candidates: wanted at least one pair of bits, got none"):
        bits_within(graph, measured, MeanBits(5, 5), candidates=[])


def test_measurements_are_saved(graph: Graph, measured: Measured, tmp_path: Path) -> None:
    path = tmp_path / "sensitivity.json"
    measured.write(path)
    assert Measured.read(path, graph) == measured
    other = captured(TwoHeads())
    with pytest.raises(InputError, match=r"sensitivity.json: wanted a file made for this model"):
        Measured.read(path, other)
    data = json.loads(path.read_text())
    del data["weights"][QUERY]
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match=rf"wanted the groups of this model, mend '{QUERY}'"):
        Measured.read(path, graph)
    data["weights"][HEAD]["errors"] = {"2": float("nan")}
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match="is damaged \\(a loss is not finite\\); measure it again"):
        Measured.read(path, graph)
    path.write_text(json.dumps(data | {"format_version": 99}))
    with pytest.raises(InputError, match="format version 99 is newer"):
        Measured.read(path, graph)


class Branches(nn.Module):
    """A branch that the answer is made of, and one that hardly counts."""

    def __init__(self) -> None:
        super().__init__()
        self.strong, self.weak = (nn.Sequential(nn.Linear(48, 6), nn.ReLU(), nn.Linear(6, 6)) for _ in range(2))
        self.head = nn.Linear(6, CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:
        x = pixels.flatten(1)
        return self.head((self.strong(x) + 0.01 * self.weak(x)).relu())


@pytest.fixture(scope="module")
def branches() -> Graph:
    torch.manual_seed(0)
    return captured(Branches(), side_px=4)


@pytest.mark.parametrize("importance", [Importance.SENSITIVITY, Importance.FISHER])
def test_what_counts_gets_the_bits(branches: Graph, importance: Importance) -> None:
    pixels = images(16, side_px=4)
    said: list[str] = []
    calibration = Calibration([pixels[:12], pixels[12:]], say=said.append)
    stats = observe(branches, calibration.batches)
    budget = MeanBits(5, 8)
    chosen = choose_bits(branches, stats, REPQ_VIT, calibration, budget, importance)
    strong, weak = ([chosen.bits[f"{name}.{layer}/linear/weight"] for layer in (0, 2)] for name in ("strong", "weak"))
    assert sum(strong) > sum(weak) + 2
    assert said
    plan = QuantPlan.make(branches, REPQ_VIT.name, REPQ_VIT.spec, chosen.bits)
    swapped = {
        key: chosen.bits[key.replace("strong", "*").replace("weak", "strong").replace("*", "weak")]
        for key in chosen.bits
    }
    worse = QuantPlan.make(branches, REPQ_VIT.name, REPQ_VIT.spec, swapped)
    with torch.no_grad():
        changes = [
            squared_change(REPQ_VIT.quantize(branches, stats, each, calibration).run(pixels), branches.run(pixels))
            for each in (plan, worse)
        ]
    assert changes[0].mean() < changes[1].mean() / 2


def test_a_graph_of_two_images_and_starts_by_default() -> None:
    torch.manual_seed(0)
    one_size: frozenset[Axis] = frozenset()
    graph = capture(Branches(), images(2, side_px=4), free=one_size)
    stats = observe(graph, [images(8, side_px=4)])
    wanted = set(Importance)
    found = measure(graph, stats, MIN_MAX, Calibration([images(5, side_px=4)]), wanted, (3,), images=5)
    assert found.images == 4
    assert bits_within(graph, found, MeanBits(8, 8), candidates=[(3, 3)], importance=Importance.LRP).bits
    with pytest.raises(InputError, match="images: wanted at least 2 to measure losses with, got none"):
        measure(graph, stats, MIN_MAX, Calibration(()))


def test_known_relevance_is_used(branches: Graph) -> None:
    stats = observe(branches, [images(8, side_px=4)])
    known = {site.key: Score(float(number), 0, 0) for number, site in enumerate(branches.sites)}
    found = measure(branches, stats, MIN_MAX, Calibration([images(2, side_px=4)]), {Importance.LRP}, (4,), 1,
                    relevance=known)  # fmt: skip
    for group in site_groups(branches):
        assert found.weights[group.key].lrp == sum(known[key].magnitude for key in group.weights)


def test_models_that_need_a_start(graph: Graph, stats: Stats) -> None:
    calibration = Calibration([PIXELS])
    for importance in (Importance.FISHER, Importance.LRP, Importance.GRADIENT_TIMES_ACTIVATION):
        with pytest.raises(InputError, match="start: wanted one for a model that returns more than the logits"):
            measure(graph, stats, MIN_MAX, calibration, {importance}, (4,))
    with pytest.raises(InputError, match="widths: wanted at least one number of bits to measure"):
        measure(graph, stats, MIN_MAX, calibration, widths=())


def test_where_nothing_can_be_chosen() -> None:
    graph = captured(nn.Sequential(nn.Flatten(), nn.Linear(48, CLASSES)), side_px=4)
    stats = observe(graph, [images(8, side_px=4)])
    calibration = Calibration([images(8, side_px=4)])
    chosen = choose_bits(graph, stats, MIN_MAX, calibration, MeanBits(8, 8))
    assert set(chosen.bits.values()) == {8}
    with pytest.raises(InputError, match="is below what any choice of bits needs"):
        choose_bits(graph, stats, MIN_MAX, calibration, MeanBits(4, 4))
