"""Reconstruction: AdaRound by hand, the Hessian by another way, losses that fall, and codes that are those learned."""

from dataclasses import replace
from math import log

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress_models import captured, images
from denselab.compress.adaround import AdaRound, rounded, rounded_up, rounding_logits, undecided
from denselab.compress.block_loss import perturbed_hessian, split_images
from denselab.compress.blocks import find_blocks, frozen
from denselab.compress.graph import Graph, capture
from denselab.compress.methods.method import Calibration
from denselab.compress.methods.min_max import MIN_MAX
from denselab.compress.observing import observe, weights
from denselab.compress.plan import QuantPlan, QuantSpec, equal_bits
from denselab.compress.quantizers import Uniform, quantized
from denselab.compress.reconstruct import Loss, Recipe, StraightThrough, reconstruct
from denselab.compress.relevance.hessian import perturbation_hessian
from denselab.compress.relevance.sensitivity import squared_change
from denselab.compress.simulate import QuantizedGraph
from denselab.errors import InputError

pytestmark = pytest.mark.usefixtures("one_thread")

STRAIGHT = Recipe(Loss.OUTPUT, StraightThrough(0.02), 30, scale_rate=0.01)
ROUNDED = Recipe(Loss.OUTPUT, AdaRound(0.1), 60, scale_rate=0.01)


class Branched(nn.Module):
    """Two numbered blocks, in each of which two layers read one tensor; the head sees half of the features."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.blocks = nn.ModuleList(Pair() for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.stem(pixels).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.gelu(self.left(x)) * self.right(x)


@pytest.fixture(scope="module")
def model() -> Branched:
    torch.manual_seed(0)
    model = Branched().eval()
    with torch.no_grad():
        model.head.weight[:, 4:] = 0
    return model


@pytest.fixture(scope="module")
def graph(model: Branched) -> Graph:
    return captured(model)


def start_of(graph: Graph, bits: int = 3) -> QuantizedGraph:
    plan = QuantPlan.make(graph, MIN_MAX.name, MIN_MAX.spec, equal_bits(graph, bits, bits))
    return MIN_MAX.quantize(graph, observe(graph, [images(32)]), plan, Calibration(()))


def error(quantized_graph: QuantizedGraph, pixels: Tensor) -> float:
    with torch.no_grad():
        return squared_change(quantized_graph.run(pixels), quantized_graph.graph.run(pixels)).mean().item()


def error_from(graph: Graph, quantized_graph: QuantizedGraph, pixels: Tensor) -> float:
    with torch.no_grad():
        return squared_change(quantized_graph.run(pixels), graph.run(pixels)).mean().item()


# AdaRound by hand


def test_the_rectified_sigmoid() -> None:
    # h = 1.2 sigmoid(V) - 0.1, so that h = 0, 1/2, 1 at sigmoid 1/12, 1/2, 11/12.
    rests = torch.tensor([0, 0.5, 1])
    logits = rounding_logits(rests)
    torch.testing.assert_close(logits, torch.tensor([-log(11), 0, log(11)]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rounded_up(logits), rests, atol=1e-6, rtol=0)
    assert rounded_up(torch.tensor([-9.0, 9.0])).tolist() == [0, 1]


def test_the_regulariser() -> None:
    assert undecided(torch.tensor([0.0, 1.0]), beta=2).item() == 0
    assert undecided(torch.tensor([0.5, 0.25, 1.0]), beta=2).item() == pytest.approx(1 + 0.75)
    schedule = AdaRound(0.1)
    assert [schedule.beta(done) for done in (0, 0.2, 0.6, 1)] == pytest.approx([20, 20, 11, 2])


def test_weights_between_two_steps() -> None:
    weight = torch.tensor([0.6, -0.9, 3.0, -9.0])
    share = torch.tensor([0.0, 1.0, 1.0, 0.25])
    symmetric = Uniform(torch.tensor(0.5), None, 2)  # codes -2..1
    assert rounded(symmetric, weight, share).tolist() == [0.5, -0.5, 0.5, -1]
    affine = Uniform(torch.tensor(0.5), torch.tensor(1), 2)  # -1..2 steps
    assert rounded(affine, weight, share).tolist() == [0.5, -0.5, 1, -0.5]


def test_rounding_that_is_better_together() -> None:
    # Inputs that are always equal: weights 0.3 + 0.45 are 0 + 0 to the nearest, but 0 + 1 is closer to their sum.
    layer = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.3, 0.45]]))

    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, pixels: Tensor) -> Tensor:
            return self.layer(pixels[:, 0, 0, :1].repeat(1, 2))

    graph = captured(Doubled().eval(), side_px=2)
    spec = QuantSpec(4, symmetric=True)
    plan = QuantPlan(graph.model, "by hand", frozenset(), {"layer/linear/weight": spec})
    start = QuantizedGraph(graph, plan, {"layer/linear/weight": Uniform(torch.tensor(1.0), None, 4)})
    assert start.weight_codes()["layer/linear/weight"].tolist() == [[0, 0]]
    learned = reconstruct(start, Calibration([images(16, side_px=2)]), replace(ROUNDED, steps=200))
    assert learned.weight_codes()["layer/linear/weight"].tolist() == [[0, 1]]
    assert layer.weight.tolist() == [[pytest.approx(0.3), pytest.approx(0.45)]]


# Losses


@pytest.mark.parametrize("loss", Loss)
@pytest.mark.parametrize("recipe", [STRAIGHT, ROUNDED], ids=["straight", "rounded"])
def test_blocks_learn(model: Branched, graph: Graph, recipe: Recipe, loss: Loss) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    start = start_of(graph)
    said: list[str] = []
    calibration = Calibration([images(32)], say=said.append)
    learned = reconstruct(start, calibration, replace(recipe, loss=loss))
    unseen = images(64, seed=1)
    assert error_from(graph, learned, unseen) < 0.6 * error_from(graph, start, unseen)
    assert [each.partition(":")[0] for each in said] == [
        f"block {number} of 4 ({name})" for number, name in enumerate(("stem", "blocks.0", "blocks.1", "head"), 1)
    ]
    # The user's model is what it was, the plan too; what an export reads is what was optimised.
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert learned.plan == start.plan
    found = weights(learned.graph)
    for key, codes in learned.weight_codes().items():
        quantizer = learned.quantizers[key]
        torch.testing.assert_close(quantizer.values(codes), quantized(quantizer, found[key]), rtol=0, atol=0)
    if recipe is ROUNDED:
        for key, weight in weights(graph).items():
            quantizer = learned.quantizers[key]
            assert isinstance(quantizer, Uniform)
            steps = (weight / quantizer.scale).clamp(quantizer.lowest, quantizer.highest)
            assert (steps - learned.weight_codes()[key]).abs().max() <= 1
    # What reads one tensor is still quantized once.
    left, right = (learned.quantizers[f"blocks.0.{side}/linear/input"] for side in ("left", "right"))
    assert isinstance(left, Uniform)
    assert isinstance(right, Uniform)
    assert torch.equal(left.scale, right.scale)
    assert not torch.equal(left.scale, torch.as_tensor(start.quantizers["blocks.0.left/linear/input"].scale))


def test_the_same_seed_learns_the_same(graph: Graph) -> None:
    recipe = replace(STRAIGHT, loss=Loss.HESSIAN, drop=0.5)
    start = start_of(graph)
    one, same, other = (reconstruct(start, Calibration([images(32)], seed=seed), recipe) for seed in (0, 0, 1))
    pixels = images(4, seed=1)
    assert torch.equal(one.run(pixels), same.run(pixels))
    assert not torch.equal(one.run(pixels), other.run(pixels))


def test_the_hessian_of_a_block_is_that_of_the_site_behind_it(graph: Graph) -> None:
    blocks = find_blocks(frozen(graph))
    pixels = images(4)
    values = blocks.start(pixels)
    with torch.no_grad():
        for block in blocks.blocks[:3]:
            values = block.run(values)
        wanted = graph.run(pixels)
    (found,) = perturbed_hessian(blocks, 2, values, wanted, 4, squared_change).values()
    key = "head/linear/input"
    other = perturbation_hessian(graph, [pixels], [key], squared_change)[key]
    torch.testing.assert_close(found / 4, other.flatten(), rtol=1e-3, atol=1e-3 * other.max().item())
    assert (found[:4] > 0).all()
    assert (found[4:] == 0).all()  # which the head does not see


def test_a_block_that_gets_worse_is_put_back(graph: Graph) -> None:
    wild = Recipe(Loss.OUTPUT, StraightThrough(50.0), 3, scale_rate=0.0)
    start = start_of(graph)
    calibration = Calibration([images(32)])
    pixels = images(16, seed=1)
    for held in ((), [images(16, seed=2)]):
        assert torch.equal(reconstruct(start, calibration, wild, held).run(pixels), start.run(pixels))


# Degenerate


def test_one_planned_site(graph: Graph) -> None:
    start = start_of(graph)
    key = "blocks.1.left/linear/weight"
    one = QuantizedGraph(graph, replace(start.plan, specs={key: start.plan.specs[key]}), {key: start.quantizers[key]})
    learned = reconstruct(one, Calibration([images(32)]), replace(STRAIGHT, loss=Loss.HESSIAN))
    changed = {
        name
        for name, value in learned.graph.module.named_parameters()
        if not torch.equal(value, graph.module.get_parameter(name))
    }
    assert changed
    assert {name.rpartition(".")[0] for name in changed} <= {"blocks.1.left", "blocks.1.right"}
    assert error_from(graph, learned, images(32, seed=1)) < error(one, images(32, seed=1))


def test_blocks_of_8_bits_can_be_left_alone(graph: Graph) -> None:
    start = start_of(graph, bits=8)
    said: list[str] = []
    calibration = Calibration([images(16)], say=said.append)
    learned = reconstruct(start, calibration, replace(STRAIGHT, below_bits=8))
    assert torch.equal(learned.run(images(2)), start.run(images(2)))
    assert not said
    assert reconstruct(start, calibration, replace(STRAIGHT, steps=0)) is start


def test_one_layer_with_little_memory() -> None:
    torch.manual_seed(0)
    graph = capture(nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).eval(), images(2, side_px=2))
    plan = QuantPlan.make(graph, "", MIN_MAX.spec, equal_bits(graph, 2, 4, kept=()), kept=())
    pixels = images(64, side_px=2)
    start = MIN_MAX.quantize(graph, observe(graph, [pixels]), plan, Calibration(()))
    learned = reconstruct(start, Calibration([pixels]), replace(STRAIGHT, loss=Loss.HESSIAN, memory_bytes=2000))
    assert error_from(graph, learned, pixels) < error(start, pixels)


def test_images_in_batches(graph: Graph) -> None:
    batches = [images(5), images(4, seed=1), images(3, seed=2, side_px=32)]
    found = split_images(graph, batches, at_once=4, seed=0)
    assert [tuple(each.shape) for each in found] == [(4, 3, 16, 16)] * 2 + [(1, 3, 16, 16), (3, 3, 32, 32)]
    every = torch.cat([each for each in found if each.shape[-1] == 16]).flatten(1).sum(1).sort().values
    torch.testing.assert_close(every, torch.cat(batches[:2]).flatten(1).sum(1).sort().values)
    tied = replace(graph, free=frozenset())
    assert [len(each) for each in split_images(tied, [images(5)], at_once=4, seed=0)] == [2, 2]
    with pytest.raises(InputError, match="images: wanted at least one to reconstruct with, got none"):
        reconstruct(start_of(graph), Calibration(()), STRAIGHT)
