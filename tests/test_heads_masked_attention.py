"""Mask2Former's decoder and its FPN pixel decoder against transformers, by hand, and through the contract of heads."""

import pytest
import torch
from torch import Tensor, nn

from denselab import _vision as _vision
from denselab.heads.masked_attention import MaskedAttentionHead, sine_positions, where_masks_are
from denselab.model import DensePredictor
from denselab.pixel_decoders.multi_scale_fpn import MultiScaleFpnDecoder
from denselab.types import FeatureSpec, Head, MaskNorm, PixelDecoder, ValueKind

# isort: split
from transformers import Mask2FormerConfig
from transformers.models.mask2former import modeling_mask2former as reference
from transformers.models.maskformer.modeling_maskformer import MaskFormerPixelDecoder

from head_checks import TinyPyramid, check_batch, check_gradients, check_shapes

CLASSES = 5
INPUTS = (FeatureSpec(24, 4), FeatureSpec(16, 8), FeatureSpec(16, 16), FeatureSpec(16, 32))


def mask2former(backbone: TinyPyramid, num_layers: int) -> DensePredictor:
    torch.manual_seed(0)
    decoder = MultiScaleFpnDecoder(backbone.features, width=16, mask_width=24)
    head = MaskedAttentionHead(decoder.features, CLASSES, 7, num_layers, width=32, num_heads=4, feed_forward=48)
    return DensePredictor(backbone, decoder, head)


@pytest.fixture(scope="module")
def model() -> DensePredictor:
    return mask2former(TinyPyramid(), num_layers=3)


def test_spec(model: DensePredictor) -> None:
    assert isinstance(model.head, Head)
    spec = model.spec
    assert (spec.num_queries, spec.value_dim, spec.mask_stride) == (7, CLASSES + 1, 4)
    assert (spec.mask_norm, spec.value_kind) == (MaskNorm.SIGMOID, ValueKind.CLASS_LOGITS)
    assert len(spec.aux) == 3


def test_shapes(model: DensePredictor) -> None:
    check_shapes(model)


def test_a_batch_gives_what_its_images_give(model: DensePredictor) -> None:
    check_batch(model)


def test_every_parameter_gets_a_finite_gradient(model: DensePredictor) -> None:
    check_gradients(model)


def test_published_size() -> None:
    """Nine layers of width 256, 8 heads and 2048 in the middle: 4 * 256 * 256 per attention, and so on (section 4)."""
    inputs = (FeatureSpec(256, 4), FeatureSpec(256, 8), FeatureSpec(256, 16), FeatureSpec(256, 32))
    head = MaskedAttentionHead(inputs, 133)

    def linear(n: int, m: int) -> int:
        return (n + 1) * m

    layer = 2 * (4 * linear(256, 256) + 512) + linear(256, 2048) + linear(2048, 256) + 512
    rest = 512 + linear(256, 134) + 3 * linear(256, 256) + (3 + 100 + 100) * 256
    assert sum(p.numel() for p in head.parameters()) == 9 * layer + rest


# --- the decoder of transformers ---


def copy_weights(source: nn.Module, classifier: nn.Linear, target: MaskedAttentionHead) -> None:
    """Weights of Mask2FormerTransformerModule and of a class predictor, under our names."""
    weights = source.state_dict()
    named: dict[str, Tensor] = {
        "query_features": weights.pop("queries_features.weight"),
        "query_positions": weights.pop("queries_embedder.weight"),
        "level_embeddings": weights.pop("level_embed.weight").flip(0),  # theirs coarsest first
        "classify.weight": classifier.weight,
        "classify.bias": classifier.bias,
    }
    parts = {
        "decoder.layernorm": "norm",
        "decoder.mask_predictor.mask_embedder.0.0": "mask_kernel.0",
        "decoder.mask_predictor.mask_embedder.1.0": "mask_kernel.2",
        "decoder.mask_predictor.mask_embedder.2.0": "mask_kernel.4",
    }
    for level in range(3):
        parts[f"input_projections.{level}"] = f"projections.{2 - level}"
    for i in range(len(target.layers)):
        theirs, ours = f"decoder.layers.{i}", f"layers.{i}"
        for kind in ("weight", "bias"):
            fused = weights.pop(f"{theirs}.cross_attn.in_proj_{kind}").chunk(3)
            for part, name in zip(fused, ("query", "key", "value"), strict=True):
                named[f"{ours}.cross_attention.{name}.{kind}"] = part
        parts |= {
            f"{theirs}.cross_attn.out_proj": f"{ours}.cross_attention.project",
            f"{theirs}.cross_attn_layer_norm": f"{ours}.cross_attention.norm",
            f"{theirs}.self_attn.q_proj": f"{ours}.self_attention.query",
            f"{theirs}.self_attn.k_proj": f"{ours}.self_attention.key",
            f"{theirs}.self_attn.v_proj": f"{ours}.self_attention.value",
            f"{theirs}.self_attn.out_proj": f"{ours}.self_attention.project",
            f"{theirs}.self_attn_layer_norm": f"{ours}.self_attention.norm",
            f"{theirs}.fc1": f"{ours}.expand",
            f"{theirs}.fc2": f"{ours}.contract",
            f"{theirs}.final_layer_norm": f"{ours}.norm",
        }
    for name, tensor in weights.items():
        part, _, kind = name.rpartition(".")
        named[f"{parts[part]}.{kind}"] = tensor
    target.load_state_dict(named)


@pytest.mark.parametrize("size_px", [(96, 160), (32, 32)])
@torch.no_grad()
def test_equals_transformers_after_every_layer(size_px: tuple[int, int]) -> None:
    torch.manual_seed(3)
    config = Mask2FormerConfig(
        hidden_dim=32,
        feature_size=16,
        mask_feature_size=24,
        num_queries=9,
        num_attention_heads=4,
        dim_feedforward=40,
        decoder_layers=8,
        dropout=0.0,
    )
    theirs = reference.Mask2FormerTransformerModule(in_features=16, config=config).train()
    classifier = nn.Linear(32, CLASSES + 1)
    ours = MaskedAttentionHead(INPUTS, CLASSES, 9, num_layers=7, width=32, num_heads=4, feed_forward=40).train()
    copy_weights(theirs, classifier, ours)
    maps = tuple(torch.randn(2, f.channels, size_px[0] // f.stride, size_px[1] // f.stride) for f in INPUTS)
    wanted = theirs(list(maps[:0:-1]), maps[0])
    got = ours(maps)
    predictions = (*got.aux, got)
    assert len(predictions) == len(wanted.masks_queries_logits) == 8
    for each, masks, hidden in zip(
        predictions, wanted.masks_queries_logits, wanted.intermediate_hidden_states, strict=True
    ):
        torch.testing.assert_close(each.mask_logits, masks, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(each.values, classifier(hidden.transpose(0, 1)), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.eval()(maps).mask_logits, got.mask_logits)


def test_positions_equal_transformers() -> None:
    map_ = torch.zeros(1, 3, 4, 7)
    wanted = reference.Mask2FormerSinePositionEmbedding(8, normalize=True)(map_.shape, map_.device, map_.dtype)
    torch.testing.assert_close(sine_positions(map_, 16), wanted.flatten(2).transpose(1, 2))


# --- by hand, and degenerate ---


def test_positions_by_hand() -> None:
    """The last cell lies at 2 pi; of four channels the first pair says down, the second right."""
    (two,) = sine_positions(torch.zeros(1, 1, 1, 2), 4)
    torch.testing.assert_close(two, torch.tensor([[0.0, 1, 0, -1], [0, 1, 0, 1]]), atol=1e-5, rtol=0)


def testwhere_masks_are_by_hand() -> None:
    """Mask features 1, 0, -1: a kernel of 2 claims the first two cells, of 0 all; -1 where all are 1 claims none."""
    features = torch.tensor([1.0, 0, -1]).view(1, 1, 1, 3)
    kernels = torch.tensor([[[2.0], [0.0]]])
    assert where_masks_are(kernels, features).tolist() == [[[True, True, False], [True, True, True]]]
    assert where_masks_are(-torch.ones(1, 1, 1), torch.ones(1, 1, 1, 3)).tolist() == [[[True, True, True]]]


@torch.no_grad()
def test_one_map_is_both() -> None:
    head = MaskedAttentionHead((FeatureSpec(8, 16),), 2, 3, num_layers=2, width=16, num_heads=2, feed_forward=8)
    output = head.eval()((torch.randn(1, 8, 3, 5),))
    assert output.mask_logits.shape == (1, 3, 3, 5)


# --- the pixel decoder ---


@torch.no_grad()
def test_pixel_decoder_equals_transformers() -> None:
    torch.manual_seed(4)
    inputs = tuple(FeatureSpec(8 * 2**i, 4 * 2**i) for i in range(4))
    ours = MultiScaleFpnDecoder(inputs, mask_width=20)
    theirs = MaskFormerPixelDecoder(64, [8, 16, 32], mask_feature_size=20)
    named = {"fpn.stem": "coarsest", "mask_projection": "mask_features"}
    for i in range(3):
        named |= {f"fpn.layers.{i}.proj": f"laterals.{2 - i}", f"fpn.layers.{i}.block": f"outputs.{2 - i}"}
    for norm in (m for m in theirs.modules() if isinstance(m, nn.GroupNorm)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
    weights: dict[str, Tensor] = {}
    for name, tensor in theirs.state_dict().items():
        part = next(part for part in named if name.startswith(part + "."))
        weights[named[part] + name[len(part) :]] = tensor
    ours.load_state_dict(weights)
    maps = tuple(torch.randn(2, f.channels, 96 // f.stride, 64 // f.stride) for f in inputs)
    wanted = theirs(list(maps), output_hidden_states=True)
    mask_features, *scales = ours(maps)
    assert isinstance(ours, PixelDecoder)
    assert [(f.channels, f.stride) for f in ours.features] == [(20, 4), (256, 8), (256, 16), (256, 32)]
    torch.testing.assert_close(mask_features, wanted.last_hidden_state)
    for got, expected in zip(scales[:2], wanted.hidden_states[1::-1], strict=True):
        torch.testing.assert_close(got, expected)
    torch.testing.assert_close(scales[2], theirs.fpn.stem(maps[3]))


@torch.no_grad()
def test_pixel_decoder_of_one_map() -> None:
    decoder = MultiScaleFpnDecoder((FeatureSpec(6, 16),), width=5, mask_width=4)
    (mask_features,) = decoder((torch.randn(1, 6, 3, 2),))
    assert mask_features.shape == (1, 4, 3, 2)
