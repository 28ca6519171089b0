"""Any eager vision model as one graph: parity, opened attention, sites, hooks, and what cannot be captured."""

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from denselab import _vision as _vision
from denselab import zoo

# isort: split
import timm
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    Dinov2Config,
    Dinov2Model,
    DPTConfig,
    DPTForDepthEstimation,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SwinConfig,
    ViTConfig,
    ViTForImageClassification,
)

from compress_models import segmenter
from denselab.compress.graph import ANY_SIZE, Axis, Graph, capture
from denselab.compress.open_attention import opened_attention
from denselab.compress.sites import Op, Operand, Product, SiteList, Source
from denselab.errors import InputError
from denselab.heads.kmax import KMaXHead
from denselab.heads.masked_attention import MaskedAttentionHead
from denselab.heads.polymax import PolyMaXHead
from denselab.pixel_decoders.kmax import PUBLISHED_STAGES
from test_contract import CASES

pytestmark = pytest.mark.usefixtures("one_thread")

ONE_SIZE: frozenset[Axis] = frozenset()
ATTENTION = (Operand.QUERY, Operand.KEY, Operand.ATTENTION, Operand.VALUE)
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)


@dataclass(frozen=True)
class Case:
    """A model, in how many attentions the image takes part, and the side of the image in px."""

    make: Callable[[], nn.Module]
    attentions: int = 0
    side_px: int = 64


def from_timm(name: str, attentions: int = 0, **options: Any) -> Case:
    return Case(lambda: timm.create_model(name, pretrained=False, **options), attentions, options.get("img_size", 64))


def shallow(name: str) -> Callable[[], nn.Module]:
    """A model of the zoo with one block per stride of the pixel decoder of kMaX, and two layers in the head."""
    stages = {stride: replace(stage, depth=1) for stride, stage in PUBLISHED_STAGES.items()}
    heads: dict[str, Any] = {head.__name__: partial(head, layers=(1, 1)) for head in (KMaXHead, PolyMaXHead)}
    heads["MaskedAttentionHead"] = partial(MaskedAttentionHead, num_layers=2)

    def make() -> nn.Module:
        with patch.dict(PUBLISHED_STAGES, stages), patch.multiple(zoo, **heads):
            return CASES[name].make()

    return make


TINY: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 64,
}


def dpt() -> nn.Module:
    neck = {"neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8, "backbone_out_indices": [0, 1, 2, 3]}
    return DPTForDepthEstimation(DPTConfig(**TINY | neck | {"num_hidden_layers": 4}))


def segformer() -> nn.Module:
    widths = {"hidden_sizes": [8, 16, 24, 32], "num_attention_heads": [1, 2, 2, 2], "depths": [1, 1, 1, 1]}
    return SegformerForSemanticSegmentation(SegformerConfig(**widths, decoder_hidden_size=16))


def mask2former() -> nn.Module:
    stages = [f"stage{stage}" for stage in range(1, 5)]
    swin = SwinConfig(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 2], image_size=64, out_features=stages)
    sizes = {"feature_size": 64, "mask_feature_size": 64, "hidden_dim": 64, "num_attention_heads": 2, "num_queries": 6}
    inner = {"encoder_feedforward_dim": 32, "dim_feedforward": 32, "encoder_layers": 1, "decoder_layers": 2}
    return Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=swin, **sizes, **inner))


SWIN = {"depths": (2, 1), "img_size": 64, "window_size": 4, "embed_dim": 32, "num_heads": (1, 2)}
ZOO_ATTENTIONS = {"kmax": 3, "polymax": 3, "mask2former": 4, "eomt": 6, "ocr": 1}
MODELS: dict[str, Case] = {
    "vit_tiny": from_timm("vit_tiny_patch16_224", 1, depth=1, img_size=64),
    "vit_small": from_timm("vit_small_patch16_224", 1, depth=1, img_size=64),
    "deit_tiny": from_timm("deit_tiny_patch16_224", 1, depth=1, img_size=64),
    "swin_tiny": from_timm("swin_tiny_patch4_window7_224", 3, **SWIN),
    "convnext_nano": from_timm("convnext_nano", depths=(1, 1, 1, 1)),
    "pvt_v2_b0": from_timm("pvt_v2_b0", 4, depths=(1, 1, 1, 1)),
    "twins_svt_small": from_timm("twins_svt_small", 5, depths=(1, 1, 1, 2), img_size=64),
    "levit_128s": from_timm("levit_128s", 5, depth=(1, 1, 1), img_size=64),
    "xcit_nano": from_timm("xcit_nano_12_p16_224", 3, depth=1, img_size=64),
    "mobilenetv3_large_100": from_timm("mobilenetv3_large_100", depth_multiplier=0.3),
    "eva02_tiny": from_timm("eva02_tiny_patch14_224", 1, depth=1, img_size=56),
    "HF ViT": Case(lambda: ViTForImageClassification(ViTConfig(**TINY)), 1),
    "HF DINOv2": Case(lambda: Dinov2Model(Dinov2Config(**TINY | {"image_size": 56})), 1, 56),
    "HF SegFormer": Case(segformer, 4),
    "HF DPT": Case(dpt, 4),
    "HF BEiT": Case(lambda: BeitForImageClassification(BeitConfig(**TINY, use_relative_position_bias=True)), 1),
    "HF Mask2Former": Case(mask2former, 6),
    **{f"zoo {name}": Case(CASES[name].make, ZOO_ATTENTIONS.get(name, 0)) for name in zoo.MODELS},
    **{f"zoo {name}": Case(shallow(name), ZOO_ATTENTIONS[name]) for name in ("kmax", "polymax", "mask2former")},
}


def image(side_px: int = 64, batch: int = 1) -> Tensor:
    return torch.rand(batch, 3, side_px, side_px, generator=torch.Generator().manual_seed(0))


def made(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


def layers_between(model: nn.Module, pixels: Tensor) -> dict[str, int]:
    """Elements of the weight of every linear layer and convolution through which a gradient reaches the image.

    Not those that a model runs on its own parameters alone, or to no end.
    """
    seen: dict[str, int] = {}

    def watch(name: str, layer: nn.Module) -> Callable[..., None]:
        def after(_: nn.Module, inputs: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(lambda _: seen.update({name: layer.weight.numel()}))

        return after

    model.requires_grad_(False)
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, LAYERS)]
    handles = [layer.register_forward_hook(watch(name, layer)) for name, layer in layers]
    outputs = torch.utils._pytree.tree_leaves(model(pixels.clone().requires_grad_()))
    torch.stack([each.sum() for each in outputs if isinstance(each, Tensor) and each.requires_grad]).sum().backward()
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", MODELS)
def test_any_model_is_captured_with_its_attention_open(name: str) -> None:
    case = MODELS[name]
    model, pixels = made(case.make), image(case.side_px)
    graph = capture(model, pixels, free=ONE_SIZE)  # asserts parity
    operands = Counter(site.operand for site in graph.sites)
    assert [operands[part] for part in (Operand.QUERY, Operand.KEY)] == [case.attentions] * 2
    extra = 1 if name == "zoo ocr" else 0  # its first softmax is of a convolution
    assert [operands[part] for part in (Operand.ATTENTION, Operand.VALUE)] == [case.attentions + extra] * 2
    weights = {site.module: site.elements for site in graph.sites if site.is_weight and site.op is not Op.MATMUL}
    layers = layers_between(model, pixels)
    assert layers
    assert layers.items() <= weights.items()

    seen: dict[str, Tensor] = {}
    hooks = {site.key: lambda x, key=site.key: seen.setdefault(key, x) for site in graph.sites}
    with torch.no_grad():
        wanted, got = graph.run(pixels), graph.run(pixels, hooks=hooks)
    for ours, theirs in zip(*map(torch.utils._pytree.tree_leaves, (wanted, got)), strict=True):
        assert not isinstance(ours, Tensor) or torch.equal(ours, theirs)
    for site in graph.sites:
        assert tuple(seen[site.key].shape) == site.shape
        low, high = site.made_by.bounds
        assert low <= seen[site.key].min()
        assert seen[site.key].max() <= high
        assert (site.made_by is Source.SOFTMAX) >= (site.operand is Operand.ATTENTION)


@pytest.mark.parametrize(
    ("make", "example_hw", "free"),
    [
        (MODELS["vit_tiny"].make, (64, 64), {Axis.BATCH}),
        (MODELS["convnext_nano"].make, (64, 64), ANY_SIZE),
        (MODELS["HF DINOv2"].make, (56, 84), ANY_SIZE),  # at 56x56 it would take its position embedding as it is
        (partial(segmenter, 5), (49, 64), ANY_SIZE),
    ],
    ids=["vit_tiny", "convnext_nano", "HF DINOv2", "ours"],
)
def test_sizes_stay_free_where_the_model_allows_it(
    make: Callable[[], nn.Module], example_hw: tuple[int, int], free: frozenset[Axis]
) -> None:
    model = made(make)
    graph = capture(model, torch.rand(1, 3, *example_hw))
    assert graph.free == free
    height, width = example_hw
    more = torch.rand(3, 3, *((height + 28, width + 56) if Axis.WIDTH in free else example_hw))
    with torch.no_grad():
        wanted, got = (torch.utils._pytree.tree_leaves(run(more))[0] for run in (model, graph.run))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    if Axis.WIDTH not in free:
        with pytest.raises(InputError, match="wanted shapes like 1x3x64x64 with batch free to change, got 1x3x80x64"):
            graph.run(torch.rand(1, 3, 80, 64))


def masks(rows: int, columns: int) -> dict[str, dict[str, Any]]:
    seen = torch.rand(2, 1, rows, columns, generator=torch.Generator().manual_seed(1)) > 0.5
    seen[0, 0, 2] = False
    bias = torch.randn(rows, columns, dtype=torch.float64)
    return {
        "plain": {},
        "scale": {"scale": 0.3},
        "causal": {"is_causal": True},
        "mask, one row empty": {"attn_mask": seen},
        "bias": {"attn_mask": bias},
        "bias, one row empty": {"attn_mask": bias.masked_fill(~seen, -math.inf), "scale": 1.0},
    }


@pytest.mark.parametrize("form", masks(5, 7))
def test_opened_attention_is_that_of_torch(form: str) -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (
        [
            torch.randn(
                2, 3, length, 4, generator=generator.manual_seed(length), dtype=torch.float64, requires_grad=True
            )
            for length in (5, 7, 7)
        ]
        for _ in range(2)
    )
    options = masks(5, 7)[form]
    got, wanted = opened_attention(*ours, **options), F.scaled_dot_product_attention(*theirs, **options)
    torch.testing.assert_close(got, wanted)
    got.square().sum().backward()
    wanted.square().sum().backward()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def test_grouped_queries_are_refused() -> None:
    class Grouped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x[:, :1], x[:, :1], enable_gqa=True)

    with pytest.raises(InputError, match="got grouped queries"):
        capture(Grouped(), torch.rand(1, 4, 5, 6), free=ONE_SIZE)


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
    first = capture(model, image(8), free=ONE_SIZE).model
    assert capture(model, image(12, batch=2), free=frozenset({Axis.BATCH})).model == first
    with torch.no_grad():
        model[0].weight.add_(1)
    changed = capture(model, image(8), free=ONE_SIZE).model
    assert changed.architecture == first.architecture
    assert changed.values != first.values
    changed.check_same(first, "plan.json")
    others = [net(5, nn.ReLU()), net(4, nn.GELU())]
    hashes = [capture(other, image(8), free=ONE_SIZE).model for other in others]
    assert len({each.architecture for each in (first, *hashes)}) == 3
    with pytest.raises(InputError, match=r"plan\.json: wanted a file made for this model"):
        first.check_same(hashes[0], "plan.json")


class Odd(nn.Module):
    """A convolution and then what a test wants."""

    def __init__(self, then: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Conv2d(3, 3, 1), Then(then)])

    def forward(self, x: Tensor) -> Any:
        for block in self.blocks:
            x = block(x)
        return x


class Then(nn.Module):
    def __init__(self, then: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.then = then

    def forward(self, x: Tensor) -> Any:
        return self.then(x)


@pytest.mark.parametrize(
    ("then", "reason"),
    [
        (lambda x: x if x.max() > 0 else -x, "data-dependent"),
        (lambda x: torch.from_numpy(x.numpy()), "numpy"),
        (lambda x: x[..., : int(x.sum().item())], "data-dependent"),
    ],
)
def test_what_cannot_be_captured_is_named(then: Callable[[Tensor], Any], reason: str) -> None:
    with pytest.raises(InputError, match=rf"the module 'blocks\.1': `return self\.then\(x\)` \(.*{reason}"):
        capture(Odd(then), image(8), free=ONE_SIZE)


def test_an_operator_that_cannot_be_captured_is_named() -> None:
    with pytest.raises(InputError, match=r"'blocks\.1': the operator aten\.equal\.default in `return self"):
        capture(Odd(lambda x: x if torch.equal(x, x.relu()) else -x), image(8), free=ONE_SIZE)


def test_a_model_that_does_not_run_on_the_example_says_so() -> None:
    with pytest.raises(InputError, match=r"example: wanted inputs that the model runs on, got 1x4x8x8 \(.*channels"):
        capture(Odd(torch.relu), torch.rand(1, 4, 8, 8))


def test_an_output_that_differs_is_named() -> None:
    with pytest.raises(InputError, match=r"another output\['b'\]: wanted a difference of at most 1e-05"):
        capture(Odd(lambda x: {"a": x, "b": x + torch.rand_like(x)}), image(8), free=ONE_SIZE)
    with pytest.raises(
        InputError, match=r"got NaN in output, which arises in the module 'blocks\.1' \(aten\.sqrt\.default\); take"
    ):
        capture(Odd(lambda x: x.sub(9).sqrt()), image(8), free=ONE_SIZE)


def test_a_damaged_weight_is_named() -> None:
    model = Odd(torch.relu)
    with torch.no_grad():
        model.blocks[0].weight[1, 0] = math.nan
    with pytest.raises(InputError, match=r"got NaN or infinity in 'blocks\.0\.weight'"):
        capture(model, image(8))
