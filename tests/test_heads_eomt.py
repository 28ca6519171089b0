"""EoMT against transformers, its schedule against the authors' settings, by hand, and through the contract of heads."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from denselab import _vision as _vision
from denselab.backbones.plain_tokens import PLACELESS, PlainTokens, split_transformer
from denselab.errors import InputError
from denselab.heads.eomt import EomtHead, annealed
from denselab.model import DensePredictor
from denselab.pixel_decoders.pass_through import PassThrough
from denselab.types import Backbone, Head, MaskNorm, ValueKind
from head_checks import check_batch, check_gradients, check_shapes

# isort: split
import timm
from transformers import EomtConfig, EomtForUniversalSegmentation

CLASSES = 5
NARROW = {"embed_dim": 32, "depth": 4, "num_heads": 2, "img_size": 64}


def eomt(name: str = "vit_tiny_patch16_224", num_last: int = 2, queries: int = 6, **options: object) -> DensePredictor:
    backbone, blocks, norm = split_transformer(name, num_last=num_last, options=NARROW | options)
    head = EomtHead(backbone.features, blocks, norm, CLASSES, queries, backbone.rope)
    return DensePredictor(backbone, PassThrough(backbone.features), head)


@pytest.fixture(scope="module")
def model() -> DensePredictor:
    torch.manual_seed(0)
    return eomt(reg_tokens=2)


def test_spec(model: DensePredictor) -> None:
    assert isinstance(model.backbone, Backbone)
    assert isinstance(model.head, Head)
    spec = model.spec
    assert (spec.num_queries, spec.value_dim, spec.mask_stride) == (6, CLASSES + 1, 4)
    assert (spec.mask_norm, spec.value_kind) == (MaskNorm.SIGMOID, ValueKind.CLASS_LOGITS)
    assert len(spec.aux) == 2


def test_shapes(model: DensePredictor) -> None:
    check_shapes(model)


def test_a_batch_gives_what_its_images_give(model: DensePredictor) -> None:
    check_batch(model)


@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
def test_every_parameter_gets_a_finite_gradient(model: DensePredictor, progress: float) -> None:
    model.head.set_progress(progress)
    check_gradients(model)


# --- any plain transformer ---


@pytest.mark.parametrize(
    ("name", "options", "prefix", "mask_stride"),
    [
        ("deit_tiny_patch16_224", {}, 1, 4),
        ("deit_tiny_distilled_patch16_224", {}, 2, 4),
        ("vit_small_patch14_reg4_dinov2", {"img_size": 56}, 5, 4),
        ("vit_medium_patch16_gap_240", {}, 0, 4),
        ("vit_base_patch8_224", {}, 1, 4),
        ("vit_tiny_patch16_224", {"patch_size": 4}, 1, 2),
    ],
)
@torch.no_grad()
def test_any_plain_transformer(name: str, options: dict[str, int], prefix: int, mask_stride: int) -> None:
    model = eomt(name, **options).eval()
    assert model.spec.mask_stride == mask_stride
    patches, *rest = model.backbone.features
    assert [f.stride for f in rest] == [PLACELESS] * (prefix > 0)
    maps = model.backbone(torch.rand(1, 3, 2 * patches.stride, 3 * patches.stride))
    assert [m.shape for m in maps] == [(1, 32, 2, 3), (1, 32, prefix, 1)][: 1 + (prefix > 0)]
    assert model(torch.rand(1, 3, 33, 47)).mask_logits.isfinite().all()


@pytest.mark.parametrize("options", [{"reg_tokens": 2}, {"class_token": False, "global_pool": "avg"}])
@torch.no_grad()
def test_the_parts_are_the_whole(options: dict[str, object]) -> None:
    """Tokens through the last blocks and the norm are what timm computes in one go."""
    torch.manual_seed(1)
    backbone, blocks, norm = split_transformer("vit_tiny_patch16_224", num_last=3, options=NARROW | options)
    backbone.eval()
    assert isinstance(backbone, PlainTokens)
    whole = timm.create_model("vit_tiny_patch16_224", num_classes=0, **NARROW, **options).eval()
    own = {f"blocks.{1 + i}.{k}": v for i, block in enumerate(blocks) for k, v in block.state_dict().items()}
    own |= {f"{'norm' if 'reg_tokens' in options else 'fc_norm'}.{k}": v for k, v in norm.state_dict().items()}
    whole.load_state_dict(backbone.net.state_dict() | own)
    pixels = torch.rand(1, 3, 64, 64)
    tokens = torch.cat([m.flatten(2).transpose(1, 2) for m in backbone(pixels)[::-1]], dim=1)
    for block in blocks:
        tokens = block(tokens)
    torch.testing.assert_close(norm(tokens), whole.fc_norm(whole.forward_features(pixels)))


# --- rotary positions ---

ROTARY = ("vit_small_patch16_dinov3", "eva02_tiny_patch14_224")


@pytest.mark.parametrize("name", ROTARY)
@torch.no_grad()
def test_rotary_positions_are_the_patches_alone(name: str) -> None:
    """Tokens that see no query are what timm computes in one go, at a size of no square; the queries see all."""
    torch.manual_seed(3)
    model = eomt(name, num_last=2).eval()
    whole = timm.create_model(name, num_classes=0, dynamic_img_size=True, **NARROW).eval()
    own = {f"blocks.{2 + i}.{k}": v for i, block in enumerate(model.head.blocks) for k, v in block.state_dict().items()}
    norm = "norm" if hasattr(whole.norm, "weight") else "fc_norm"
    own |= {f"{norm}.{k}": v for k, v in model.head.norm.state_dict().items()}
    whole.load_state_dict(model.backbone.net.state_dict() | own)
    stride = model.backbone.size_multiple
    patch_px = model.backbone.patch_px
    pixels = torch.rand(1, 3, 2 * stride, 3 * stride)
    maps = model.backbone(pixels)
    queries = model.head.queries[None]
    tokens = torch.cat([queries, *(m.flatten(2).transpose(1, 2) for m in maps[::-1])], dim=1)
    count = queries.shape[1]
    blind = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool)
    blind[count:, :count] = False
    for block in model.head.blocks:
        tokens = block(tokens, rope=model.backbone.rope.get_embed((2, 3)), attn_mask=blind[None, None])
    if patch_px != stride:
        pixels = F.interpolate(pixels, size=(2 * patch_px, 3 * patch_px), mode="bilinear", align_corners=False)
    torch.testing.assert_close(model.head.norm(tokens)[:, count:], whole.fc_norm(whole.forward_features(pixels)))


def test_rotary_shapes_gradients_and_batches() -> None:
    torch.manual_seed(0)
    model = eomt(ROTARY[0])
    check_shapes(model)
    check_batch(model)
    model.head.set_progress(0.0)
    check_gradients(model)


@torch.no_grad()
def test_rotary_positions_trace_at_one_size() -> None:
    torch.manual_seed(0)
    model, pixels = eomt(ROTARY[0]).eval(), torch.rand(1, 3, 32, 48)
    traced = torch.export.export(model, (pixels,), strict=False).module()
    pixels = torch.rand(1, 3, 32, 48)
    torch.testing.assert_close(traced(pixels).mask_logits, model(pixels).mask_logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "num_last", "message"),
    [
        ("resnet18", 4, "wanted a plain vision transformer of timm .*'resnet18'"),
        ("vit_tiny_patch99", 4, "wanted a plain vision transformer of timm .*'vit_tiny_patch99'"),
        ("vit_small_patch16_rope_mixed_224", 4, "whose rotary positions differ from block to block"),
        ("swin_tiny_patch4_window7_224", 4, "wanted a plain vision transformer"),
        ("vit_tiny_patch16_224", 4, "has 4 blocks; wanted 1 to 3, got 4"),
    ],
)
def test_what_cannot_be_split_is_refused(name: str, num_last: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        split_transformer(name, num_last=num_last, options=NARROW if name == "vit_tiny_patch16_224" else None)


# --- the model of transformers ---


def copy_weights(source: EomtForUniversalSegmentation, target: DensePredictor) -> None:
    """Weights of transformers' EoMT under our names."""
    weights = source.state_dict()
    named: dict[str, Tensor] = {}

    def take(theirs: str, ours: str, parts: tuple[str, ...] = (".weight", ".bias")) -> None:
        named.update({ours + part: weights[theirs + part] for part in parts if theirs + part in weights})

    take("embeddings.patch_embeddings.projection", "backbone.net.patch_embed.proj")
    named["backbone.net.cls_token"] = weights["embeddings.cls_token"]
    named["backbone.net.reg_token"] = weights["embeddings.register_tokens"]
    named["backbone.net.pos_embed"] = weights["embeddings.position_embeddings.weight"][None]
    named["head.queries"] = weights["query.weight"]
    take("layernorm", "head.norm")
    take("class_predictor", "head.classify")
    for i in range(3):
        take(f"mask_head.fc{i + 1}", f"head.mask_kernel.{2 * i}")
    for i in range(2):
        for theirs, ours in (("conv1", 0), ("conv2", 2), ("layernorm2d", 3)):
            take(f"upscale_block.block.{i}.{theirs}", f"head.upscale.{i}.{ours}")
    first = len(target.backbone.net.blocks)
    for i in range(source.config.num_hidden_layers):
        theirs, ours = f"layers.{i}", f"backbone.net.blocks.{i}" if i < first else f"head.blocks.{i - first}"
        for kind in ("weight", "bias"):
            qkv = [weights[f"{theirs}.attention.{name}_proj.{kind}"] for name in "qkv"]
            named[f"{ours}.attn.qkv.{kind}"] = torch.cat(qkv)
        take(f"{theirs}.attention.out_proj", f"{ours}.attn.proj")
        for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
            take(f"{theirs}.{name}", f"{ours}.{name}")
        for j in (1, 2):
            named[f"{ours}.ls{j}.gamma"] = weights[f"{theirs}.layer_scale{j}.lambda1"]
    target.load_state_dict(named)


@pytest.fixture(scope="module")
def pair() -> tuple[EomtForUniversalSegmentation, DensePredictor]:
    torch.manual_seed(2)
    config = EomtConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=64,
        num_blocks=2,
        num_queries=6,
        num_register_tokens=2,
        num_labels=CLASSES,
        layerscale_value=0.5,
    )
    theirs = EomtForUniversalSegmentation(config)
    ours = eomt(reg_tokens=2, no_embed_class=True, init_values=0.5)
    copy_weights(theirs, ours)
    return theirs, ours


@torch.no_grad()
def test_equals_transformers(pair: tuple[EomtForUniversalSegmentation, DensePredictor]) -> None:
    theirs, ours = pair[0].eval(), pair[1].eval()
    theirs.attn_mask_probs.zero_()
    pixels = torch.rand(2, 3, 64, 64)
    wanted = theirs(ours.normalize(pixels))
    got = ours(pixels)
    torch.testing.assert_close(got.mask_logits, wanted.masks_queries_logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got.values, wanted.class_queries_logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_masked_attention_equals_transformers(pair: tuple[EomtForUniversalSegmentation, DensePredictor]) -> None:
    """In training, with every query of every block masked."""
    theirs, ours = pair[0].train(), pair[1].train()
    theirs.attn_mask_probs.fill_(1)
    pixels = torch.rand(2, 3, 64, 64)
    wanted = theirs(ours.normalize(pixels))
    unmasked = ours(pixels)
    ours.head.set_progress(0.0)
    got = ours(pixels)
    ours.head.set_progress(1.0)
    torch.testing.assert_close(got.mask_logits, wanted.masks_queries_logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got.values, wanted.class_queries_logits, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(got.mask_logits, unmasked.mask_logits, atol=1e-3)
    torch.testing.assert_close(got.aux[0].mask_logits, unmasked.aux[0].mask_logits)  # no block before it
    torch.testing.assert_close(unmasked.mask_logits, ours.eval()(pixels).mask_logits)


# --- the schedule ---


def test_turns_are_those_of_the_authors() -> None:
    """Steps where annealing begins and ends, of 88,692 steps and four blocks, and of 19,902 steps and three."""
    for steps, begin, end in (
        (88_692, (14_782, 29_564, 44_346, 59_128), (29_564, 44_346, 59_128, 73_910)),
        (19_902, (3_317, 8_292, 13_268), (6_634, 11_609, 16_585)),
    ):
        for block in range(len(begin)):
            assert annealed((begin[block] - 1) / steps, block, len(begin)) == 1
            assert annealed((begin[block] + end[block]) / 2 / steps, block, len(begin)) == pytest.approx(0.5**0.9, 1e-3)
            assert annealed((end[block] + 1) / steps, block, len(begin)) == 0


def test_schedule_of_one_block() -> None:
    assert [annealed(progress, 0, 1) for progress in (0.0, 1 / 3, 1.0)] == [1, pytest.approx(0, abs=1e-9), 0]
    assert annealed(0.25, 0, 1) == pytest.approx(0.5**0.9)


def test_progress_sets_every_block(model: DensePredictor) -> None:
    model.head.set_progress(0.0)
    assert model.head.mask_probs.tolist() == [1, 1]
    model.head.set_progress(0.5)
    assert model.head.mask_probs.tolist() == [0, 1]
    assert "head.mask_probs" not in model.state_dict()
