"""LRP-QViT and Mix-QViT: clipping by hand, its choice against brute force, and bits that follow relevance."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from compress_models import WIDTH, captured, images, small_graph, small_network
from denselab.compress.fold_layer_norms import FoldableNorm, foldable_norms
from denselab.compress.fold_norms import fold_norms
from denselab.compress.graph import Graph
from denselab.compress.methods.lrp_qvit import (
    CLIPS,
    LRP_QVIT,
    bits_by_relevance,
    clipped,
    least_error_clip,
)
from denselab.compress.methods.method import Calibration, Method
from denselab.compress.methods.mix_qvit import MIX_QVIT, mix_qvit_bits, shared_widths
from denselab.compress.methods.repq_vit import REPQ_VIT, as_calibrated, norm_fold, reparameterized
from denselab.compress.observing import Stats, observe
from denselab.compress.plan import KEPT, QuantPlan, QuantSpec, equal_bits
from denselab.compress.quantizers import Uniform, quantized
from denselab.compress.relevance.scores import Score
from denselab.compress.relevance.sensitivity import squared_change
from denselab.compress.relevance.start import logit
from denselab.compress.site_groups import site_groups
from denselab.errors import InputError

pytestmark = pytest.mark.usefixtures("one_thread")

PIXELS = images(8)
METHODS = (LRP_QVIT, MIX_QVIT)


@pytest.fixture(scope="module")
def graph() -> Graph:
    return fold_norms(small_graph()[1])


@pytest.fixture(scope="module")
def stats(graph: Graph) -> Stats:
    return observe(graph, [PIXELS])


def plan_of(graph: Graph, method: Method, bits: dict[str, int]) -> QuantPlan:
    return QuantPlan.make(graph, method.name, method.spec, bits)


def test_clipping_by_hand() -> None:
    # Three channels of 2 bits: ranges 0..3, -2..4 and 10..40; the last has ten times the step of the first.
    scale, zero_point = torch.tensor([[1.0, 2.0, 10.0]]), torch.tensor([[0, 1, -1]])
    per_channel = Uniform(scale, zero_point, 2)
    all_move = torch.ones(3, dtype=torch.bool)
    found = clipped(per_channel, 0.5, all_move)
    assert found.zero_point is not None
    assert found.scale.tolist() == [[1.0, 2.0, 2.0]]
    # The middle of 10..40 is 25; steps of 2 give 22..28.
    assert found.zero_point.tolist() == [[0, 1, -11]]
    low, high = found.bounds()
    assert (low[0, 2].item(), high[0, 2].item()) == (22, 28)
    same = clipped(per_channel, 1.0, all_move)
    assert torch.equal(same.scale, scale)
    assert same.zero_point is not None
    assert torch.equal(same.zero_point, zero_point)
    # A channel that never moves has no say.
    moving = torch.tensor([False, True, True])
    assert clipped(per_channel, 0.0, moving).scale.tolist() == [[1.0, 2.0, 2.0]]


def outlying() -> tuple[Graph, Stats]:
    """A network of which one channel of each norm is extreme."""
    model = small_network()
    with torch.no_grad():
        for norm in (model.norm1, model.norm2):
            norm.weight.fill_(1)
            norm.weight[3] = 40
    graph = fold_norms(captured(model))
    return graph, observe(graph, [PIXELS])


def test_the_clip_of_least_error_is_taken() -> None:
    graph, stats = outlying()
    plan = plan_of(graph, LRP_QVIT, equal_bits(graph, 3, 4))
    chosen = least_error_clip(graph, plan)

    def error(share: float | None) -> float:
        """Of what the reader computes, in a run of the whole network."""

        def clip(norm: FoldableNorm, rows: Tensor, moves: Tensor, per_channel: Uniform) -> Uniform:
            return chosen(norm, rows, moves, per_channel) if share is None else clipped(per_channel, share, moves)

        network = reparameterized(graph, stats, plan, clip)
        keys = ("widen/linear/input", "widen/linear/weight")
        seen: list[Tensor] = []
        with torch.no_grad():
            for hooks in ({}, {key: partial(quantized, network.quantizers[key]) for key in keys}):
                run = dict(hooks)
                run["narrow/linear/input"] = lambda x: seen.append(x) or x
                network.graph.run(PIXELS, hooks=run)
        return (seen[1] - seen[0]).norm().item()

    errors = [error(share) for share in CLIPS]
    assert min(errors) < 0.9 * errors[0]
    assert error(None) <= min(errors) * 1.1


def test_without_clips_it_is_repq_vit(graph: Graph, stats: Stats) -> None:
    plan = plan_of(graph, REPQ_VIT, equal_bits(graph, 8, 4))
    norm = foldable_norms(graph)[0]
    plain, same = norm_fold(norm, stats, plan), norm_fold(norm, stats, plan, as_calibrated)
    assert plain is not None
    assert same is not None
    assert torch.equal(plain[1].ratio, same[1].ratio)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_the_float_network_stays_what_it_is(graph: Graph, stats: Stats, method: Method) -> None:
    before = {name: value.clone() for name, value in graph.module.state_dict().items()}
    mixed = equal_bits(graph, 4, 4) | {"widen/linear/input": 8, "query/linear/weight": 2, "key/linear/input": 6}
    network = method.quantize(graph, stats, plan_of(graph, method, mixed), Calibration([PIXELS]))
    with torch.no_grad():
        for got, wanted in zip(network.graph.run(PIXELS), graph.run(PIXELS), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)
        losses = []
        for bits in (8, 6, 4):
            plan = plan_of(graph, method, equal_bits(graph, bits, bits))
            answer = method.quantize(graph, stats, plan, Calibration([PIXELS])).run(PIXELS)
            losses.append(squared_change(answer, graph.run(PIXELS)).mean().item())
    assert losses == sorted(losses)
    assert losses[0] < 5e-3
    for name, value in graph.module.state_dict().items():
        assert torch.equal(value, before[name])


def test_weights_that_the_plan_leaves_float(graph: Graph, stats: Stats) -> None:
    plan = QuantPlan(graph.model, LRP_QVIT.name, KEPT, {"widen/linear/input": QuantSpec(4)})
    network = LRP_QVIT.quantize(graph, stats, plan, Calibration([PIXELS]))
    assert list(network.quantizers) == ["widen/linear/input"]


def scores_of(graph: Graph, **by_module: float) -> dict[str, Score]:
    """1 for every site, but for those of some modules."""
    return {site.key: Score(by_module.get(site.module, 1.0), 0, 0) for site in graph.sites}


class Blocks(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Linear(48, WIDTH)
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.head = torch.nn.Linear(WIDTH, 5)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.stem(pixels.flatten(1))
        for block in self.blocks:
            x = block(x).relu()
        return self.head(x)


@pytest.fixture(scope="module")
def blocks() -> Graph:
    torch.manual_seed(0)
    return captured(Blocks(), side_px=4)


def test_bits_follow_relevance(blocks: Graph) -> None:
    # Relevance 1, 2, 3, 4 is 0.4, 0.8, 1.2, 1.6 of its mean; the stem is alone in its kind and counts as 1.
    scores = scores_of(blocks) | {
        f"blocks.{number}/linear/{side}": Score(number + 1.0, 0, 0)
        for number in range(4)
        for side in ("input", "weight")
    }
    bits = bits_by_relevance(blocks, scores, 6)
    found = [bits[f"blocks.{number}/linear/weight"] for number in range(4)]
    # 6 + (0.4 - 1) / sqrt(0.16) = 4.5 and so on; what is kept has 8 bits, so that the others must have fewer.
    assert found == sorted(found)
    assert found[3] > found[0]
    for weight in (True, False):
        sites = [site for site in blocks.sites if site.is_weight is weight]
        mean = sum(site.elements * bits[site.key] for site in sites) / sum(site.elements for site in sites)
        assert mean <= 6
    for group in site_groups(blocks):
        assert len({bits[key] for key in group.free}) <= 1
    assert bits["head/linear/weight"] == bits["stem/linear/input"] == 8
    flat = bits_by_relevance(blocks, scores, 8, spread=0)
    assert set(flat.values()) == {8}


def test_bits_that_cannot_be_met(blocks: Graph) -> None:
    scores = scores_of(blocks)
    with pytest.raises(InputError, match="mean_bits: wanted at least what 2 bits need with what is kept at 8, got 2"):
        bits_by_relevance(blocks, scores, 2)
    del scores["head/linear/weight"]
    with pytest.raises(InputError, match="scores: wanted one for every site, got none for 'head/linear/weight'"):
        bits_by_relevance(blocks, scores, 4)


def test_bits_of_mix_qvit(graph: Graph, stats: Stats) -> None:
    chosen = mix_qvit_bits(graph, stats, Calibration([PIXELS]), 5, start=lambda output: logit(output[0]), images=4)
    for group in site_groups(graph):
        assert len({chosen.bits[key] for key in group.free}) <= 1
        assert all(3 <= chosen.bits[key] <= 7 for key in group.free)
    assert chosen.allocation.totals.mean_weight_bits <= 5
    assert chosen.allocation.totals.mean_activation_bits <= 5
    assert [shared_widths(mean) for mean in (2, 3.5, 8)] == [[2, 3, 4], [2, 3, 4, 5, 6], [6, 7, 8]]
    network = MIX_QVIT.quantize(graph, stats, plan_of(graph, MIX_QVIT, chosen.bits), Calibration([PIXELS]))
    assert replace(network.plan, method="") == replace(plan_of(graph, MIX_QVIT, chosen.bits), method="")
