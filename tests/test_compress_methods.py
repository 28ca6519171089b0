"""Folding norms is exact; methods keep what a trained model says at 8 bits, and lose it slowly below."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from denselab import _vision as _vision

# isort: split
import timm

from compress_models import WIDTH, SmallNetwork, captured, images, small_graph
from denselab.compress.fold_layer_norms import fold_layer_norms, foldable_norms
from denselab.compress.fold_norms import fold_norms
from denselab.compress.graph import Graph
from denselab.compress.methods.method import Calibration, Method
from denselab.compress.methods.min_max import MIN_MAX
from denselab.compress.methods.repq_vit import REPQ_VIT, norm_fold
from denselab.compress.observing import Stats, observe
from denselab.compress.plan import Granularity, Grid, QuantPlan, QuantSpec, equal_bits
from denselab.compress.quantizers import ChannelFold, Uniform
from denselab.compress.simulate import QuantizedGraph
from denselab.compress.sites import ModelHash, Source
from denselab.errors import InputError
from digits import reader

pytestmark = pytest.mark.usefixtures("one_thread")

METHODS = (MIN_MAX, REPQ_VIT)


def quantize(graph: Graph, stats: Stats, method: Method, weights: int, activations: int) -> QuantizedGraph:
    plan = QuantPlan.make(graph, method.name, method.spec, equal_bits(graph, weights, activations))
    return method.quantize(graph, stats, plan, Calibration(()))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def assert_same(graph: Graph, other: Graph, pixels: Tensor) -> None:
    for wanted, got in zip(graph.run(pixels), other.run(pixels), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def batch_norms(graph: Graph) -> int:
    return sum("batch_norm" in str(node.target) for node in graph.module.graph.nodes if node.op == "call_function")


def with_statistics(model: nn.Module) -> nn.Module:
    """Batch norms as after training."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator))
            module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
    return model.eval()


class OddNorms(nn.Module):
    """Batch norms after a transposed convolution, a linear layer seen as rows, a shared layer, and a pooled map."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.up_norm = nn.ConvTranspose2d(3, 4, 2, stride=2), nn.BatchNorm2d(4)
        self.up_groups, self.up_groups_norm = nn.ConvTranspose2d(4, 4, 2, groups=2), nn.BatchNorm2d(4)
        self.shared, self.norms = nn.Conv2d(4, 4, 1), nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))
        self.pool_norm = nn.BatchNorm2d(4, affine=False)
        self.linear, self.rows_norm = nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.up_norm(self.up(pixels))
        x = self.up_groups_norm(self.up_groups(x))
        x = self.norms[0](self.shared(x)) + self.norms[1](self.shared(x.relu()))
        x = self.pool_norm(F.avg_pool2d(x, 2))
        x = self.linear(x.flatten(2).transpose(1, 2))
        return self.rows_norm(x.flatten(0, 1)).reshape_as(x).mean(1)


def test_batch_norms_are_folded_where_that_is_exact() -> None:
    torch.manual_seed(0)
    model = with_statistics(OddNorms().double())
    before = state(model)
    graph = captured(model, torch.float64, side_px=8)
    folded = fold_norms(graph)
    assert (batch_norms(graph), batch_norms(folded)) == (6, 4)
    assert set(state(folded.module)) >= {"up.weight", "up.bias", "linear.bias", "pool_norm.running_mean"}
    assert not {"up_norm.weight", "rows_norm.running_var"} & set(state(folded.module))
    pixels = images(3, side_px=8, dtype=torch.float64)
    torch.testing.assert_close(folded.run(pixels), graph.run(pixels), rtol=1e-9, atol=1e-9)
    assert_unchanged(model, before)
    assert [site.key for site in folded.sites] == [site.key for site in graph.sites]


def test_sites_of_a_folded_residual_network() -> None:
    torch.manual_seed(0)
    model = with_statistics(timm.create_model("resnet10t", num_classes=5, channels=(8, 8, 16, 16)).double())
    graph = captured(model, torch.float64, side_px=32)
    folded = fold_norms(graph)
    assert batch_norms(graph) > 0
    assert batch_norms(folded) == 0
    assert all(site.made_by is not Source.NORM for site in folded.sites)
    assert folded.model.architecture != graph.model.architecture
    pixels = images(2, side_px=32, dtype=torch.float64)
    torch.testing.assert_close(folded.run(pixels), graph.run(pixels), rtol=1e-9, atol=1e-9)
    stats = observe(folded, [images(16, side_px=32, dtype=torch.float64)])
    pixels = images(16, seed=1, side_px=32, dtype=torch.float64)
    for method in METHODS:
        losses = [error(folded, quantize(folded, stats, method, bits, bits), pixels) for bits in (8, 6, 4)]
        assert losses[0] < 0.03, method.name
        assert losses == sorted(losses), method.name


def error(graph: Graph, quantized: QuantizedGraph, pixels: Tensor) -> float:
    """Relative error of the first output."""
    wanted, got = (first(each(pixels)) for each in (graph.run, quantized.run))
    return ((got - wanted).norm() / wanted.norm()).item()


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@pytest.fixture(scope="module")
def exact_model() -> SmallNetwork:
    return small_graph(torch.float64)[0]


@pytest.fixture(scope="module")
def exact_graph() -> Graph:
    return small_graph(torch.float64)[1]


def test_layer_norms_with_several_readers_and_a_tap(exact_model: SmallNetwork, exact_graph: Graph) -> None:
    before = state(exact_model)
    norms = foldable_norms(exact_graph)
    readers = [[reader.site.module for reader in norm.readers] for norm in norms]
    assert [sorted(each) for each in readers] == [["gate", "key", "query", "value"], ["widen"]]
    assert [len(norm.others) for norm in norms] == [0, 1]
    stats = observe(exact_graph, [images(8, dtype=torch.float64)])
    quantized = quantize(exact_graph, stats, REPQ_VIT, 4, 4)
    assert quantized.graph.model == exact_graph.model
    assert_same(exact_graph, quantized.graph, images(3, seed=1, dtype=torch.float64))
    assert_unchanged(exact_model, before)
    folded = dict(quantized.graph.module.named_parameters())
    assert not torch.equal(folded["norm1.weight"], exact_model.norm1.weight)
    assert {"gate.bias"} <= folded.keys()


def test_a_fold_that_changes_the_answer_is_refused(exact_graph: Graph) -> None:
    one = torch.ones(WIDTH)
    fold = ChannelFold(one, 1e15 * one, one[0], torch.tensor(0))  # what is added is lost when it is taken away again
    with pytest.raises(InputError, match=r"folding its parameters changes its answer by .*weights of extreme size"):
        fold_layer_norms(exact_graph, [(foldable_norms(exact_graph)[0], fold)])


def test_folded_inputs_have_the_codes_of_their_channels(exact_graph: Graph) -> None:
    stats = observe(exact_graph, [images(8, dtype=torch.float64)])
    plan = QuantPlan.make(exact_graph, REPQ_VIT.name, REPQ_VIT.spec, equal_bits(exact_graph, 4, 4))
    norm = foldable_norms(exact_graph)[0]
    found = norm_fold(norm, stats, plan)
    assert found is not None
    key = "query/linear/input"
    quantized = REPQ_VIT.quantize(exact_graph, stats, plan, Calibration(()))
    seen: dict[str, Tensor] = {}
    pixels = images(8, dtype=torch.float64)
    exact_graph.run(pixels, hooks={key: lambda x: seen.update(before=x) or x})
    quantized.graph.run(pixels, hooks={key: lambda x: seen.update(after=x) or x})
    torch.testing.assert_close(seen["after"], found[1].apply(seen["before"]))
    quantizer = quantized.quantizers[key]
    assert isinstance(quantizer, Uniform)
    assert quantizer.scale.shape == ()
    # Every channel has its own range, so that all get most of the 16 codes.
    used = quantizer.codes(seen["after"]).flatten(0, 1)
    assert (used.amin(0) <= 2).all()
    assert (used.amax(0) >= 13).all()
    plain = quantize(exact_graph, stats, MIN_MAX, 4, 4).quantizers[key].codes(seen["before"]).flatten(0, 1)
    assert (plain.amax(0) - plain.amin(0)).min() < 8


def test_readers_of_one_norm_may_have_other_bits(exact_graph: Graph) -> None:
    stats = observe(exact_graph, [images(8, dtype=torch.float64)])
    bits = equal_bits(exact_graph, 8, 8) | {"key/linear/input": 4}
    plan = QuantPlan.make(exact_graph, REPQ_VIT.name, REPQ_VIT.spec, bits)
    plan = replace(
        plan, specs={**plan.specs, "value/linear/input": QuantSpec(8, Grid.UNIFORM, Granularity.PER_CHANNEL)}
    )
    quantized = REPQ_VIT.quantize(exact_graph, stats, plan, Calibration(()))
    query, key, value = (quantized.quantizers[f"{name}/linear/input"] for name in ("query", "key", "value"))
    assert isinstance(query, Uniform)
    assert isinstance(key, Uniform)
    assert isinstance(value, Uniform)
    assert 12 < key.scale / query.scale < 20  # 255 / 15 = 17 times coarser over about the same range
    assert value.scale.shape == (1, 1, WIDTH)
    assert error(exact_graph, quantized, images(4, dtype=torch.float64)) < 0.5


def test_statistics_of_another_model_are_refused(exact_graph: Graph) -> None:
    stats = observe(exact_graph, [images(8, dtype=torch.float64)])
    other = replace(stats, model=ModelHash("another", "values"))
    with pytest.raises(InputError, match="stats: wanted a file made for this model"):
        quantize(exact_graph, other, MIN_MAX, 8, 8)


def test_grids_that_a_method_cannot_fit(exact_graph: Graph) -> None:
    stats = observe(exact_graph, [images(8, dtype=torch.float64)])
    for method in METHODS:
        spec = QuantSpec(4, Grid.SULQ)
        plan = QuantPlan(exact_graph.model, method.name, frozenset(), {"widen/linear/input": spec})
        with pytest.raises(InputError, match=rf"widen/linear/input: grid: {method.name} cannot fit sulq"):
            method.quantize(exact_graph, stats, plan, Calibration(()))


def test_digits_are_still_read() -> None:
    digits = reader()
    graph = digits.graph
    assert digits.top1(graph.run) == digits.right > 0.85
    stats = observe(graph, digits.seen.split(32))
    answers = {(each.name, bits): quantize(graph, stats, each, bits, bits) for each in METHODS for bits in (8, 6, 4)}
    found = {key: digits.top1(each.run) for key, each in answers.items()}
    errors = {key: error(graph, each, digits.test) for key, each in answers.items()}
    for method in METHODS:
        losses = [errors[method.name, bits] for bits in (8, 6, 4)]
        assert losses == sorted(losses), method.name
        assert found[method.name, 8] >= digits.right - 0.01, method.name
        assert found[method.name, 8] > found[method.name, 4], method.name
    assert found[REPQ_VIT.name, 4] > found[MIN_MAX.name, 4]
    assert errors[REPQ_VIT.name, 4] < 0.5 * errors[MIN_MAX.name, 4]
