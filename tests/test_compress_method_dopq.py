"""DopQ-ViT: TanQ against brute force, norms at the median scale, and that this leaves the answer what it was."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from compress_models import images, small_graph
from denselab.compress.fold_layer_norms import foldable_norms
from denselab.compress.graph import Graph
from denselab.compress.methods.dopq_vit import ANGLES, DOPQ_VIT, fit_tanq
from denselab.compress.methods.method import Calibration, Method, Seen
from denselab.compress.methods.repq_vit import REPQ_VIT, norm_fold
from denselab.compress.observing import observe
from denselab.compress.plan import Grid, QuantPlan, QuantSpec, equal_bits
from denselab.compress.quantizers import TanQ, Uniform, quantized
from denselab.compress.simulate import QuantizedGraph
from denselab.errors import InputError

pytestmark = pytest.mark.usefixtures("one_thread")

ATTENTION = "/matmul/attention"
PIXELS = images(8, dtype=torch.float64)


def plan_of(graph: Graph, method: Method, bits: int) -> QuantPlan:
    return QuantPlan.make(graph, method.name, method.spec, equal_bits(graph, bits, bits))


def quantize(graph: Graph, method: Method, plan: QuantPlan) -> QuantizedGraph:
    return method.quantize(graph, observe(graph, [PIXELS]), plan, Calibration(()))


def seen(values: Tensor) -> Seen:
    return Seen(values, values.amin(), values.amax(), ())


def test_plan_and_refusal() -> None:
    graph = small_graph(torch.float64)[1]
    plan, of_repq = plan_of(graph, DOPQ_VIT, 4), plan_of(graph, REPQ_VIT, 4)
    differ = {key: spec for key, spec in plan.specs.items() if spec != of_repq.specs[key]}
    assert differ == {ATTENTION: QuantSpec(4, Grid.TANQ)}
    wrong = replace(plan, specs={"widen/linear/input": QuantSpec(4, Grid.SULQ)})
    with pytest.raises(InputError, match="widen/linear/input: grid: dopq-vit cannot fit sulq"):
        quantize(graph, DOPQ_VIT, wrong)


def test_tanq_of_least_error() -> None:
    values = torch.rand(4096, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 8
    found = fit_tanq(seen(values), 4)
    fine = [
        (quantized(TanQ(scale, torch.tensor(angle), 4), values) - values).square().sum().item()
        for scale in values.quantile(torch.tensor([0.99, 0.999, 1.0], dtype=torch.float64))
        for angle in torch.linspace(0.05, 1.5, 60).tolist()
    ]
    assert (quantized(found, values) - values).square().sum().item() < 1.1 * min(fine)
    assert found.theta.item() in [pytest.approx(angle) for angle in ANGLES]


def test_tanq_by_hand_and_of_a_map_without_attention() -> None:
    # At 2 bits codes stand for 1/2 -+ atan(T / 3) / (2 theta) beside 0 and 1; T = tan(3/8 pi) = 1 + sqrt 2.
    inner = math.atan((1 + 2**0.5) / 3) / (2 * 3 / 8 * math.pi)
    values = torch.tensor([0, 0.5 - inner, 0.5 + inner, 1], dtype=torch.float64)
    found = fit_tanq(seen(values), 2)
    assert found.theta.item() == pytest.approx(3 / 8 * math.pi)
    torch.testing.assert_close(quantized(found, values), values, rtol=0, atol=1e-6)
    nothing = torch.zeros(16)
    assert torch.equal(quantized(fit_tanq(seen(nothing), 2), nothing), nothing)


def test_norms_are_brought_to_the_median_and_the_answer_stays() -> None:
    graph = small_graph(torch.float64)[1]
    plan = plan_of(graph, DOPQ_VIT, 4)
    uniform = replace(plan, specs={key: each for key, each in plan.specs.items() if key != ATTENTION})
    ours, repq = (quantize(graph, method, uniform) for method in (DOPQ_VIT, REPQ_VIT))
    fold = norm_fold(foldable_norms(graph)[0], observe(graph, [PIXELS]), plan)
    assert fold is not None
    of_channels = fold[1].ratio * fold[1].scale
    for key in ("query", "key", "value", "gate"):
        scale, mean = (
            each.quantizers[next(iter(k for k in uniform.specs if k.startswith(f"{key}/") and "input" in k))]
            for each in (ours, repq)
        )
        assert isinstance(scale, Uniform)
        assert isinstance(mean, Uniform)
        assert scale.scale.item() == pytest.approx(of_channels.sort().values[(len(of_channels) - 1) // 2].item())
        assert mean.scale.item() == pytest.approx(of_channels.mean().item())
    pixels = images(4, seed=1, dtype=torch.float64)
    with torch.no_grad():
        for wanted, got, exact in zip(repq.run(pixels), ours.run(pixels), graph.run(pixels), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
            assert (got - exact).norm() > 0.05 * exact.norm()
        for wanted, got in zip(graph.run(pixels), ours.graph.run(pixels), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def test_more_bits_lose_less() -> None:
    graph = small_graph(torch.float64)[1]
    pixels = images(16, seed=1, dtype=torch.float64)
    losses: list[float] = []
    for bits in (8, 6, 4):
        answer = quantize(graph, DOPQ_VIT, plan_of(graph, DOPQ_VIT, bits))
        with torch.no_grad():
            wanted, got = graph.run(pixels)[0], answer.run(pixels)[0]
        losses.append(((got - wanted).norm() / wanted.norm()).item())
    assert losses == sorted(losses)
    assert losses[0] < 0.2
