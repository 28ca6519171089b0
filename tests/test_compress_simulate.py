"""Simulation: a layer against torch's own fake quantization, saved integers, gradients, and wrong quantizers."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from compress_models import CLASSES, images, small_graph
from denselab.compress.graph import Axis, Graph, capture
from denselab.compress.methods.min_max import MIN_MAX
from denselab.compress.methods.repq_vit import REPQ_VIT
from denselab.compress.observing import Stats, observe
from denselab.compress.plan import Granularity, Grid, QuantPlan, QuantSpec, equal_bits
from denselab.compress.quantizers import AdaLog, Log2, Quantizer, Sulq, TanQ, Ternary, Uniform, ZeroCode
from denselab.compress.simulate import QuantizedGraph, grid_of, read_quantizers
from denselab.compress.sites import ModelHash
from denselab.errors import InputError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def graph() -> Graph:
    return small_graph()[1]


@pytest.fixture(scope="module")
def stats(graph: Graph) -> Stats:
    return observe(graph, [images(16)])


def quantized(
    graph: Graph, stats: Stats, weights: int = 8, activations: int = 8, method: Any = MIN_MAX
) -> QuantizedGraph:
    plan = QuantPlan.make(graph, method.name, method.spec, equal_bits(graph, weights, activations))
    return method.quantize(graph, stats, plan, ())


@pytest.fixture(scope="module")
def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(12, 6)


@pytest.fixture(scope="module")
def layer_graph(layer: nn.Linear) -> Graph:
    return capture(nn.Sequential(nn.Flatten(), layer).eval(), torch.rand(2, 3, 2, 2), free=frozenset({Axis.BATCH}))


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a_layer_is_what_torch_simulates(layer: nn.Linear, layer_graph: Graph, bits: int) -> None:
    graph = layer_graph
    pixels = images(16, side_px=2) * 3 - 1
    plan = QuantPlan.make(graph, MIN_MAX.name, MIN_MAX.spec, equal_bits(graph, bits, bits, kept=()), kept=())
    got = MIN_MAX.quantize(graph, observe(graph, [pixels]), plan, ()).run(pixels)
    # By hand, as Jacob et al. say: affine inputs, symmetric weights per output channel.
    x, levels, half = pixels.flatten(1), 2**bits - 1, 2 ** (bits - 1)
    scale = (x.max() - x.min()).item() / levels
    read = torch.fake_quantize_per_tensor_affine(x, scale, round(-x.min().item() / scale), 0, levels)
    scales = layer.weight.detach().abs().amax(1) / (half - 1)
    zeros = torch.zeros(6, dtype=torch.int32)
    weight = torch.fake_quantize_per_channel_affine(layer.weight.detach(), scales, zeros, 0, -half, half - 1)
    torch.testing.assert_close(got, F.linear(read, weight, layer.bias), rtol=1e-5, atol=1e-5)


def test_only_planned_sites_are_quantized(graph: Graph, stats: Stats) -> None:
    pixels, wanted = images(3), graph.run(images(3))
    empty = QuantizedGraph(graph, QuantPlan(graph.model, "none", frozenset(), {}), {})
    assert torch.equal(empty.run(pixels)[0], wanted[0])
    every = quantized(graph, stats)
    key = "head/linear/weight"
    one = QuantizedGraph(graph, replace(every.plan, specs={key: every.plan.specs[key]}), {key: every.quantizers[key]})
    got = one.run(pixels)
    assert torch.equal(got[1], wanted[1])
    assert not torch.equal(got[0], wanted[0])


def test_runs_as_a_module_and_at_any_batch(graph: Graph, stats: Stats) -> None:
    simulated = quantized(graph, stats)
    both = simulated.run(images(4))[0]
    assert both.shape == (4, CLASSES)
    torch.testing.assert_close(simulated.as_module()(images(4)[:1])[0], both[:1])
    with pytest.raises(InputError, match=r"wanted shapes like 2x3x16x16"):
        simulated.run(images(2, side_px=24))


def test_gradients_reach_weights_and_image(graph: Graph, stats: Stats) -> None:
    simulated, pixels = quantized(graph, stats), images(2).requires_grad_()
    torch.testing.assert_close(
        graph.run(pixels, hooks=simulated.trainable_hooks())[0], simulated.run(pixels)[0], rtol=1e-4, atol=1e-4
    )
    weight = dict(graph.module.named_parameters())["head.weight"]
    loss = graph.run(pixels, hooks=simulated.trainable_hooks())[0].square().sum()
    assert all(each.abs().sum() > 0 for each in torch.autograd.grad(loss, [pixels, weight]))


def test_nan_names_the_site(graph: Graph, stats: Stats) -> None:
    pixels = images(2)
    pixels[0, 0, 0, 0] = torch.nan
    with pytest.raises(InputError, match=r"stem/conv/input: x: 1 of 1536 numbers are NaN"):
        quantized(graph, stats).run(pixels)


@pytest.mark.parametrize("method", [MIN_MAX, REPQ_VIT], ids=lambda each: each.name)
def test_saved_integers_are_those_that_run(tmp_path: Path, graph: Graph, stats: Stats, method: Any) -> None:
    path = tmp_path / "quantizers.safetensors"
    simulated = quantized(graph, stats, 4, 6, method)
    simulated.write(path)
    read = read_quantizers(path, graph.model)
    assert read.keys() == simulated.quantizers.keys()
    pixels = images(2)
    for wanted, got in zip(
        simulated.run(pixels), QuantizedGraph(simulated.graph, simulated.plan, read).run(pixels), strict=True
    ):
        assert torch.equal(wanted, got)
    stored = load_file(path)["widen/linear/weight:codes"]
    assert stored.dtype == (torch.int8 if method is MIN_MAX else torch.uint8)
    assert int(stored.max()) - int(stored.min()) < 16
    seen: list[Tensor] = []
    hooks = simulated.trainable_hooks()
    hooks["widen/linear/weight"] = lambda x: seen.append(simulated.quantizers["widen/linear/weight"].codes(x)) or x
    simulated.graph.run(pixels, hooks=hooks)
    assert torch.equal(seen[0], stored.int())


def test_every_kind_of_quantizer_is_read_back(tmp_path: Path, graph: Graph) -> None:
    one, half, code = torch.tensor(1.0), torch.tensor(0.5), torch.tensor(20)
    kinds: list[Quantizer] = [
        Uniform(one, torch.tensor(3, dtype=torch.int32), 4),
        Log2(one, 4, ZeroCode.EXTRA),
        AdaLog(one, code, 3, half),
        Sulq(half, -one, one, 4),
        TanQ(one, half, 5),
    ]
    keys = [site.key for site in graph.sites if not site.is_weight][: len(kinds)]
    quantizers = {**dict(zip(keys, kinds, strict=True)), "head/linear/weight": Ternary(one, half)}
    specs = {
        key: QuantSpec(each.bits, grid_of(each)) for key, each in quantizers.items() if not isinstance(each, Ternary)
    }
    specs["head/linear/weight"] = QuantSpec(2, Grid.TERNARY, Granularity.PER_TENSOR, symmetric=True)
    path = tmp_path / "quantizers.safetensors"
    QuantizedGraph(graph, QuantPlan(graph.model, "by hand", frozenset(), specs), quantizers).write(path)
    for key, read in read_quantizers(path, graph.model).items():
        assert type(read) is type(quantizers[key])
        for each in fields(read):
            wanted, got = getattr(quantizers[key], each.name), getattr(read, each.name)
            assert torch.equal(wanted, got) if isinstance(wanted, Tensor) else wanted == got
    with pytest.raises(InputError, match=r"quantizers.safetensors: the model's weights changed"):
        read_quantizers(path, ModelHash(graph.model.architecture, "trained"))
    with pytest.raises(InputError, match=r"quantizers.safetensors: wanted a file made for this model"):
        read_quantizers(path, ModelHash("another", "trained"))


def test_quantizers_must_be_the_planned_ones(graph: Graph, stats: Stats) -> None:
    simulated, key = quantized(graph, stats), "head/linear/weight"
    others = {**simulated.quantizers, key: Ternary(torch.tensor(1.0), torch.tensor(0.5))}
    with pytest.raises(
        InputError, match=r"head/linear/weight: wanted a quantizer of 8 bits on the grid uniform, .* tern"
    ):
        QuantizedGraph(graph, simulated.plan, others)
    with pytest.raises(
        InputError, match=r"quantizers: wanted one for every site of the plan, and no other; mend 'head"
    ):
        QuantizedGraph(graph, simulated.plan, {name: each for name, each in others.items() if name != key})
