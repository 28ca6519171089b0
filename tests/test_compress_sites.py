"""Where a graph can be quantized, what hooks see there, and how models are told apart."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress_models import images
from denselab.compress.graph import Axis, Graph, capture
from denselab.compress.sites import Op, Operand, Product, SiteList
from denselab.errors import InputError

pytestmark = pytest.mark.usefixtures("one_thread")

ONE_SIZE: frozenset[Axis] = frozenset()
ATTENTION = (Operand.QUERY, Operand.KEY, Operand.ATTENTION, Operand.VALUE)


class Toy(nn.Module):
    """Every operation and every source once, with sizes that can be counted by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)  # 8x8 -> 2x2
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm = nn.LayerNorm(8)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.inner = nn.Linear(8, 16)
        self.outer = nn.Linear(16, 8)
        self.line = nn.Conv1d(8, 8, 1)
        self.enlarge = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.queries = nn.Parameter(torch.randn(5, 4))

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        x = self.depthwise(self.stem((pixels - 0.5) / 0.2).relu_())
        tokens = self.norm(x.flatten(2).transpose(1, 2))
        tokens = tokens + self.attend(tokens, tokens, tokens, need_weights=False)[0]
        tokens = self.outer(F.gelu(self.inner(tokens)))
        tokens = self.line(F.silu(tokens).transpose(1, 2))
        maps = self.enlarge(tokens.unflatten(2, (2, 2)) + x).flatten(2)
        return {"masks": self.queries @ maps, "alike": torch.einsum("bcn,bcm->bnm", maps, maps.sigmoid())}


@pytest.fixture(scope="module")
def toy() -> tuple[Toy, Graph]:
    torch.manual_seed(0)
    model = Toy().eval()
    return model, capture(model, torch.rand(2, 3, 8, 8), free=ONE_SIZE)


def test_sites_worked_by_hand(toy: tuple[Toy, Graph]) -> None:
    found = [(site.key, site.made_by.value, site.elements, site.channel_axis) for site in toy[1].sites]
    assert found == [
        ("stem/conv/input", "image", 192, 1),
        ("stem/conv/weight", "parameter", 384, 0),
        ("depthwise/conv/input", "relu", 32, 1),
        ("depthwise/conv/weight", "parameter", 72, 0),
        ("attend/linear/input", "norm", 32, 2),
        ("attend/linear/weight", "parameter", 192, 0),
        ("attend/matmul/query", "other", 32, 3),
        ("attend/matmul/key", "other", 32, 2),
        ("attend/matmul/attention", "softmax", 32, None),
        ("attend/matmul/value", "other", 32, 3),
        ("attend/linear/input#1", "other", 32, 1),
        ("attend/linear/weight#1", "parameter", 64, 0),
        ("inner/linear/input", "sum", 32, 2),
        ("inner/linear/weight", "parameter", 128, 0),
        ("outer/linear/input", "gelu", 64, 2),
        ("outer/linear/weight", "parameter", 128, 0),
        ("line/conv/input", "activation", 32, 1),
        ("line/conv/weight", "parameter", 64, 0),
        ("enlarge/conv_transpose/input", "sum", 32, 1),
        ("enlarge/conv_transpose/weight", "parameter", 128, 1),
        ("/matmul/weight", "parameter", 20, 0),
        ("/matmul/input", "other", 64, 1),
        ("/matmul/left", "other", 64, 2),
        ("/matmul/right", "activation", 64, 1),
    ]


def test_macs_worked_by_hand(toy: tuple[Toy, Graph]) -> None:
    stem, depthwise, qkv, logits, mixed, projected, inner, outer, line, enlarge, masks_of, alike = toy[1].found.products
    assert (stem.macs, depthwise.macs) == (4 * 8 * 48, 4 * 8 * 9)
    assert (qkv.macs, logits.macs, mixed.macs, projected.macs) == (4 * 8 * 24, 2 * 4 * 4 * 4, 2 * 4 * 4 * 4, 4 * 8 * 8)
    assert (inner.macs, outer.macs, line.macs) == (4 * 8 * 16, 4 * 16 * 8, 4 * 8 * 8)
    assert (enlarge.macs, masks_of.macs, alike.macs) == (4 * 8 * 4 * 4, 5 * 4 * 16, 16 * 16 * 4)
    assert logits == Product("attend/matmul/query", "attend/matmul/key", 128)
    assert toy[1].found.by_key["attend/matmul/key"].macs == 128


def test_tensors_that_are_read_twice_and_weights_that_are_shared() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(x)
            return self.a(self.a(x)) + self.b(x)

    graph = capture(Twice(), torch.rand(2, 4), free=frozenset({Axis.BATCH}))
    keys = ["a/linear/input", "a/linear/weight", "a/linear/input#1", "b/linear/input", "b/linear/weight"]
    assert [site.key for site in graph.sites] == keys
    assert [site.tensor for site in graph.sites] == [keys[0], keys[1], keys[2], keys[0], keys[4]]
    assert graph.found.by_key["a/linear/weight"].macs == 2 * 16
    assert [each.left for each in graph.found.products] == [keys[0], keys[2], keys[3]]
    calls: list[Tensor] = []
    x = torch.rand(3, 4)
    got = graph.run(x, hooks={"a/linear/weight": lambda w: calls.append(w) or w * 2})
    a, b = (graph.module.get_submodule(name) for name in "ab")
    once = F.linear(x, a.weight * 2, a.bias)
    torch.testing.assert_close(got, F.linear(once, a.weight * 2, a.bias) + F.linear(x, b.weight, b.bias))
    assert len(calls) == 1


def test_tied_parameters_are_one_site() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    weights = [site for site in capture(model, torch.rand(2, 4), free=ONE_SIZE).sites if site.is_weight]
    assert [(site.key, site.macs) for site in weights] == [("0/linear/weight", 32)]


def test_keys_are_unique_where_one_module_multiplies_in_many_ways() -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Parameter(torch.rand(5, 5))

        def forward(self, x: Tensor) -> Tensor:
            probs = (x @ x.mT).softmax(dim=-1)
            y = probs @ x + (x.mT @ probs).mT + self.mix @ x + (x.mT @ self.mix).mT
            return torch.tensordot(y, self.mix, dims=([1], [0])) @ y

    keys = [site.key for site in capture(Many(), torch.rand(2, 5, 4), free=ONE_SIZE).sites]
    assert keys == [
        *("/matmul/query", "/matmul/key", "/matmul/attention", "/matmul/value"),
        *("/matmul/value#1", "/matmul/attention#1", "/matmul/weight", "/matmul/input", "/matmul/input#1"),
        *("/matmul/input#2", "/matmul/weight#2", "/matmul/left", "/matmul/right"),
    ]


def test_what_the_image_does_not_reach_is_no_site() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.embed = nn.Linear(2, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            resample = torch.linspace(0, 1, 6).outer(torch.ones(4))
            return self.embed(x) + self.table(torch.ones(4, 2)) + (resample @ x.mT)[..., :4, :4]

    assert {site.module for site in capture(Constant(), torch.rand(2, 4, 4), free=ONE_SIZE).sites} == {"embed"}


def test_hooks_see_and_replace_and_gradients_flow(toy: tuple[Toy, Graph]) -> None:
    model, graph = toy
    pixels = torch.rand(2, 3, 8, 8)
    plain = graph.run(pixels)
    rounded = graph.run(pixels, hooks={"outer/linear/input": lambda x: (x * 4).round() / 4})
    assert not torch.equal(plain["masks"], rounded["masks"])
    scale = torch.ones((), requires_grad=True)
    graph.run(pixels, hooks={"attend/matmul/query": lambda x: x * scale})["masks"].square().sum().backward()
    assert scale.grad is not None
    assert scale.grad.abs() > 0
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())  # the model's own
    model.zero_grad()


def test_only_the_operation_of_a_site_sees_its_hook() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = x * 2
            return self.a(x), self.b(x)

    graph, x = capture(Branches(), torch.rand(2, 4), free=ONE_SIZE), torch.rand(2, 4)
    (a, b), (other_a, other_b) = graph.run(x), graph.run(x, hooks={"a/linear/input": torch.zeros_like})
    assert not torch.equal(a, other_a)
    assert torch.equal(b, other_b)


def test_an_unknown_site_is_named(toy: tuple[Toy, Graph]) -> None:
    with pytest.raises(InputError, match=r"got 'outer/linear/inputs'; did you mean 'outer/linear/input'\?"):
        toy[1].run(torch.rand(2, 3, 8, 8), hooks={"outer/linear/inputs": torch.zeros_like})


def test_fast_paths_of_torch_are_opened_and_the_mode_is_kept() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    graph = capture(layer, torch.rand(1, 5, 8), free=ONE_SIZE)
    assert [site.operand for site in graph.sites if site.op is Op.MATMUL] == list(ATTENTION)
    assert layer.training
    assert all(module.training for module in layer.modules())
    assert torch.backends.mha.get_fastpath_enabled()


def test_sites_survive_a_file(toy: tuple[Toy, Graph], tmp_path: Path) -> None:
    graph, path = toy[1], tmp_path / "sites.json"
    listed = graph.site_list()
    listed.write(path)
    assert SiteList.read(path) == listed
    good = json.loads(path.read_text())

    def broken(**change: Any) -> Path:
        path.write_text(json.dumps(good | change))
        return path

    with pytest.raises(InputError, match=r"sites\.json: format version 9 is newer"):
        SiteList.read(broken(format_version=9))
    with pytest.raises(InputError, match=r"sites\.json: .*'tape' is not a valid Source"):
        SiteList.read(broken(sites=[good["sites"][0] | {"made_by": "tape"}]))
    with pytest.raises(InputError, match="the entry 'x' describes 'stem/conv/input'"):
        SiteList.read(broken(sites=[good["sites"][0] | {"key": "x"}]))
    del good["model"]
    with pytest.raises(InputError, match="lacks 'model'"):
        SiteList.read(broken())
    path.write_text("{")
    with pytest.raises(InputError, match=r"sites\.json: .*is damaged"):
        SiteList.read(path)
    with pytest.raises(InputError, match=r"none\.json: cannot be read"):
        SiteList.read(tmp_path / "none.json")


def test_hashes_tell_models_and_weights_apart() -> None:
    def net(width: int, activation: nn.Module) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, width, 3), activation, nn.Conv2d(width, 2, 1))

    model = net(4, nn.ReLU())
    first = capture(model, images(1, side_px=8), free=ONE_SIZE).model
    assert capture(model, images(2, side_px=12), free=frozenset({Axis.BATCH})).model == first
    with torch.no_grad():
        model[0].weight.add_(1)
    changed = capture(model, images(1, side_px=8), free=ONE_SIZE).model
    assert changed.architecture == first.architecture
    assert changed.values != first.values
    changed.check_same(first, "plan.json")
    others = [net(5, nn.ReLU()), net(4, nn.GELU())]
    hashes = [capture(other, images(1, side_px=8), free=ONE_SIZE).model for other in others]
    assert len({each.architecture for each in (first, *hashes)}) == 3
    with pytest.raises(InputError, match=r"plan\.json: wanted a file made for this model"):
        first.check_same(hashes[0], "plan.json")
