"""Backbones: timm's maps are what timm computes, where its specs say, at any size; the simple pyramid of ViTDet."""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from denselab.backbones.from_timm import OutputStrideError, TimmBackbone
from denselab.backbones.pooled import PooledBackbone
from denselab.backbones.portable_resize import cubic_matrix, resize_cubic
from denselab.backbones.simple_pyramid import SimplePyramid
from denselab.backbones.small import SmallBackbone
from denselab.errors import InputError
from denselab.types import Backbone, FeatureSpec

# isort: split
import timm

NARROW_SWIN = {"embed_dim": 16, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 2, 2)}


def specs(backbone: Backbone) -> list[tuple[int, int]]:
    return [(f.channels, f.stride) for f in backbone.features]


@pytest.mark.parametrize(
    ("name", "choices", "wanted", "multiple", "network_hw"),
    [
        ("resnet18", {}, [(64, 4), (128, 8), (256, 16), (512, 32)], 32, None),  # He et al. 2016, Table 1
        ("resnet18", {"finest_stride": 2}, [(64, 2), (64, 4), (128, 8), (256, 16), (512, 32)], 32, None),
        ("resnet18", {"output_stride": 16}, [(64, 4), (128, 8), (256, 16), (512, 16)], 16, None),
        ("resnet18", {"output_stride": 8}, [(64, 4), (128, 8), (256, 8), (512, 8)], 8, None),
        ("resnet18", {"out_indices": (2, 4)}, [(128, 8), (512, 32)], 32, None),
        ("test_convnext", {}, [(24, 4), (32, 8), (48, 16), (64, 32)], 32, None),
        ("test_vit", {}, [(64, 16)], 16, None),
        ("test_vit", {"out_indices": (0, 3, 5)}, [(64, 16)] * 3, 16, None),
        ("test_vit", {"options": {"patch_size": 14, "img_size": 154}}, [(64, 16)], 16, None),
        ("swin_tiny_patch4_window7_224", {"options": NARROW_SWIN}, [(16, 4), (32, 8), (64, 16), (128, 32)], 32, None),
        ("inception_v3", {}, [(192, 4), (288, 8), (768, 16), (2048, 32)], 128, None),  # unpadded convolutions
        ("test_maxvit", {}, [(32, 4), (64, 8), (96, 16), (128, 32)], 160, None),  # 5x5 windows at stride 32
        ("convit_tiny", {"options": {"depth": 3}}, [(192, 16)], 16, (224, 224)),  # positions of 14x14 only
    ],
)
@torch.no_grad()
def test_maps_are_where_the_specs_say(
    name: str, choices: dict[str, Any], wanted: list[tuple[int, int]], multiple: int, network_hw: tuple[int, int] | None
) -> None:
    backbone = TimmBackbone(name, **choices).eval()
    assert isinstance(backbone, Backbone)
    assert (specs(backbone), backbone.size_multiple, backbone.network_hw) == (wanted, multiple, network_hw)
    for height, width in ((multiple, multiple), (2 * multiple, 3 * multiple)):
        maps = backbone(torch.rand(1, 3, height, width))
        assert [m.shape for m in maps] == [(1, c, height // s, width // s) for c, s in wanted]


@torch.no_grad()
def test_a_pyramid_is_what_timm_computes() -> None:
    backbone = TimmBackbone("test_resnet").eval()
    reference = timm.create_model("test_resnet").eval()
    assert reference.load_state_dict(backbone.net.state_dict(), strict=False).missing_keys == ["fc.weight", "fc.bias"]
    pixels = torch.rand(2, 3, 96, 64)
    wanted = reference.forward_intermediates(pixels, intermediates_only=True)
    for got, expected in zip(backbone(pixels), wanted[1:], strict=True):
        torch.testing.assert_close(got, expected)


@torch.no_grad()
def test_a_plain_transformer_gives_its_last_block() -> None:
    backbone = TimmBackbone("test_vit").eval()
    reference = timm.create_model("test_vit").eval()
    reference.load_state_dict(backbone.net.model.state_dict(), strict=False)
    pixels = torch.rand(1, 3, 160, 160)
    (got,) = backbone(pixels)
    tokens = reference.patch_embed(pixels)
    tokens = reference.norm_pre(reference._pos_embed(tokens))
    tokens = reference.blocks(tokens)[:, reference.num_prefix_tokens :]
    torch.testing.assert_close(got, tokens.transpose(1, 2).reshape(1, 64, 10, 10))


@torch.no_grad()
def test_channels_last_maps_are_turned() -> None:
    backbone = TimmBackbone("swin_tiny_patch4_window7_224", options=NARROW_SWIN).eval()
    pixels = torch.rand(1, 3, 64, 96)
    for got, raw in zip(backbone(pixels), backbone.net(pixels), strict=True):
        torch.testing.assert_close(got, raw.permute(0, 3, 1, 2))


@torch.no_grad()
def test_a_patch_of_14_px_covers_16() -> None:
    """The image is resized by 14/16, so what the network sees of 32x48 px is 28x42 px."""
    backbone = TimmBackbone("test_vit", options={"patch_size": 14, "img_size": 154}).eval()
    pixels = torch.rand(1, 3, 32, 48)
    smaller = torch.nn.functional.interpolate(pixels, size=(28, 42), mode="bilinear", align_corners=False)
    torch.testing.assert_close(backbone(pixels)[0], backbone.net(smaller)[-1])


def test_pretrained_weights_load_through_timm(tmp_path: Path) -> None:
    source = timm.create_model("test_resnet")
    file = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(source.state_dict(), file)
    overlay = {"file": str(file), "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    backbone = TimmBackbone("test_resnet", pretrained=True, options={"pretrained_cfg_overlay": overlay})
    loaded = backbone.net.state_dict()
    assert len(loaded) > 50
    for name, value in loaded.items():
        assert torch.equal(value, source.state_dict()[name]), name
    assert (backbone.mean, backbone.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_statistics_are_those_of_the_weights() -> None:
    backbone = TimmBackbone("resnet18")
    assert backbone.mean == (0.485, 0.456, 0.406)  # ImageNet
    assert backbone.std == (0.229, 0.224, 0.225)


def test_parameter_names_are_stable() -> None:
    names = set(TimmBackbone("resnet18").state_dict())
    assert {"net.conv1.weight", "net.layer1.0.conv1.weight", "net.layer4.1.bn2.running_var"} <= names
    names = set(SimplePyramid(TimmBackbone("test_vit"), width=32).state_dict())
    assert {"backbone.net.model.blocks.0.attn.qkv.weight", "scales.0.0.weight", "scales.3.1.weight"} <= names


def test_an_unknown_name_gets_suggestions() -> None:
    with pytest.raises(InputError, match=r"backbone: wanted the name of a timm model, got 'resnet51'; did you mean re"):
        TimmBackbone("resnet51")


def test_a_tag_without_weights_is_named() -> None:
    with pytest.raises(InputError, match=r"backbone: Invalid pretrained tag \(nope\) for resnet18"):
        TimmBackbone("resnet18.nope", pretrained=True)


def test_unreachable_weights_are_named(tmp_path: Path) -> None:
    options = {"pretrained_cfg_overlay": {"file": str(tmp_path / "absent.safetensors")}}
    with pytest.raises(InputError, match=r"the weights of 'test_resnet' are neither cached nor in reach"):
        TimmBackbone("test_resnet", pretrained=True, options=options)


@pytest.mark.parametrize("name", ["vgg11", "test_vit", "swin_tiny_patch4_window7_224"])
def test_an_output_stride_that_cannot_be_had_is_refused(name: str) -> None:
    with pytest.raises(OutputStrideError, match=f"output_stride: '{name}' cannot be dilated to 8; leave it out"):
        TimmBackbone(name, output_stride=8)


class OneMap(torch.nn.Module):
    features = (FeatureSpec(8, 16),)
    size_multiple = 16
    mean = std = (0.5, 0.5, 0.5)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.nn.functional.avg_pool2d(pixels, 16).repeat(1, 3, 1, 1)[:, :8],)


@torch.no_grad()
def test_simple_pyramid_has_four_aligned_scales() -> None:
    """A change in one 16-px cell moves only the maps around that cell."""
    pyramid = SimplePyramid(OneMap(), width=4).eval()
    assert specs(pyramid) == [(4, 4), (4, 8), (4, 16), (4, 32)]
    assert pyramid.size_multiple == 32
    pixels = torch.rand(1, 3, 160, 160)
    changed = pixels.clone()
    changed[..., 64:80, 96:112] += 0.5
    for before, after, stride in zip(pyramid(pixels), pyramid(changed), (4, 8, 16, 32), strict=True):
        rows, columns = (before != after).any(dim=1)[0].nonzero().unbind(dim=1)
        assert rows.min() >= 64 // stride - 1
        assert rows.max() <= (80 - 1) // stride + 1
        assert columns.min() >= 96 // stride - 1
        assert columns.max() <= (112 - 1) // stride + 1
        assert before.shape[-2:] == (160 // stride, 160 // stride)


def test_simple_pyramid_parameters_by_hand() -> None:
    """From 8 channels to width 4: convolutions without bias, layer norm 2 per channel, 2x2 transposed with bias."""
    counts = [sum(p.numel() for p in scale.parameters()) for scale in SimplePyramid(OneMap(), width=4).scales]
    projected = {c: c * 4 + 8 + 4 * 4 * 9 + 8 for c in (2, 4, 8)}
    first, second = 8 * 4 * 4 + 4, 4 * 2 * 4 + 2
    assert counts == [first + 2 * 4 + second + projected[2], first + projected[4], projected[8], projected[8]]


@torch.no_grad()
def test_pooled_maps_are_twice_as_coarse() -> None:
    backbone = TimmBackbone("vgg11", finest_stride=1, options={"num_classes": 0}).eval()
    assert specs(backbone) == [(64, 1), (128, 2), (256, 4), (512, 8), (512, 16), (512, 32)]
    pooled = PooledBackbone(backbone)
    assert specs(pooled) == [(64, 2), (128, 4), (256, 8), (512, 16), (512, 32)]
    pixels = torch.rand(1, 3, 32, 64)
    torch.testing.assert_close(pooled(pixels)[-1], backbone(pixels)[-1])  # timm's last map is pool5
    assert [m.shape[-2:] for m in pooled(pixels)] == [(32 // s, 64 // s) for s in (2, 4, 8, 16, 32)]


@pytest.mark.parametrize("size_hw", [(14, 14), (5, 9), (28, 17), (1, 40)])
def test_portable_resize_equals_torch(size_hw: tuple[int, int]) -> None:
    maps = torch.randn(2, 3, 14, 14)
    wanted = torch.nn.functional.interpolate(maps, size=size_hw, mode="bicubic", antialias=True)
    torch.testing.assert_close(resize_cubic(maps, size_hw), wanted, atol=1e-5, rtol=1e-5)


def test_cubic_weights_by_hand() -> None:
    """Twice as many samples: Keys' kernel at 1/4, 3/4, 5/4 and 7/4; at the border it is cut off and scaled to 1."""
    assert (cubic_matrix(6, 12)[5] * 128).tolist() == pytest.approx([0, -9, 111, 29, -3, 0])
    assert (cubic_matrix(6, 12)[0] * (111 - 9)).tolist() == pytest.approx([111, -9, 0, 0, 0, 0])
    assert torch.equal(cubic_matrix(5, 5), torch.eye(5))


def test_small_backbone_announces_its_maps() -> None:
    backbone = SmallBackbone((8, 8, 16, 24))
    assert specs(backbone) == [(8, 4), (16, 8), (24, 16)]
    assert [m.shape[1:] for m in backbone(torch.rand(2, 3, 32, 48))] == [(8, 8, 12), (16, 4, 6), (24, 2, 3)]
