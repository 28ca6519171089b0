"""Blocks of a graph: found by module paths, and run one after another they are the graph, to the last bit."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from denselab import _vision as _vision

# isort: split
import timm

from compress_models import WIDTH, captured, images, small_graph
from denselab.compress.blocks import Blocks, find_blocks, frozen, with_parameters
from denselab.compress.fold_norms import fold_norms
from denselab.compress.graph import Graph, capture

pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def tiny_vit() -> tuple[nn.Module, Graph]:
    torch.manual_seed(0)
    sizes = {"embed_dim": 12, "depth": 2, "num_heads": 2, "img_size": 16, "patch_size": 8}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=4, **sizes).eval()
    return model, captured(model)


def vit() -> Graph:
    return tiny_vit()[1]


def resnet() -> Graph:
    return fold_norms(captured(timm.create_model("resnet10t", num_classes=4, channels=(8, 8, 8, 8)).eval(), side_px=32))


class Shared(nn.Module):
    """Numbered layers one of which runs twice, a tap, and a parameter that is an answer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)) for _ in range(2))
        self.anchors = nn.Parameter(torch.arange(4.0))

    def forward(self, pixels: Tensor) -> dict[str, Any]:
        tap = self.layers[0](pixels.mean((2, 3)).repeat(1, 2)[:, :4])
        x = self.layers[1](tap)
        return {"again": self.layers[0](x), "tap": tap, "anchors": (self.anchors, pixels)}


def small() -> Graph:
    return small_graph()[1]


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (vit, ["patch_embed.proj", "blocks.0", "blocks.1", "head"]),
        (resnet, ["conv1", "layer1.0", "layer2.0", "layer3.0", "layer4.0", "fc"]),
        (small, ["stem", "query", "key", "value", "gate", "", "", "project", "widen", "narrow", "head"]),
        (lambda: captured(Shared().eval()), ["layers.0", "layers.1", "layers.0"]),
    ],
)
def test_blocks_run_one_after_another_are_the_graph(build: Callable[[], Graph], names: list[str]) -> None:
    torch.manual_seed(0)
    graph = build()
    found = find_blocks(graph)
    assert [block.name for block in found.blocks] == names
    # Every site is in one block, in order of execution.
    assert [key for block in found.blocks for key in block.sites] == [site.key for site in graph.sites]
    # A product whose output a block is given is no place of it.
    read_at = [
        place.node.op for block in found.blocks for places in block.graph.found.places.values() for place in places
    ]
    assert set(read_at) == {"call_function"}
    for count in (3, 1):  # sizes are values too
        pixels = images(count, side_px=graph.example_shapes[0][-1])
        assert_same(through(found, pixels), graph.run(pixels))


def through(found: Blocks, pixels: Tensor) -> Any:
    values = found.start(pixels)
    with torch.no_grad():
        for block in found.blocks:
            assert set(block.inputs) <= values.keys()
            values = block.run(values)
            assert values.keys() == block.live
    return found.answer(values)


def assert_same(got: Any, wanted: Any) -> None:
    for one, other in zip(pytree.tree_leaves(got), pytree.tree_leaves(wanted), strict=True):
        assert torch.equal(one, other)


def test_a_block_alone_is_what_its_module_computes() -> None:
    model, graph = tiny_vit()
    first, second = find_blocks(graph).blocks[1:3]
    x = torch.randn(3, 5, 12)
    size, stream = first.outputs[0], next(name for name in second.inputs if name in first.outputs)
    values = dict.fromkeys(second.inputs, 3) | {stream: x}
    (got,) = (second.run(values)[name] for name in second.outputs)
    assert isinstance(size, str)
    # The last norm and the choice of the token are cut off where the fewest numbers pass.
    torch.testing.assert_close(got, model.norm(model.blocks[1](x))[:, 0])


def test_hooks_see_the_sites_of_a_block() -> None:
    graph = small()
    seen: list[str] = []

    def watching(key: str) -> Callable[[Tensor], Tensor]:
        return lambda x: seen.append(key) or x

    found = find_blocks(graph)
    values = found.start(images(2))
    for block in found.blocks:
        values = block.run(values, {key: watching(key) for key in block.graph.found.places})
    assert seen == [site.key for site in graph.sites]
    assert_same(found.answer(values), graph.run(images(2)))


def test_one_layer_and_none() -> None:
    layer = captured(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).eval(), side_px=2)
    assert [block.name for block in find_blocks(layer).blocks] == ["1"]
    nothing = find_blocks(captured(nn.ReLU(), side_px=2))
    assert [block.sites for block in nothing.blocks] == [()]
    assert torch.equal(through(nothing, images(2) - 0.5), (images(2) - 0.5).relu())


def test_a_batch_of_one() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, pixels: Tensor) -> Tensor:
            assert len(pixels) == 1
            return self.second(F.relu(self.first(pixels)).squeeze(0).unsqueeze(0))

    graph = capture(Tied().eval(), torch.rand(1, 3, 4, 4), free=frozenset())
    found = find_blocks(graph)
    assert [block.name for block in found.blocks] == ["first", "second"]
    assert torch.equal(through(found, images(1, side_px=4)), graph.run(images(1, side_px=4)))


def test_parameters_are_changed_in_a_copy() -> None:
    model, graph = small_graph()
    bias = torch.arange(5.0)
    changed = with_parameters(graph, {"head.bias": bias})
    pixels = images(2)
    torch.testing.assert_close(changed.run(pixels)[0] - bias, graph.run(pixels)[0] - model.head.bias)
    assert torch.equal(changed.run(pixels)[1], graph.run(pixels)[1])
    assert changed.model == graph.model
    assert not torch.equal(model.head.bias, bias)
    # Hooks reach the copy, and whole graphs of it can be cut.
    hooked = changed.run(pixels, hooks={"head/linear/input": torch.zeros_like})[0]
    torch.testing.assert_close(hooked, bias.expand(2, -1))
    assert len(find_blocks(changed).blocks) == len(find_blocks(graph).blocks)
    still = frozen(graph)
    assert not any(value.requires_grad for value in still.module.parameters())
    assert all(value.requires_grad for value in model.parameters())
    name = "widen.weight"
    assert still.module.get_parameter(name).data_ptr() == model.widen.weight.data_ptr()
    assert still.module.get_parameter(name).shape == (2 * WIDTH, WIDTH)
