"""Panoptic-DeepLab's decoder and head: published sizes, what sees what, units, and the contract of heads.

Their export is tested with the grouping.
"""

import pytest
import torch
from torch import nn

from denselab.errors import InputError
from denselab.heads.centre_offset import CentreOffsetHead
from denselab.model import DensePredictor
from denselab.pixel_decoders.panoptic_deeplab import PanopticDeepLabDecoder
from denselab.types import FeatureSpec, Head, MaskNorm, PixelDecoder, ValueKind
from head_checks import TinyPyramid, check_batch, check_gradients, check_shapes

CLASSES = 5
RESNET = (FeatureSpec(256, 4), FeatureSpec(512, 8), FeatureSpec(1024, 16), FeatureSpec(2048, 16))


@pytest.fixture(scope="module")
def model() -> DensePredictor:
    torch.manual_seed(0)
    backbone = TinyPyramid()
    decoder = PanopticDeepLabDecoder(backbone.features, 12, 8, (6, 4), (4, 3), aspp_width=8)
    return DensePredictor(backbone, decoder, CentreOffsetHead(decoder.features, CLASSES, instance_width=6))


def test_spec(model: DensePredictor) -> None:
    assert isinstance(model.pixel_decoder, PixelDecoder)
    assert isinstance(model.head, Head)
    assert model.pixel_decoder.features == (FeatureSpec(12, 4), FeatureSpec(8, 4))
    spec = model.spec
    assert (spec.num_queries, spec.value_dim, spec.mask_stride) == (CLASSES + 3, CLASSES + 3, 4)
    assert (spec.mask_norm, spec.value_kind) == (MaskNorm.SOFTMAX, ValueKind.CENTRE_OFFSET)


def test_shapes(model: DensePredictor) -> None:
    check_shapes(model)


def test_a_batch_gives_what_its_images_give(model: DensePredictor) -> None:
    check_batch(model)


def test_every_parameter_gets_a_finite_gradient(model: DensePredictor) -> None:
    check_gradients(model)


# --- decoder ---


def plain(inputs: int, outputs: int, kernel: int = 1) -> int:
    return kernel**2 * inputs * outputs + 2 * outputs


def separable(inputs: int, outputs: int) -> int:
    return 25 * inputs + 2 * inputs + plain(inputs, outputs)


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_published_sizes_by_hand() -> None:
    """Fig. 2 with a ResNet-50: two ASPPs of 256; skips to 64 and 32, or 32 and 16; 5x5 separable to 256, or 128."""
    with torch.device("meta"):
        decoder = PanopticDeepLabDecoder(RESNET)
        head = CentreOffsetHead(decoder.features, 19)
    aspp = 2 * plain(2048, 256) + 3 * plain(2048, 256, kernel=3) + plain(5 * 256, 256)
    semantic = plain(512, 64) + separable(256 + 64, 256) + plain(256, 32) + separable(256 + 32, 256)
    instance = plain(512, 32) + separable(256 + 32, 128) + plain(256, 16) + separable(128 + 16, 128)
    assert parameters(decoder.semantic) == aspp + semantic
    assert parameters(decoder.instance) == aspp + instance
    predictors = separable(256, 256) + 19 * 257 + 2 * separable(128, 32) + (1 + 2) * 33
    assert parameters(head) == predictors


def test_every_map_is_used_once_and_the_coarsest_for_context() -> None:
    """Strides 4, 8, 16, 16: the map that is neither a skip nor the last gets no gradient; both see the others."""
    inputs = tuple(FeatureSpec(4, f.stride) for f in RESNET)
    decoder = PanopticDeepLabDecoder(inputs, 4, 4, (2, 2), (2, 2), aspp_width=4).eval()
    for branch in range(2):
        maps = tuple(torch.randn(1, 4, 64 // f.stride, 64 // f.stride, requires_grad=True) for f in inputs)
        gradients = torch.autograd.grad((decoder(maps)[branch] ** 2).sum(), maps, allow_unused=True)
        assert [gradient is not None for gradient in gradients] == [True, True, False, True]


def test_a_fusion_sees_five_by_five() -> None:
    decoder = PanopticDeepLabDecoder(RESNET[:2] + RESNET[3:], 4, 4, (2, 2), (2, 2), aspp_width=4).eval()
    for fusion in (*decoder.semantic.fusions, *decoder.instance.fusions):
        x = torch.rand(1, fusion[0].in_channels, 9, 9, requires_grad=True)
        (gradient,) = torch.autograd.grad(fusion[:2](x)[0, :, 4, 4].abs().sum(), x)
        rows, columns = gradient[0].abs().sum(dim=0).nonzero().unbind(dim=1)
        assert sorted(set(rows.tolist())) == sorted(set(columns.tolist())) == [2, 3, 4, 5, 6]


def test_a_backbone_without_the_strides_is_refused() -> None:
    with pytest.raises(InputError, match=r"wanted a backbone with maps at strides 4 and 8, got 8, 16; choose another"):
        PanopticDeepLabDecoder((FeatureSpec(4, 8), FeatureSpec(4, 16)))


# --- head ---


@torch.no_grad()
def test_offsets_are_in_px_and_centres_begin_rare() -> None:
    head = CentreOffsetHead((FeatureSpec(6, 4), FeatureSpec(4, 4)), 3, instance_width=4).eval()
    for predictor, bias in ((head.centre, None), (head.offset, torch.tensor([1.0, -2.0]))):
        predictor[-1].weight.zero_()
        if bias is not None:
            predictor[-1].bias.copy_(bias)
    masks = head((torch.rand(1, 6, 2, 3), torch.rand(1, 4, 2, 3))).mask_logits
    torch.testing.assert_close(masks[:, 3].sigmoid(), torch.full((1, 2, 3), 0.01))
    assert masks[:, -2].unique().tolist() == [4]
    assert masks[:, -1].unique().tolist() == [-8]


@torch.no_grad()
def test_one_map_serves_both() -> None:
    head = CentreOffsetHead((FeatureSpec(6, 8),), 3).eval()
    output = head((torch.rand(2, 6, 4, 5),))
    assert output.mask_logits.shape == (2, 6, 4, 5)
    assert torch.equal(output.values, torch.eye(6).expand(2, 6, 6))
    assert head.spec.mask_stride == 8


def test_maps_of_different_strides_are_refused() -> None:
    with pytest.raises(InputError, match=r"maps? of one stride, or one map for both, got strides 4, 8; use Panoptic"):
        CentreOffsetHead((FeatureSpec(6, 4), FeatureSpec(6, 8)), 3)
