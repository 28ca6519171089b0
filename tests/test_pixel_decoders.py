"""Pixel decoders and heads against torchvision, torch's own operations, published sizes and values worked by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from denselab import _vision as _vision
from denselab.errors import InputError
from denselab.heads.full_conv import FullConvHead
from denselab.heads.per_pixel import PerPixelHead
from denselab.heads.score_fusion import ScoreFusionHead, bilinear_kernel
from denselab.pixel_decoders.deeplabv3 import Aspp, DeepLabV3Decoder, atrous_rates
from denselab.pixel_decoders.deeplabv3plus import DeepLabV3PlusDecoder
from denselab.pixel_decoders.fcn import FcnDecoder
from denselab.pixel_decoders.fpn import FpnDecoder
from denselab.pixel_decoders.linknet import LinkNetDecoder
from denselab.pixel_decoders.lraspp import LrAsppDecoder
from denselab.pixel_decoders.panoptic_fpn import PanopticFpnDecoder
from denselab.pixel_decoders.segnet import SegNetDecoder, unpool
from denselab.pixel_decoders.top_down import TopDownDecoder
from denselab.types import FeatureSpec, PixelDecoder

# isort: split
from torchvision.models.segmentation.deeplabv3 import ASPP
from torchvision.models.segmentation.lraspp import LRASPPHead
from torchvision.ops import FeaturePyramidNetwork

RESNET18 = tuple(FeatureSpec(64 * 2**i, 4 * 2**i) for i in range(4))
VGG16 = tuple(FeatureSpec(c, 2**i) for i, c in enumerate((64, 128, 256, 512, 512)))


def maps_of(inputs: tuple[FeatureSpec, ...], height: int = 64, width: int = 96) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    return tuple(torch.randn(2, f.channels, height // f.stride, width // f.stride) for f in inputs)


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def copy_in_order(source: nn.Module, target: nn.Module) -> None:
    """Give `target` random, non-trivial parameters and statistics of `source`, matched by order and shape."""
    torch.manual_seed(2)
    values = [torch.rand_like(v) + 0.1 if v.ndim == 1 else v for v in source.state_dict().values()]
    source.load_state_dict(dict(zip(source.state_dict(), values, strict=True)))
    target.load_state_dict(dict(zip(target.state_dict(), values, strict=True)))


@pytest.mark.parametrize(
    "build",
    [
        TopDownDecoder,
        FpnDecoder,
        PanopticFpnDecoder,
        DeepLabV3Decoder,
        DeepLabV3PlusDecoder,
        LrAsppDecoder,
        LinkNetDecoder,
        lambda inputs: FcnDecoder(inputs, 8, width=16),
        lambda inputs: SegNetDecoder(VGG16),
    ],
)
@torch.no_grad()
def test_outputs_are_what_the_features_announce(build: type[PixelDecoder]) -> None:
    decoder = build(RESNET18)
    assert isinstance(decoder, PixelDecoder)
    maps = decoder(maps_of(VGG16 if isinstance(decoder, SegNetDecoder) else RESNET18))
    assert [m.shape for m in maps] == [(2, f.channels, 64 // f.stride, 96 // f.stride) for f in decoder.features]


# --- FPN ---


@torch.no_grad()
def test_fpn_equals_torchvision() -> None:
    ours = FpnDecoder(RESNET18, 16)
    reference = FeaturePyramidNetwork([f.channels for f in RESNET18], 16)
    copy_in_order(reference, ours)
    maps = maps_of(RESNET18)
    wanted = reference({str(i): m for i, m in enumerate(maps)})
    for got, expected in zip(ours(maps), wanted.values(), strict=True):
        torch.testing.assert_close(got, expected)


def test_panoptic_fpn_stages_and_size() -> None:
    """Stages per level 1, 1, 2, 3 (section 3.1); 3x3x256x128 and 3x3x128x128 weights plus group norms of 2x128."""
    decoder = PanopticFpnDecoder(RESNET18)
    assert [len(branch) for branch in decoder.branches] == [1, 1, 2, 3]
    assert [[stage.scale for stage in branch] for branch in decoder.branches] == [[1], [2], [2, 2], [2, 2, 2]]
    assert parameters(decoder.branches) == 4 * 9 * 256 * 128 + 3 * 9 * 128 * 128 + 7 * 2 * 128


# --- DeepLab ---


@pytest.mark.parametrize(("stride", "rates"), [(16, (6, 12, 18)), (8, (12, 24, 36)), (32, (3, 6, 9))])
def test_aspp_rates(stride: int, rates: tuple[int, int, int]) -> None:
    assert atrous_rates(stride) == rates
    convs = [m for m in Aspp(FeatureSpec(8, stride), 4).modules() if isinstance(m, nn.Conv2d)]
    assert tuple(c.dilation[0] for c in convs if c.kernel_size == (3, 3)) == rates


@torch.no_grad()
def test_aspp_equals_torchvision() -> None:
    ours, reference = Aspp(FeatureSpec(24, 16), 16).eval(), ASPP(24, [6, 12, 18], 16).eval()
    copy_in_order(reference, ours)
    x = torch.randn(2, 24, 33, 41)
    torch.testing.assert_close(ours(x), reference(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("separable", [False, True])
def test_an_atrous_branch_sees_nine_cells(separable: bool) -> None:
    aspp = Aspp(FeatureSpec(3, 16), 4, separable=separable).eval()
    x = torch.rand(1, 3, 49, 49, requires_grad=True)
    for branch, rate in zip(aspp.branches[1:4], (6, 12, 18), strict=True):
        (gradient,) = torch.autograd.grad(branch[:2](x)[0, :, 24, 24].abs().sum(), x)
        rows, columns = gradient[0].abs().sum(dim=0).nonzero().unbind(dim=1)
        assert sorted(set(rows.tolist())) == sorted(set(columns.tolist())) == [24 - rate, 24, 24 + rate]


def test_deeplabv3plus_size_by_hand() -> None:
    """A ResNet-50 at stride 16: separable branches, image pooling, projection; 48 low-level channels; 304 to 256."""
    decoder = DeepLabV3PlusDecoder((FeatureSpec(256, 4), FeatureSpec(2048, 16)))

    def plain(i: int, o: int) -> int:
        return i * o + 2 * o

    def separable(i: int, o: int) -> int:
        return 9 * i + 2 * i + plain(i, o)

    aspp = 2 * plain(2048, 256) + 3 * separable(2048, 256) + plain(5 * 256, 256)
    assert parameters(decoder) == aspp + plain(256, 48) + separable(304, 256) + separable(256, 256)


@torch.no_grad()
def test_image_pooling_is_constant() -> None:
    pooled = Aspp(FeatureSpec(4, 16), 3).eval().branches[-1](torch.rand(1, 4, 5, 7))
    assert pooled.shape == (1, 3, 5, 7)
    assert torch.equal(pooled, pooled[..., :1, :1].expand_as(pooled))


# --- LR-ASPP ---


@torch.no_grad()
def test_lraspp_equals_torchvision() -> None:
    """One classifier on the two maps together is the paper's two classifiers, added."""
    inputs = (FeatureSpec(40, 8), FeatureSpec(960, 16))
    decoder = LrAsppDecoder(inputs).eval()
    head = PerPixelHead(decoder.features, 5).eval()
    reference = LRASPPHead(40, 960, 5, 128).eval()
    copy_in_order(reference.cbr, decoder.project)
    decoder.gate.weight.copy_(reference.scale[1].weight)
    high, low = reference.high_classifier, reference.low_classifier
    head.classify.weight.copy_(torch.cat([high.weight, low.weight], dim=1))
    head.classify.bias.copy_(high.bias + low.bias)
    maps = maps_of(inputs)
    wanted = reference({"low": maps[0], "high": maps[1]})
    torch.testing.assert_close(head(decoder(maps)).mask_logits, wanted, atol=1e-5, rtol=1e-5)


# --- SegNet ---


@pytest.mark.parametrize("kind", ["noise", "many ties", "all equal", "negative"])
def test_unpool_equals_max_unpool(kind: str) -> None:
    torch.manual_seed(0)
    before = torch.randn(2, 3, 6, 10)
    before = {"noise": before, "many ties": before.relu().round(), "all equal": before * 0, "negative": -before.abs()}[
        kind
    ]
    pooled, indices = F.max_pool2d(before, 2, return_indices=True)
    values = torch.randn_like(pooled)
    assert torch.equal(unpool(values, before), F.max_unpool2d(values, indices, 2))


def test_unpool_by_hand() -> None:
    before = torch.tensor([[[[1.0, 2.0, 0.0, 0.0], [4.0, 3.0, 0.0, 7.0]]]])
    wanted = torch.tensor([[[[0.0, 0.0, 0.0, 0.0], [5.0, 0.0, 0.0, 6.0]]]])
    assert torch.equal(unpool(torch.tensor([[[[5.0, 6.0]]]]), before), wanted)


def test_segnet_mirrors_vgg16() -> None:
    """Thirteen convolutions with VGG16's weights, 64 -> 64 in the place of 3 -> 64."""
    decoder = SegNetDecoder((*VGG16, FeatureSpec(512, 32)))
    convs = [m for stage in reversed(decoder.stages) for m in stage.modules() if isinstance(m, nn.Conv2d)]
    widths = [512, 512, 512, 512, 512, 256, 256, 256, 128, 128, 64, 64, 64]
    assert [c.out_channels for c in convs] == widths
    vgg16_weights = 14_710_464
    assert sum(c.weight.numel() for c in convs) == vgg16_weights - 3 * 64 * 9 + 64 * 64 * 9


def test_segnet_refuses_another_pyramid() -> None:
    with pytest.raises(
        InputError, match=r"segnet: wanted .* \(strides 1, 2, 4, 8, 16\), got strides 4, 8, 16, 32; choo"
    ):
        SegNetDecoder(RESNET18)


# --- LinkNet ---


def test_linknet_has_the_published_size() -> None:
    """11.5 M parameters (Table I), of which ResNet-18 without its classifier has 11,176,512."""
    decoder = LinkNetDecoder(RESNET18)
    total = 11_176_512 + parameters(decoder) + parameters(FullConvHead(decoder.features, 20))
    assert total == pytest.approx(11.5e6, rel=0.01)


@torch.no_grad()
def test_linknet_adds_the_links() -> None:
    """With decoder blocks that give nothing, what is left is the finest link's map through the first block."""
    decoder = LinkNetDecoder(RESNET18).eval()
    for block in decoder.blocks[1:]:
        block[-1][1].weight.zero_()
    maps = maps_of(RESNET18)
    torch.testing.assert_close(decoder(maps)[0], decoder.final(decoder.blocks[0](maps[0])))


def test_linknet_refuses_another_pyramid() -> None:
    with pytest.raises(
        InputError, match=r"linknet: wanted .* begin at stride 4 and double, got strides 8, 16, 32; choo"
    ):
        LinkNetDecoder(RESNET18[1:])


# --- FCN ---


def test_bilinear_kernel_by_hand() -> None:
    weights = torch.tensor([0.25, 0.75, 0.75, 0.25])
    torch.testing.assert_close(bilinear_kernel(2), weights[:, None] * weights)
    assert bilinear_kernel(4)[0].tolist() == pytest.approx([w / 8 / 8 for w in (1, 3, 5, 7, 7, 5, 3, 1)])


@torch.no_grad()
def test_fcn8s_begins_as_fcn32s() -> None:
    """Skip scores begin at zero and upsampling as bilinear: away from the border, 32s upsampled four times."""
    inputs = (FeatureSpec(6, 8), FeatureSpec(5, 16), FeatureSpec(4, 32))
    head = ScoreFusionHead(inputs, 3)
    maps = maps_of(inputs, 256, 256)
    coarse = head.scores[-1](maps[-1])
    for _ in range(2):
        coarse = F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False)
    inside = (..., slice(8, -8), slice(8, -8))
    torch.testing.assert_close(head(maps).mask_logits[inside], coarse[inside])
    assert head.spec.mask_stride == 8


@torch.no_grad()
def test_skip_scores_are_added() -> None:
    inputs = (FeatureSpec(1, 16), FeatureSpec(1, 32))
    head = ScoreFusionHead(inputs, 1)
    for scores, weight in zip(head.scores, (10.0, 0.0), strict=True):
        scores.weight.fill_(weight)
        scores.bias.fill_(0.0)
    maps = (torch.arange(4.0).reshape(1, 1, 2, 2), torch.ones(1, 1, 1, 1))
    assert head(maps).mask_logits.flatten().tolist() == [0, 10, 20, 30]


def test_fcn_has_the_classifier_of_vgg16() -> None:
    """fc6: 7 x 7 x 512 x 4096 + 4096 = 102,764,544 parameters; fc7: 4096 x 4096 + 4096 = 16,781,312."""
    with torch.device("meta"):
        decoder = FcnDecoder((FeatureSpec(512, 32),), 32)
    assert (parameters(decoder.fc6), parameters(decoder.fc7)) == (102_764_544, 16_781_312)
    assert decoder.features == (FeatureSpec(4096, 32),)


def test_fcn_refuses_a_pyramid_without_stride_32() -> None:
    with pytest.raises(
        InputError, match=r"fcn16s: wanted a backbone with maps at strides 16, 32, got 4, 8, 16; choose"
    ):
        FcnDecoder(RESNET18[:3], 16)
