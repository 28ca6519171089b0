"""kMaX-DeepLab against the published implementation (golden fixtures), values worked by hand, and its contract."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from denselab.errors import InputError
from denselab.heads.deeplab_semantic import DeepLabSemantic
from denselab.heads.kmax import KMaXHead, kmeans_update
from denselab.hub.kmax_weights import head_weights, pixel_decoder_weights, semantic_weights
from denselab.layers import DropPath, FrozenBatchNorm, Norm, norm_layer
from denselab.pixel_decoders.axial_attention import AxialAttention, RelativePositions
from denselab.pixel_decoders.kmax import KMaXPixelDecoder, Mixing, Stage
from denselab.types import FeatureSpec, Head, HeadSpec, MaskNorm, PixelDecoder, QueryOutput, ValueKind

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"
TINY = (Stage(16, 1, Mixing.AXIAL), Stage(8, 1, Mixing.BOTTLENECK), Stage(8, 1, Mixing.BOTTLENECK))
BACKBONE = (FeatureSpec(6, 4), FeatureSpec(8, 8), FeatureSpec(10, 16), FeatureSpec(12, 32))
MODES = ("eval", "train")


pytestmark = pytest.mark.usefixtures("one_thread")


class Golden:
    """One fixture file: its settings, its arrays as tensors, and the published state."""

    def __init__(self, name: str) -> None:
        path = GOLDEN / name
        if not path.is_file():
            pytest.skip(f"no golden fixture at {path}")
        self.arrays = np.load(path, allow_pickle=False)
        self.cfg: dict[str, Any] = json.loads(str(self.arrays["cfg"]))
        self.published = self.below("sd.")

    def __getitem__(self, key: str) -> Tensor:
        value = torch.from_numpy(self.arrays[key])
        return value.float() if value.dtype == torch.float16 else value

    def below(self, prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): self[key] for key in self.arrays.files if key.startswith(prefix)}


@pytest.fixture(scope="module")
def decoder_golden() -> Golden:
    return Golden("kmax_pixel_decoder.npz")


@pytest.fixture(scope="module")
def head_golden() -> Golden:
    return Golden("kmax_decoder.npz")


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, atol=1e-3, rtol=0)


def assert_statistics(model: nn.Module, golden: Golden, case: str, fitted: Callable[..., dict[str, Tensor]]) -> None:
    """The running statistics that are stored after one training step are those of the model now."""
    stored = golden.below(f"after_train.{case}.")
    nowhere = {name: torch.full_like(value, math.nan) for name, value in stored.items()}
    marked = fitted(golden.published | nowhere, model, prefix="")
    wanted = fitted(golden.published | stored, model, prefix="")
    names = [name for name, value in marked.items() if value.isnan().any()]
    assert len(names) == len(stored) > 0
    for name in names:
        torch.testing.assert_close(model.state_dict()[name], wanted[name], atol=1e-3, rtol=1e-4)


# --- The published implementation ---


def golden_decoder(golden: Golden, norm: Norm = Norm.BATCH) -> KMaXPixelDecoder:
    cfg = golden.cfg
    inputs = tuple(FeatureSpec(channels, 4 * 2**i) for i, channels in enumerate(cfg["back"]))
    kinds = {"axial": Mixing.AXIAL, "bottleneck": Mixing.BOTTLENECK}
    plan = zip(cfg["dec_channels"], cfg["dec_layers"], cfg["layer_types"], strict=True)
    stages = tuple(Stage(width, depth, kinds[kind]) for width, depth, kind in plan)
    decoder = KMaXPixelDecoder(inputs, stages, norm=norm, align_corners=None)
    state = pixel_decoder_weights(golden.published, decoder, prefix="")
    decoder.load_state_dict(state)
    return decoder


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", ["odd", "even"])
@torch.no_grad()
def test_pixel_decoder_equals_the_published_one(decoder_golden: Golden, case: str, mode: str) -> None:
    decoder = golden_decoder(decoder_golden).train(mode == "train")
    maps = decoder(tuple(decoder_golden[f"in.{case}.res{i}"] for i in (2, 3, 4, 5)))
    for got, name in zip(maps, ("panoptic_os4", "ms_os8", "ms_os16", "ms_os32"), strict=True):
        close(got, decoder_golden[f"out.{case}.{mode}.{name}"])
    if mode == "train":
        assert_statistics(decoder, decoder_golden, case, pixel_decoder_weights)


def head_inputs(golden: Golden) -> tuple[FeatureSpec, ...]:
    return tuple(FeatureSpec(channels, 4 * 2**i) for i, channels in enumerate(reversed(golden.cfg["in_ch"])))


def golden_head(golden: Golden) -> KMaXHead:
    cfg = golden.cfg
    head = KMaXHead(head_inputs(golden), cfg["ncls"], cfg["nq"], tuple(cfg["dec_layers"]), semantic_width=None)
    head.load_state_dict(head_weights(golden.published, head, prefix=""))
    return head


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", ["odd", "even", "mixed"])
@torch.no_grad()
def test_head_equals_the_published_one(head_golden: Golden, case: str, mode: str) -> None:
    head = golden_head(head_golden).train(mode == "train")
    seen: list[tuple[Tensor, QueryOutput]] = []
    for layer in head.layers:
        layer.register_forward_hook(lambda _module, _args, result: seen.append(result))
    output = head(tuple(head_golden[f"in.{case}.{name}"] for name in ("pan4", "x8", "x16", "x32")))

    def wanted(name: str) -> Tensor:
        return head_golden[f"out.{case}.{mode}.{name}"]

    close(output.mask_logits, wanted("mask_logits"))
    close(output.values, wanted("class_logits"))
    assert output.pixel_embed is not None
    close(output.pixel_embed[:, ::8], wanted("pixel_feature_ch8"))
    size_hw = output.mask_logits.shape[-2:]
    for index, (queries, prediction) in enumerate(seen):
        native = prediction.mask_logits
        close(native, wanted(f"layer{index}.mask_logits_native"))
        assert torch.equal(native.flatten(2).argmax(dim=1), wanted(f"layer{index}.assignment").long())
        close(queries[:, ::8], wanted(f"layer{index}.query_out_ch8"))
        close(prediction.values, wanted(f"aux{index}.class_logits"))
        resized = F.interpolate(native, size_hw, mode="bilinear", align_corners=size_hw[0] % 2 == 1)
        close(resized, wanted(f"aux{index}.mask_logits"))
    if mode == "train":
        assert [a.mask_logits.data_ptr() for a in output.aux] == [p.mask_logits.data_ptr() for _, p in seen]
        assert_statistics(head, head_golden, case, head_weights)


@pytest.mark.parametrize("case", ["odd", "even", "mixed"])
@torch.no_grad()
def test_semantic_decoder_equals_the_published_one(head_golden: Golden, case: str) -> None:
    cfg = head_golden.cfg
    inputs = tuple(FeatureSpec(cfg["back"][level], 4 * 2**level) for level in (0, 1, 3))
    decoder = DeepLabSemantic(inputs, cfg["ncls"] + 1, dropout=0, align_corners=None)
    prefix = "_auxiliary_semantic_predictor."
    decoder.load_state_dict(semantic_weights(head_golden.published, decoder, prefix))
    got = decoder(tuple(head_golden[f"in.{case}.{name}"] for name in ("res2", "res3", "res5")))
    close(got, head_golden[f"out.{case}.train.aux_semantic_pred"])


# --- Published weights under our names ---


def test_a_whole_checkpoint_fits(decoder_golden: Golden, head_golden: Golden) -> None:
    """The three parts have their prefixes there; the backbone is left aside."""
    pixel, head = "sem_seg_head.pixel_decoder.", "sem_seg_head.predictor."
    checkpoint = {pixel + name: value for name, value in decoder_golden.published.items()}
    checkpoint |= {head + name: value for name, value in head_golden.published.items()}
    checkpoint["backbone.stem.conv1.weight"] = torch.zeros(1)
    decoder = golden_decoder(decoder_golden)
    for name, value in pixel_decoder_weights(checkpoint, decoder).items():
        assert torch.equal(value, decoder.state_dict()[name])
    with_semantic = KMaXHead(head_inputs(head_golden), 5, 7, (1, 1, 1), semantic_width=16)
    with_semantic.load_state_dict(head_weights(checkpoint, with_semantic))
    assert torch.equal(with_semantic.centres, head_golden.published["_cluster_centers.weight"])


def test_weights_that_do_not_fit_are_named(decoder_golden: Golden, head_golden: Golden) -> None:
    head = KMaXHead(head_inputs(head_golden), 8, 7, (1, 1, 1), semantic_width=None)
    text = (
        r"_kmax_transformer_layers\.0\._predcitor\._transformer_class_head\.conv\.weight is \[6, 256, 1\], .* \[9, 256"
    )
    with pytest.raises(InputError, match=text):
        head_weights(head_golden.published, head, prefix="")
    decoder = golden_decoder(decoder_golden)
    short = {name: value for name, value in decoder_golden.published.items() if name != "_in_norms.2.bias"}
    with pytest.raises(InputError, match=r"input_norms\.2\.bias of the model is not in the weights; build"):
        pixel_decoder_weights(short, decoder, prefix="")
    longer = decoder_golden.published | {"_in_norms.9.bias": torch.zeros(1)}
    with pytest.raises(InputError, match=r"below '' .* but _in_norms\.9\.bias is not in the model; build"):
        pixel_decoder_weights(longer, decoder, prefix="")
    with pytest.raises(InputError, match=r"below 'sem_seg_head\.pixel_decoder\.' .*; and \d+ more; build"):
        pixel_decoder_weights(decoder_golden.published, decoder)


@torch.no_grad()
def test_frozen_norms_take_the_same_weights(decoder_golden: Golden) -> None:
    decoder = golden_decoder(decoder_golden, Norm.FROZEN).train()
    maps = decoder(tuple(decoder_golden[f"in.odd.res{i}"] for i in (2, 3, 4, 5)))
    close(maps[0], decoder_golden["out.odd.eval.panoptic_os4"])


# --- Values worked by hand ---


def test_kmeans_update_by_hand() -> None:
    """Two queries, four pixels: query 0 has the higher logit at pixels 0 and 3, query 1 at pixels 1 and 2."""
    mask_logits = torch.tensor([[[[2.0, -1.0], [0.0, 5.0]], [[1.0, 0.0], [0.5, -5.0]]]], requires_grad=True)
    values = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]], [[10.0, 20.0], [30.0, 40.0]]]], requires_grad=True)
    update = kmeans_update(mask_logits, values)
    assert update.tolist() == [[[1 + 4, 2 + 3], [10 + 40, 20 + 30]]]
    (update * torch.tensor([1.0, 100.0])).sum().backward()
    assert values.grad is not None
    assert values.grad[0, 0].tolist() == [[1, 100], [100, 1]]
    assert mask_logits.grad is None


def test_a_query_without_pixels_gets_nothing() -> None:
    mask_logits = torch.tensor([0.0, 3.0, -1.0])[None, :, None, None].expand(1, 3, 2, 5)
    update = kmeans_update(mask_logits, torch.ones(1, 4, 2, 5))
    assert update.tolist() == [[[0, 10, 0]] * 4]


def test_relative_positions_by_hand() -> None:
    positions = RelativePositions(1)
    with torch.no_grad():
        positions.weight.copy_(torch.arange(-254.0, 255.0)[:, None])
    assert positions(torch.zeros(3, 1))[..., 0].tolist() == [[0, 1, 2], [-1, 0, 1], [-2, -1, 0]]
    far = positions(torch.zeros(300, 1))[..., 0]
    assert (far.min(), far.max(), far[0, 254], far[299, 299]) == (-254, 254, 254, 0)


@torch.no_grad()
def test_attention_keeps_columns_apart_and_sees_whole_ones() -> None:
    torch.manual_seed(0)
    attention = AxialAttention(4, 8, 16, 2, Norm.FROZEN)
    x = torch.randn(1, 4, 6, 5)
    other = x.clone()
    other[0, :, 1, 2] += 1
    changed = (attention(x) != attention(other))[0].any(dim=0)
    assert changed.any(dim=0).tolist() == [False, False, True, False, False]
    assert changed[:, 2].all()


@torch.no_grad()
def test_attention_by_hand() -> None:
    """One head without position terms is softmax(q k) v along each column."""
    torch.manual_seed(0)
    attention = AxialAttention(3, 2, 4, 1, Norm.FROZEN)
    for table in (attention.query_positions, attention.key_positions, attention.value_positions):
        table.weight.zero_()
    x = torch.randn(1, 3, 5, 2)
    q, k, v = attention.qkv(x).split((2, 2, 4), dim=1)
    scale = (1 + 1e-3) ** -0.5
    for column in range(2):
        logits = q[0, :, :, column].T @ k[0, :, :, column] * scale
        wanted = v[0, :, :, column] @ logits.softmax(dim=1).T * scale
        torch.testing.assert_close(attention(x)[0, :, :, column], wanted)


def test_no_object_begins_at_nine_tenths() -> None:
    """exp(log(K * 0.9 / 0.1)) against K times exp(0): 9 K of 10 K."""
    output = tiny_head(Norm.GROUP)(maps_of(HEAD_INPUTS, 32, 64))
    assert output.values.softmax(dim=2)[..., -1].mean().item() == pytest.approx(0.9, abs=0.01)
    assert output.pixel_embed is not None
    torch.testing.assert_close(output.pixel_embed.norm(dim=1), torch.ones(2, 8, 16))


@pytest.mark.parametrize(("channels", "groups"), [(64, 4), (48, 3), (24, 3), (16, 1), (12, 3), (6, 1), (5, 1)])
def test_groups_by_hand(channels: int, groups: int) -> None:
    layer = norm_layer(Norm.GROUP, channels)
    assert isinstance(layer, nn.GroupNorm)
    assert layer.num_groups == groups


def test_drop_path_drops_whole_images() -> None:
    torch.manual_seed(0)
    layer = DropPath(0.25)
    branch = torch.ones(400, 2, 3)
    dropped = layer(branch)
    assert dropped.unique().tolist() == [0, pytest.approx(1 / 0.75)]
    assert (dropped.amax(dim=(1, 2)) == dropped.amin(dim=(1, 2))).all()
    assert (dropped == 0).float().mean().item() == pytest.approx(0.25, abs=0.06)
    assert layer.eval()(branch) is branch


# --- The contract ---

HEAD_INPUTS = (FeatureSpec(8, 4), FeatureSpec(12, 8), FeatureSpec(16, 16))


def maps_of(inputs: tuple[FeatureSpec, ...], height: int, width: int, count: int = 2) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    return tuple(torch.randn(count, f.channels, height // f.stride, width // f.stride) for f in inputs)


def tiny_head(norm: Norm, inputs: tuple[FeatureSpec, ...] = HEAD_INPUTS, semantic_width: int | None = 16) -> KMaXHead:
    torch.manual_seed(0)
    return KMaXHead(
        inputs, 3, 6, width=32, embed_width=16, ffn_width=48, norm=norm, semantic_width=semantic_width, drop_path=0.1
    )


def awaken(model: nn.Module) -> None:
    """Give the residual branches, whose last norm begins at zero, something to say."""
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            nn.init.uniform_(parameter, 0.5, 1.5)


class Tiny(nn.Module):
    """Maps of SmallBackbone's strides to mask logits and values, with every branch awake."""

    def __init__(self, norm: Norm, stages: tuple[Stage, ...] = TINY, semantic_width: int | None = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inputs = BACKBONE[: len(stages)]
        self.pixel_decoder = KMaXPixelDecoder(self.inputs, stages, norm=norm)
        self.head = tiny_head(norm, self.pixel_decoder.features, semantic_width)
        awaken(self)

    def forward(self, maps: tuple[Tensor, ...]) -> QueryOutput:
        return self.head(self.pixel_decoder(maps))


@pytest.mark.parametrize("size_hw", [(32, 32), (96, 160), (64, 32)])
@torch.no_grad()
def test_outputs_are_what_the_specs_announce(size_hw: tuple[int, int]) -> None:
    torch.manual_seed(0)
    stages = (Stage(16, 1, Mixing.AXIAL), *TINY)
    decoder = KMaXPixelDecoder(BACKBONE, stages)
    assert isinstance(decoder, PixelDecoder)
    assert decoder.features == (FeatureSpec(32, 4), FeatureSpec(32, 8), FeatureSpec(64, 16), FeatureSpec(64, 32))
    maps = decoder(maps_of(BACKBONE, *size_hw))
    assert [m.shape for m in maps] == [
        (2, f.channels, *(side // f.stride for side in size_hw)) for f in decoder.features
    ]
    head = tiny_head(Norm.BATCH, decoder.features)
    assert isinstance(head, Head)
    output = head(maps)
    assert [aux.mask_stride for aux in head.spec.aux] == [32, 32, 16, 16, 8, 8, 4]
    assert head.spec.aux[-1] == HeadSpec(3, 3, 4, MaskNorm.SOFTMAX, ValueKind.IDENTITY)
    for got, spec in zip((output, *output.aux), (head.spec, *head.spec.aux), strict=True):
        assert got.mask_logits.shape == (2, spec.num_queries, *(side // spec.mask_stride for side in size_hw))
        assert got.values.shape == (2, spec.num_queries, spec.value_dim)
        assert got.mask_logits.isfinite().all()
        if spec.value_kind is ValueKind.CLASS_LOGITS:
            assert (spec.num_queries, spec.value_dim, spec.mask_norm) == (6, 4, MaskNorm.SOFTMAX)
            assert got.pixel_embed is not None
            assert got.pixel_embed.shape[-2:] == got.mask_logits.shape[-2:]
    assert head.eval()(maps).aux == ()


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@torch.no_grad()
def test_any_pyramid_will_do(count: int) -> None:
    """Fewer maps than published: the stages of their strides; more maps than stages: the coarsest."""
    decoder = KMaXPixelDecoder(BACKBONE[:count], TINY[-count:])
    assert [f.stride for f in decoder.features] == [4, 8, 16, 32][max(0, count - 3) : count]
    output = tiny_head(Norm.GROUP, decoder.features)(decoder(maps_of(BACKBONE[:count], 64, 96)))
    assert output.mask_logits.shape[-2:] == (64 // decoder.features[0].stride, 96 // decoder.features[0].stride)
    assert len(output.aux) == 2 * max(1, len(decoder.features) - 1) + 1


def test_published_sizes() -> None:
    """ResNet-50 in kMaX-DeepLab: stages of 512, 256, 128, 64 give 2048, 1024, 512, 256 channels; six layers."""
    resnet = tuple(FeatureSpec(256 * 2**i, 4 * 2**i) for i in range(4))
    with torch.device("meta"):
        decoder = KMaXPixelDecoder(resnet)
        head = KMaXHead(decoder.features, 133)
        fine, coarse = KMaXPixelDecoder(resnet[:3]), KMaXPixelDecoder((FeatureSpec(64, 2), *resnet[1:]))
    assert [(f.channels, f.stride) for f in decoder.features] == [(256, 4), (512, 8), (1024, 16), (2048, 32)]
    assert [len(stage) for stage in decoder.stages] == [1, 5, 1, 1]
    assert [aux.mask_stride for aux in head.spec.aux] == [32, 32, 16, 16, 8, 8, 4]
    assert fine.features == decoder.features[:3]
    assert coarse.features == decoder.features[1:]


@pytest.mark.parametrize("norm", Norm)
@torch.no_grad()
def test_a_batch_gives_what_its_images_give(norm: Norm) -> None:
    model = Tiny(norm)
    maps = maps_of(model.inputs, 48, 80, 3)
    model.train()(maps)
    together = model.eval()(maps)
    for index in range(3):
        alone = model(tuple(m[index : index + 1] for m in maps))
        torch.testing.assert_close(alone.mask_logits[0], together.mask_logits[index], atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(alone.values[0], together.values[index], atol=1e-3, rtol=1e-4)
    assert together.mask_logits.std(dim=0).max() > 1e-3


def test_group_norm_trains_one_image() -> None:
    model = Tiny(Norm.GROUP).train()
    output = model(maps_of(model.inputs, 16, 32, 1))
    loss = sum(o.mask_logits.square().mean() + o.values.square().mean() for o in (output, *output.aux))
    assert isinstance(loss, Tensor)
    loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []


@torch.no_grad()
def test_frozen_norms_do_not_move() -> None:
    norm = FrozenBatchNorm(2, eps=0)
    norm.load_state_dict(
        {
            "weight": torch.tensor([1.0, 2.0]),
            "bias": torch.tensor([0.0, 1.0]),
            "running_mean": torch.tensor([1.0, 0.0]),
            "running_var": torch.tensor([4.0, 1.0]),
            "num_batches_tracked": torch.tensor(7),
        }
    )
    x = torch.tensor([[[3.0], [5.0]]])
    assert norm.train()(x).flatten().tolist() == [1, 11]
    model = Tiny(Norm.FROZEN).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(maps_of(model.inputs, 32, 32))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in model.modules())


def test_errors_say_what_to_do() -> None:
    with pytest.raises(InputError, match=r"stages: wanted 1 to 2, .* strides 4, 8, got 3; leave stages out"):
        KMaXPixelDecoder(BACKBONE[:2], TINY)
    with pytest.raises(InputError, match=r"stages: the published ones are for strides 4, 8, 16, 32, got 7, 14; give"):
        KMaXPixelDecoder((FeatureSpec(8, 7), FeatureSpec(8, 14)))
    with pytest.raises(InputError, match=r"multiple of its 8 heads, got 20; change the width or num_heads"):
        KMaXPixelDecoder(BACKBONE[:1], (Stage(20, 1, Mixing.AXIAL),))
    with pytest.raises(InputError, match=r"stages: wanted a depth of 1 or more, got 0; leave the stage out"):
        KMaXPixelDecoder(BACKBONE[:1], (Stage(16, 0, Mixing.AXIAL),))
    with pytest.raises(
        InputError, match=r"layers: .* at most 3 maps \(strides 4, 8, 16\).*, got \(1, 1, 1, 1\); leave"
    ):
        KMaXHead(HEAD_INPUTS, 3, layers=(1, 1, 1, 1))
    with pytest.raises(InputError, match=r"layers: wanted .* some at all, got \(0, 0\); leave layers out"):
        KMaXHead(HEAD_INPUTS, 3, layers=(0, 0))
    with pytest.raises(InputError, match=r"width: wanted a multiple of 16, twice the 8 heads, got 40; change width"):
        KMaXHead(HEAD_INPUTS, 3, width=40)
