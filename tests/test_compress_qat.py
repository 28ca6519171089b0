"""Learned step sizes: their gradient by hand, networks that get better, and users' models that stay what they are."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress_models import captured, images, small_graph
from denselab.compress.fold_norms import fold_norms
from denselab.compress.graph import Graph
from denselab.compress.methods.method import Calibration, Method
from denselab.compress.methods.min_max import MIN_MAX
from denselab.compress.methods.repq_vit import REPQ_VIT
from denselab.compress.observing import Stats, observe, weights
from denselab.compress.plan import QuantPlan, equal_bits
from denselab.compress.qat import (
    Scales,
    Training,
    distilled,
    lsq_weights,
    read_trained,
    trained,
    write_trained,
)
from denselab.compress.quantizers import Uniform, quantized
from denselab.compress.relevance.sensitivity import squared_change
from denselab.compress.simulate import QuantizedGraph, read_quantizers
from denselab.errors import InputError

pytestmark = pytest.mark.usefixtures("one_thread")

PIXELS = images(16)
CALIBRATION = Calibration(PIXELS.split(8))


def linear(weight: list[float]) -> Graph:
    """One output, of three numbers."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 1, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([weight]))
    return captured(model, side_px=1)


def test_the_gradient_of_a_step_size_by_hand() -> None:
    graph = linear([0.3, -2.6, 0.9])
    weight = Uniform(torch.tensor(1.0), None, 2)
    activation = Uniform(torch.tensor(0.5), torch.tensor(0, dtype=torch.int32), 2)
    scales = Scales({"1/linear/weight": weight, "1/linear/input": activation})
    # Inputs become 1 (code 2), 1.5 (code 3, the greatest) and 0.5 (code 1).
    pixels = torch.tensor([[1.1, 2.0, 0.4]]).view(1, 3, 1, 1)
    answer = graph.run(pixels, hooks=scales.hooks(graph))
    # Weights become 0, -2 (the least code) and 1.
    assert answer.item() == 1 * 0 + 1.5 * -2 + 0.5 * 1
    answer.sum().backward()
    # round(v) - v inside, the end outside: -0.3, -2, 0.1, each times its input; of three weights, codes up to 1.
    by_hand = (1 * -0.3 + 1.5 * -2 + 0.5 * 0.1) / (3 * 1) ** 0.5
    gradient = scales.of("1/linear/weight").grad
    assert gradient is not None
    assert gradient.item() == pytest.approx(by_hand, rel=1e-5)
    # v = 2.2, 4 and 0.8: -0.2, 3 and 0.2, each times its weight; of three features, codes up to 3.
    by_hand = (0 * -0.2 + -2 * 3 + 1 * 0.2) / (3 * 3) ** 0.5
    gradient = scales.of("1/linear/input").grad
    assert gradient is not None
    assert gradient.item() == pytest.approx(by_hand, rel=1e-5)


@pytest.fixture(scope="module")
def graph() -> Graph:
    return fold_norms(small_graph()[1])


@pytest.fixture(scope="module")
def stats(graph: Graph) -> Stats:
    return observe(graph, CALIBRATION.batches)


def fitted(
    graph: Graph, stats: Stats, method: Method = MIN_MAX, weights: int = 2, activations: int = 4
) -> QuantizedGraph:
    plan = QuantPlan.make(graph, method.name, method.spec, equal_bits(graph, weights, activations))
    return method.quantize(graph, stats, plan, CALIBRATION)


def change(network: QuantizedGraph, graph: Graph) -> float:
    with torch.no_grad():
        return squared_change(network.run(PIXELS), graph.run(PIXELS)).mean().item()


@pytest.mark.parametrize("method", [MIN_MAX, REPQ_VIT], ids=lambda method: method.name)
def test_a_network_learns_to_answer_as_its_teacher(graph: Graph, stats: Stats, method: Method, tmp_path: Path) -> None:
    model = small_graph()[0]
    kept = [*model.state_dict().items(), *graph.module.state_dict().items()]
    before = [value.clone() for _, value in kept]
    start = fitted(graph, stats, method)
    scales = {key: each.scale.clone() for key, each in start.quantizers.items() if isinstance(each, Uniform)}
    change_before = change(start, graph)
    said: list[str] = []
    learned = distilled(start, graph, replace(CALIBRATION, say=said.append), Training(40, weight_rate=0.01))
    assert change(learned, graph) < 0.6 * change_before
    assert change(start, graph) == change_before
    assert said[-1].startswith("training the quantized network: step 40 of 40, loss ")
    for (name, value), old in zip(kept, before, strict=True):
        assert torch.equal(value, old), name
    assert all(value.grad is None for value in model.parameters())
    for key, scale in scales.items():
        assert torch.equal(start.quantizers[key].scale, scale)
    # What runs is what is stored.
    stored, codes = weights(learned.graph), learned.weight_codes()
    assert not torch.equal(stored["widen/linear/weight"], weights(start.graph)["widen/linear/weight"])
    seen: dict[str, Tensor] = {}
    assert codes.keys() <= stored.keys()
    for key in codes:
        quantizer = learned.quantizers[key]
        torch.testing.assert_close(quantizer.values(codes[key]), quantized(quantizer, stored[key]))
    learned.graph.run(PIXELS, hooks={"widen/linear/weight": lambda w: seen.update(w=w) or w})
    assert torch.equal(seen["w"], stored["widen/linear/weight"])
    # Saved for the weights as they are now.
    assert learned.graph.model.architecture == graph.model.architecture
    assert learned.graph.model.values != start.graph.model.values
    path = tmp_path / "quantizers.safetensors"
    learned.write(path)
    again = QuantizedGraph(learned.graph, learned.plan, read_quantizers(path, learned.graph.model))
    assert change(again, graph) == change(learned, graph)
    with pytest.raises(InputError, match="the model's weights changed"):
        read_quantizers(path, start.graph.model)


def test_what_was_learned_is_saved(graph: Graph, stats: Stats, tmp_path: Path) -> None:
    start = fitted(graph, stats)
    shared = {**start.quantizers, "key/linear/input": start.quantizers["query/linear/input"]}
    start = QuantizedGraph(graph, start.plan, shared)
    learned = distilled(start, graph, CALIBRATION, Training(3, weight_rate=0.01))
    path = tmp_path / "trained.safetensors"
    write_trained(learned, start, path)
    again = read_trained(path, start)
    assert change(again, graph) == change(learned, graph) != change(start, graph)
    assert again.graph.model == learned.graph.model
    assert again.quantizers["key/linear/input"] is again.quantizers["query/linear/input"]
    fewer = {key: each for key, each in shared.items() if key != "widen/linear/input"}
    plan = replace(start.plan, specs={key: start.plan.specs[key] for key in fewer})
    with pytest.raises(InputError, match=r"trained.safetensors: wanted a trained network, but it is damaged .*another"):
        read_trained(path, QuantizedGraph(graph, plan, fewer))
    with pytest.raises(InputError, match="the model's weights changed since it was written"):
        read_trained(path, learned)


def test_the_same_twice(graph: Graph, stats: Stats) -> None:
    runs = [distilled(fitted(graph, stats), graph, CALIBRATION, Training(3)) for _ in range(2)]
    assert change(runs[0], graph) == change(runs[1], graph)


def test_a_network_learns_from_labels(graph: Graph, stats: Stats) -> None:
    labels = torch.arange(16) % 5
    start = fitted(graph, stats)

    def loss(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        return F.cross_entropy(output[0], target)

    def value(network: QuantizedGraph) -> float:
        with torch.no_grad():
            return loss(network.run(PIXELS), labels).item()

    learned = trained(start, [(PIXELS, labels)], loss, Training(20, weight_rate=0.02))
    assert value(learned) < value(start) - 0.3


def test_quantizers_that_are_shared_stay_shared(graph: Graph, stats: Stats) -> None:
    start = fitted(graph, stats)
    shared = dict(start.quantizers) | {"key/linear/input": start.quantizers["query/linear/input"]}
    learned = distilled(QuantizedGraph(graph, start.plan, shared), graph, CALIBRATION, Training(2))
    assert learned.quantizers["key/linear/input"] is learned.quantizers["query/linear/input"]
    assert learned.quantizers["key/linear/input"] is not shared["key/linear/input"]


def test_scales_stay_above_zero() -> None:
    graph = linear([0.3, -2.6, 0.9])
    plan = QuantPlan.make(graph, MIN_MAX.name, MIN_MAX.spec, {"1/linear/weight": 4})
    quantizers = {"1/linear/weight": Uniform(torch.tensor([[0.5]]), None, 4)}
    start = QuantizedGraph(graph, plan, quantizers)
    # The loss pulls the answer down to minus infinity, and the rate is far too high.
    learned = trained(start, [(torch.ones(2, 3, 1, 1), None)], lambda y, _: -y, Training(3, scale_rate=100))
    scale = learned.quantizers["1/linear/weight"].scale
    assert scale.item() == pytest.approx(0.5e-3) or scale.item() > 0.5


def test_the_start_of_the_paper(graph: Graph, stats: Stats) -> None:
    start = fitted(graph, stats)
    found = lsq_weights(start)
    weight = weights(graph)["widen/linear/weight"].detach()
    quantizer = found.quantizers["widen/linear/weight"]
    assert isinstance(quantizer, Uniform)
    torch.testing.assert_close(quantizer.scale, 2 * weight.abs().mean(1, keepdim=True))  # the greatest code is 1
    assert found.quantizers["widen/linear/input"] is start.quantizers["widen/linear/input"]


def test_what_cannot_be_trained(graph: Graph, stats: Stats) -> None:
    start = fitted(graph, stats)
    with pytest.raises(InputError, match="examples: wanted at least one batch to train with, got none"):
        distilled(start, graph, Calibration(()), Training(2))
    with pytest.raises(InputError, match="loss: wanted a finite number, got nan in step 0; lower the rates"):
        trained(start, [(PIXELS, None)], lambda output, _: output[0] * torch.nan, Training(2))
    with pytest.raises(InputError, match="steps: wanted at least 1, got 0"):
        Training(0)
    with pytest.raises(InputError, match="scale_rate: wanted a finite number from 0 up, got -1"):
        Training(1, scale_rate=-1)
