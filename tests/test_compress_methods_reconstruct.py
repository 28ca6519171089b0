"""Methods that optimise: better than their start on a trained model, at home in any network, and clear about errors."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from denselab import _vision as _vision

# isort: split
import timm

from compress_models import captured, images, small_graph
from denselab.compress.fold_norms import fold_norms
from denselab.compress.graph import Graph
from denselab.compress.methods import aphq_vit, auto, is_vit
from denselab.compress.methods.aphq_vit import APHQ_VIT
from denselab.compress.methods.auto import AUTO
from denselab.compress.methods.is_vit import IS_VIT
from denselab.compress.methods.method import Calibration, Method
from denselab.compress.methods.min_max import MIN_MAX
from denselab.compress.methods.repq_vit import REPQ_VIT
from denselab.compress.observing import observe
from denselab.compress.plan import Granularity, Grid, QuantPlan, QuantSpec, equal_bits
from denselab.compress.quantizers import Sulq, Uniform
from denselab.compress.relevance.sensitivity import squared_change
from denselab.compress.simulate import QuantizedGraph
from denselab.errors import InputError
from digits import reader

pytestmark = pytest.mark.usefixtures("one_thread")

METHODS = (AUTO, IS_VIT, APHQ_VIT)


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of a method here takes few steps."""
    monkeypatch.setattr(aphq_vit, "MLP_STEPS", 20)
    monkeypatch.setattr(aphq_vit, "RECIPE", replace(aphq_vit.RECIPE, steps=5))
    for name in ("FLOAT_WEIGHTS", "QUANTIZED_WEIGHTS"):
        monkeypatch.setattr(is_vit, name, replace(getattr(is_vit, name), steps=5))
    monkeypatch.setattr(auto, "RECIPE", replace(auto.RECIPE, steps=5))


def quantize(graph: Graph, method: Method, pixels: Tensor, weights: int, activations: int) -> QuantizedGraph:
    plan = QuantPlan.make(graph, method.name, method.spec, equal_bits(graph, weights, activations))
    stats = observe(graph, [pixels])
    return method.quantize(graph, stats, plan, Calibration(pixels.split(16)))


def error(graph: Graph, quantized: QuantizedGraph, pixels: Tensor) -> float:
    with torch.no_grad():
        return squared_change(quantized.run(pixels), graph.run(pixels)).mean().item()


# A trained model


def test_digits_at_few_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "RECIPE", replace(auto.RECIPE, steps=40))
    digits = reader()
    graph = digits.graph
    answers = {each.name: quantize(graph, each, digits.seen, 2, 3) for each in (MIN_MAX, REPQ_VIT, *METHODS)}
    errors = {name: error(graph, each, digits.test) for name, each in answers.items()}
    top1 = {name: digits.top1(each.run) for name, each in answers.items()}
    assert top1[AUTO.name] > top1[MIN_MAX.name] + 0.3
    assert top1[AUTO.name] > top1[REPQ_VIT.name]
    assert errors[AUTO.name] < 0.7 * errors[REPQ_VIT.name]
    assert errors[IS_VIT.name] < errors[REPQ_VIT.name]
    assert errors[APHQ_VIT.name] < 0.5 * errors[MIN_MAX.name]  # which takes more steps than a test has time for


# Any network


def convolutional() -> Graph:
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=5, channels=(8, 8, 16, 16)).eval()
    return fold_norms(captured(model, side_px=32))


def one_layer() -> Graph:
    torch.manual_seed(0)
    return captured(nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 5)).eval())


@pytest.mark.parametrize("build", [lambda: small_graph()[1], convolutional, one_layer])
def test_any_network(build: Callable[[], Graph]) -> None:
    graph = build()
    side_px = graph.example_shapes[0][-1]
    pixels, unseen = images(16, side_px=side_px), images(16, seed=1, side_px=side_px)
    before = {name: value.clone() for name, value in graph.module.state_dict().items()}
    rough = error(graph, quantize(graph, MIN_MAX, pixels, 3, 4), unseen)
    for method in METHODS:
        quantized = quantize(graph, method, pixels, 3, 4)
        assert quantized.graph.model == graph.model
        assert error(graph, quantized, unseen) < 1.5 * rough, method.name
        assert set(quantized.weight_codes()) == {site.key for site in graph.sites if site.is_weight}
    assert all(torch.equal(value, before[name]) for name, value in graph.module.state_dict().items())


def test_auto_is_never_worse_than_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, pixels = small_graph()[1], images(64)
    monkeypatch.setattr(auto, "RECIPE", replace(auto.RECIPE, steps=0))
    start = quantize(graph, AUTO, pixels, 3, 3)
    monkeypatch.setattr(auto, "RECIPE", replace(auto.RECIPE, steps=3, scale_rate=30.0))
    wild = quantize(graph, AUTO, pixels, 3, 3)
    assert error(graph, wild, pixels) <= error(graph, start, pixels)
    # At 8 bits there is nothing to learn, and engines can run what comes out.
    exact = quantize(graph, AUTO, pixels, 8, 8)
    assert error(graph, exact, pixels) < 1.2 * error(graph, quantize(graph, MIN_MAX, pixels, 8, 8), pixels)
    for site in graph.sites:
        quantizer = exact.quantizers[site.key]
        assert isinstance(quantizer, Uniform)
        assert (quantizer.zero_point is None) == site.is_weight
        assert quantizer.scale.numel() == 1 or site.is_weight


def test_one_site_and_mixed_bits() -> None:
    graph, pixels = small_graph()[1], images(32)
    stats = observe(graph, [pixels])
    key = "widen/linear/weight"
    bits = {site.key: 2 + number % 7 for number, site in enumerate(graph.sites)}
    for method in METHODS:
        for chosen in ({key: 3}, bits):
            plan = QuantPlan.make(graph, method.name, method.spec, chosen)
            quantized = method.quantize(graph, stats, plan, Calibration([pixels]))
            assert {name: each.bits for name, each in quantized.quantizers.items()} == chosen
            assert error(graph, quantized, pixels) < 2, method.name


def test_sulq_of_attention_maps() -> None:
    graph, pixels = small_graph()[1], images(32)
    quantized = quantize(graph, IS_VIT, pixels, 4, 4)
    grids = {key: each for key, each in quantized.quantizers.items() if isinstance(each, Sulq)}
    assert [graph.found.by_key[key].operand.value for key in grids] == ["attention"]
    # What follows a norm ends per tensor, whatever the first stage did.
    assert all(
        spec.granularity is Granularity.PER_TENSOR
        for key, spec in quantized.plan.specs.items()
        if not graph.found.by_key[key].is_weight
    )


def test_what_methods_refuse() -> None:
    graph, pixels = small_graph()[1], images(16)
    stats = observe(graph, [pixels])
    for method in METHODS:
        plan = QuantPlan.make(graph, method.name, method.spec, equal_bits(graph, 4, 4))
        with pytest.raises(InputError, match=r"wanted .*, got none"):
            method.quantize(graph, stats, plan, Calibration(()))
        tangent = QuantPlan(graph.model, method.name, frozenset(), {"widen/linear/input": QuantSpec(4, Grid.TANQ)})
        with pytest.raises(InputError, match=r"widen/linear/input: grid: .* cannot fit tanq"):
            method.quantize(graph, stats, tangent, Calibration([pixels]))
