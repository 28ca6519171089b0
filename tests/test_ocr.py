"""OCR: the paper's formulas pixel by pixel in float64, region means by hand, and the contract of heads.

Its export is tested with DPT.
"""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from denselab.heads.ocr import ObjectContext, OcrHead, object_regions
from denselab.model import DensePredictor
from denselab.pixel_decoders.top_down import TopDownDecoder
from denselab.types import FeatureSpec, Head, HeadSpec, MaskNorm, ValueKind
from head_checks import TinyPyramid, check_batch, check_gradients, check_shapes

CLASSES = 5


@pytest.fixture(scope="module")
def model() -> DensePredictor:
    torch.manual_seed(0)
    backbone = TinyPyramid((4, 6, 8, 8))
    decoder = TopDownDecoder(backbone.features, width=8)
    return DensePredictor(backbone, decoder, OcrHead(decoder.features, CLASSES, width=12, key_channels=6))


def test_spec(model: DensePredictor) -> None:
    assert isinstance(model.head, Head)
    regions = HeadSpec(CLASSES, CLASSES, 4, MaskNorm.SOFTMAX, ValueKind.IDENTITY)
    assert model.spec == HeadSpec(CLASSES, CLASSES, 4, MaskNorm.SOFTMAX, ValueKind.IDENTITY, aux=(regions,))


def test_shapes(model: DensePredictor) -> None:
    check_shapes(model)


def test_a_batch_gives_what_its_images_give(model: DensePredictor) -> None:
    check_batch(model)


def test_every_parameter_gets_a_finite_gradient(model: DensePredictor) -> None:
    check_gradients(model)


def test_regions_by_hand() -> None:
    """Three pixels (1, 10), (2, 20), (4, 40). Shares of region 0: 1/2, 1/4, 1/4; of region 1: all the last's."""
    pixels = torch.tensor([[1.0, 2.0, 4.0], [10.0, 20.0, 40.0]]).reshape(1, 2, 1, 3)
    region_logits = torch.tensor([[2.0, 1.0, 1.0], [1e-30, 1e-30, 1.0]]).log().reshape(1, 2, 1, 3)
    regions = object_regions(pixels, region_logits)
    assert regions.shape == (1, 2, 2, 1)
    assert regions[0, :, :, 0].T.flatten().tolist() == pytest.approx([2.0, 20.0, 4.0, 40.0])


def test_a_region_does_not_depend_on_how_sure_it_is() -> None:
    """The softmax over pixels forgets a constant: equal logits are the plain mean."""
    pixels = torch.rand(1, 3, 4, 5)
    regions = object_regions(pixels, torch.tensor([-7.0, 0.0, 30.0]).reshape(1, 3, 1, 1).expand(1, 3, 4, 5))
    torch.testing.assert_close(regions[..., 0], pixels.mean(dim=(2, 3))[..., None].expand(1, 3, 3))


def transform(layers: nn.Sequential, x: NDArray[np.float64]) -> NDArray[np.float64]:
    """conv_bn_relu of kernel 1, once or several times, on vectors [C, N] in float64."""
    modules = [m for m in layers.modules() if not isinstance(m, nn.Sequential)]
    for conv, norm, _ in zip(modules[::3], modules[1::3], modules[2::3], strict=True):
        mean, var, weight, bias = (
            t.detach().double().numpy()[:, None] for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        )
        y = np.einsum("oi,in->on", conv.weight.detach().double().numpy()[:, :, 0, 0], x)
        x = np.maximum((y - mean) / np.sqrt(var + norm.eps) * weight + bias, 0)
    return x


def softmax(x: NDArray[np.float64]) -> NDArray[np.float64]:
    e = np.exp(x - x.max())
    return e / e.sum()


@torch.no_grad()
def test_equals_the_papers_formulas() -> None:
    """f_k = sum_i m_ki x_i, w_i = softmax(phi(x_i) . psi(f_k)), y_i = rho(sum_k w_ik delta(f_k)), z_i = g(y_i, x_i)."""
    torch.manual_seed(0)
    head = OcrHead((FeatureSpec(6, 4),), 4, width=8, key_channels=5).eval()
    for layer in head.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for each, low in ((layer.running_mean, -0.3), (layer.running_var, 0.5), (layer.weight, 0.7)):
                each.uniform_(low, low + 0.6)
            layer.bias.uniform_(-0.2, 0.6)
    maps = torch.randn(1, 6, 3, 4)
    got = head((maps,)).mask_logits[0].flatten(1).numpy()
    region_logits = head.regions(maps)[0].flatten(1).double().numpy()
    x = head.pixels(maps)[0].flatten(1).double().numpy()
    shares = np.stack([softmax(logits) for logits in region_logits])
    f = np.einsum("ki,ci->ck", shares, x)
    context = head.context
    phi, psi, delta = transform(context.query, x), transform(context.key, f), transform(context.value, f)
    z = np.zeros_like(x)
    for i in range(x.shape[1]):
        relation = softmax(np.einsum("c,ck->k", phi[:, i], psi) / np.sqrt(5))
        y_i = transform(context.output, np.einsum("k,ck->c", relation, delta)[:, None])
        z[:, i] = transform(head.augment[0], np.concatenate([y_i, x[:, i : i + 1]]))[:, 0]
    weight, bias = (p.double().numpy() for p in (head.classify.weight[:, :, 0, 0], head.classify.bias))
    np.testing.assert_allclose(got, np.einsum("oc,ci->oi", weight, z) + bias[:, None], atol=1e-5, rtol=1e-4)
    assert np.ptp(got, axis=1).min() > 1e-2


@torch.no_grad()
def test_context_of_equal_regions_is_one_for_all_pixels() -> None:
    context = ObjectContext(4, 3).eval()
    out = context(torch.randn(2, 4, 3, 5), torch.rand(2, 4, 1, 1).expand(2, 4, 6, 1))
    torch.testing.assert_close(out, out[..., :1, :1].expand_as(out))


@torch.no_grad()
def test_several_maps_are_joined_at_the_finest() -> None:
    head = OcrHead((FeatureSpec(3, 4), FeatureSpec(5, 16)), 2, width=4, key_channels=2).eval()
    output = head((torch.rand(1, 3, 8, 12), torch.rand(1, 5, 2, 3)))
    assert output.mask_logits.shape == (1, 2, 8, 12)
    assert output.aux == ()


def test_published_size() -> None:
    """With HRNet-W48 and 19 classes: 720 channels joined; the 1x1 and 3x3 transforms of section 3.3."""
    inputs = tuple(FeatureSpec(48 * 2**i, 4 * 2**i) for i in range(4))
    with torch.device("meta"):
        head = OcrHead(inputs, 19)

    def conv(inputs: int, outputs: int, kernel: int = 1) -> int:
        return kernel**2 * inputs * outputs + 2 * outputs

    regions = conv(720, 720) + 19 * 721
    context = 3 * conv(512, 256) + 2 * conv(256, 256) + conv(256, 512)
    wanted = regions + conv(720, 512, kernel=3) + context + conv(1024, 512) + 19 * 513
    assert sum(p.numel() for p in head.parameters()) == wanted
