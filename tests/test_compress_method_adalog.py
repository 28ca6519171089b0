"""AdaLog against brute force over bases, RepQ-ViT's error, and the form in which an export runs it."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from compress_models import captured, images, small_graph
from denselab.compress.graph import Graph
from denselab.compress.methods.adalog import ADALOG, GELU_SHIFT
from denselab.compress.methods.method import Calibration, Method
from denselab.compress.methods.repq_vit import REPQ_VIT
from denselab.compress.observing import observe
from denselab.compress.plan import Granularity, Grid, QuantPlan, QuantSpec, equal_bits
from denselab.compress.quantizers import AdaLog, Uniform, bias_without_shift, quantized
from denselab.compress.ranges import percentile_ranges
from denselab.compress.simulate import QuantizedGraph
from denselab.errors import InputError

pytestmark = pytest.mark.usefixtures("one_thread")

PIXELS = images(8)
CALIBRATION = Calibration((PIXELS[:4], PIXELS[4:]))


def quantize(graph: Graph, method: Method, plan: QuantPlan, calibration: Calibration = CALIBRATION) -> QuantizedGraph:
    return method.quantize(graph, observe(graph, calibration.batches), plan, calibration)


def plan_of(graph: Graph, method: Method, bits: int, only: str = "") -> QuantPlan:
    plan = QuantPlan.make(graph, method.name, method.spec, equal_bits(graph, bits, bits, kept=()))
    return replace(plan, specs={key: each for key, each in plan.specs.items() if key.startswith(only)})


def seen_at(graph: Graph, *keys: str) -> list[Tensor]:
    seen: dict[str, Tensor] = {}
    with torch.no_grad():
        graph.run(PIXELS, hooks={key: lambda x, key=key: seen.setdefault(key, x) for key in keys})
    return [seen[key] for key in keys]


def error(graph: Graph, answer: QuantizedGraph) -> float:
    pixels = images(16, seed=1)
    with torch.no_grad():
        wanted, got = graph.run(pixels)[0], answer.run(pixels)[0]
    return ((got - wanted).norm() / wanted.norm()).item()


def test_what_it_plans() -> None:
    specs = plan_of(small_graph()[1], ADALOG, 4).specs
    assert specs["/matmul/attention"] == QuantSpec(4, Grid.ADALOG)
    assert specs["narrow/linear/input"] == QuantSpec(4, Grid.ADALOG)
    for key in ("/matmul/query", "/matmul/key", "/matmul/value"):
        assert specs[key] == QuantSpec(4, Grid.UNIFORM, Granularity.PER_HEAD)
    assert specs["narrow/linear/weight"] == QuantSpec(4, Grid.UNIFORM, Granularity.PER_CHANNEL)
    assert specs["query/linear/input"] == QuantSpec(4)


def test_base_of_attention_is_that_of_least_error_of_attention_times_values() -> None:
    graph = small_graph()[1]
    answer = quantize(graph, ADALOG, plan_of(graph, ADALOG, 3, only="/matmul/attention"))
    (found,) = answer.quantizers.values()
    assert isinstance(found, AdaLog)
    assert (found.scale.item(), found.shift.item()) == (1, 0)
    attention, values = seen_at(graph, "/matmul/attention", "/matmul/value")
    errors = {
        base: ((quantized(replace(found, q=torch.tensor(base)), attention) - attention) @ values).square().sum().item()
        for base in range(1, 129)
    }
    assert errors[int(found.q)] == pytest.approx(min(errors.values()), rel=1e-4)


def test_weights_are_those_of_least_error_of_the_layer() -> None:
    graph = small_graph()[1]
    key = "narrow/linear/weight"
    kept = plan_of(graph, ADALOG, 3, only=key)
    found, begun = (quantize(graph, each, kept).quantizers[key] for each in (ADALOG, REPQ_VIT))
    assert isinstance(found, Uniform)
    weight, inputs = seen_at(graph, key, "narrow/linear/input")

    def errors(quantizer: Uniform) -> Tensor:
        return ((quantized(quantizer, weight) - weight) @ inputs.flatten(0, 1).T).square().sum(1)

    ((low, high),) = percentile_ranges(weight, (1.0,), keep=(0,))
    grid = torch.stack(
        [
            errors(Uniform((high - low) / 7 * share, torch.full_like(low, zero).int(), 3))
            for share in torch.linspace(0.3, 1.2, 40)
            for zero in range(8)
        ]
    )
    assert (errors(found) <= errors(begun)).all()
    assert errors(found).sum() < 1.25 * grid.amin(0).sum()


def test_gelu_runs_without_its_shift_when_the_next_bias_has_it() -> None:
    graph = small_graph()[1]
    answer = quantize(graph, ADALOG, plan_of(graph, ADALOG, 4, only="narrow"))
    gelu = answer.quantizers["narrow/linear/input"]
    assert isinstance(gelu, AdaLog)
    assert gelu.shift.item() == pytest.approx(GELU_SHIFT)
    weight, x = seen_at(graph, "narrow/linear/weight", "narrow/linear/input")
    kept = quantized(answer.quantizers["narrow/linear/weight"], weight)
    bias = dict(answer.graph.module.named_parameters())["narrow.bias"]
    simulated = nn.functional.linear(quantized(gelu, x), kept, bias)
    exported = nn.functional.linear(
        gelu.shifted_values(gelu.codes(x)), kept, bias_without_shift(kept, bias, gelu.shift)
    )
    torch.testing.assert_close(exported, simulated)


def test_layers_lose_less_than_by_repq_vit() -> None:
    graph = small_graph()[1]
    for name in ("project", "narrow"):
        inputs, weight = seen_at(graph, f"{name}/linear/input", f"{name}/linear/weight")
        lost: list[float] = []
        for method in (ADALOG, REPQ_VIT):
            found = quantize(graph, method, plan_of(graph, method, 3, only=name)).quantizers
            kept = (quantized(found[f"{name}/linear/{each}"], x) for each, x in (("input", inputs), ("weight", weight)))
            lost.append((nn.functional.linear(*kept) - nn.functional.linear(inputs, weight)).norm().item())
        assert lost[0] < lost[1], name


def test_more_bits_lose_less() -> None:
    graph = small_graph()[1]
    losses = [error(graph, quantize(graph, ADALOG, plan_of(graph, ADALOG, bits))) for bits in (8, 3)]
    assert losses[0] < 0.5 * losses[1]


def test_any_plan_of_its_grids_and_a_graph_for_one_image() -> None:
    graph = small_graph()[1]
    bits = {key: 3 + number % 6 for number, key in enumerate(graph.found.by_key)}
    specs = dict(QuantPlan.make(graph, ADALOG.name, ADALOG.spec, bits).specs)
    specs["narrow/linear/input"] = QuantSpec(5, Grid.UNIFORM, Granularity.PER_CHANNEL)
    specs["/matmul/attention"] = QuantSpec(5, Grid.LOG_SQRT2)
    specs["/matmul/key"] = QuantSpec(5, Grid.ADALOG, Granularity.PER_HEAD)
    specs["project/linear/weight"] = QuantSpec(5, symmetric=True)
    del specs["query/linear/weight"]
    plan = QuantPlan(graph.model, ADALOG.name, frozenset(), specs)
    answer = quantize(graph, ADALOG, plan)
    assert list(answer.quantizers) == list(specs)
    assert error(graph, answer) < 0.5
    again = quantize(graph, ADALOG, plan)
    for key, quantizer in answer.quantizers.items():
        assert torch.equal(quantized(quantizer, torch.tensor(0.3)), quantized(again.quantizers[key], torch.tensor(0.3)))


class Convolutions(nn.Module):
    """Overlapping windows, groups, and a stride that skips pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(4, 4, 2, groups=2, stride=2),
            nn.Conv2d(4, 5, 2, stride=2),
        )

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.layers(pixels)
        return maps.mean((2, 3)), maps


def test_convolutions_and_images_without_contrast() -> None:
    torch.manual_seed(0)
    graph = captured(Convolutions().eval())
    answer = quantize(graph, ADALOG, plan_of(graph, ADALOG, 8))
    assert error(graph, answer) < 0.05
    grey = Calibration((torch.zeros(8, 3, 16, 16),))
    for each in (graph, small_graph()[1]):
        blank = quantize(each, ADALOG, plan_of(each, ADALOG, 4), grey)
        assert all(value.isfinite().all() for value in blank.run(PIXELS))


def test_refusals() -> None:
    graph = small_graph()[1]
    stats, plan = observe(graph, [PIXELS]), plan_of(graph, ADALOG, 4)
    with pytest.raises(InputError, match=r"images: wanted at least one .*got none"):
        ADALOG.quantize(graph, stats, plan, Calibration(()))
    wrong = replace(plan, specs={"widen/linear/input": QuantSpec(4, Grid.SULQ)})
    with pytest.raises(InputError, match="widen/linear/input: grid: adalog cannot fit sulq"):
        ADALOG.quantize(graph, stats, wrong, CALIBRATION)
