"""Any eager vision model as one graph: parity with the model, opened attention, and sizes that stay free."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
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

from compress_models import images, segmenter
from denselab.compress.graph import ANY_SIZE, Axis, capture
from denselab.compress.open_attention import opened_attention
from denselab.compress.sites import Op, Operand, Source
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
    model, pixels = made(case.make), images(1, side_px=case.side_px)
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
