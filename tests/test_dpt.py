"""DPT's decoder against transformers, by hand, and through the contract of heads on a plain transformer."""

import pytest
import torch
from torch import Tensor, nn

from denselab import _vision as _vision
from denselab.backbones.from_timm import TimmBackbone
from denselab.errors import InputError
from denselab.heads.per_pixel import PerPixelHead
from denselab.model import DensePredictor
from denselab.pixel_decoders.dpt import DptDecoder
from denselab.types import FeatureSpec, PixelDecoder
from head_checks import check_batch, check_gradients, check_shapes

# isort: split
from transformers import DPTConfig
from transformers.models.dpt.modeling_dpt import DPTNeck

BLOCKS = (FeatureSpec(16, 16),) * 4


@pytest.fixture(scope="module")
def model() -> DensePredictor:
    torch.manual_seed(0)
    backbone = TimmBackbone("test_vit", out_indices=(0, 1, 2, 3))
    decoder = DptDecoder(backbone.features, width=8, widths=(6, 6, 8, 8))
    return DensePredictor(backbone, decoder, PerPixelHead(decoder.features, 3))


def test_spec(model: DensePredictor) -> None:
    assert isinstance(model.pixel_decoder, PixelDecoder)
    assert model.pixel_decoder.features == (FeatureSpec(8, 2),)


def test_shapes(model: DensePredictor) -> None:
    check_shapes(model)


def test_a_batch_gives_what_its_images_give(model: DensePredictor) -> None:
    check_batch(model)


def test_every_parameter_gets_a_finite_gradient(model: DensePredictor) -> None:
    check_gradients(model)


class PlainBackbone(nn.Module):
    """Four maps at stride 16 of a few convolutions, which trace sooner than a transformer."""

    mean = (0.5, 0.5, 0.5)
    std = (0.25, 0.25, 0.25)
    size_multiple = 16
    features = BLOCKS

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 16, 16)
        self.blocks = nn.ModuleList(nn.Conv2d(16, 16, 1) for _ in BLOCKS)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        x = self.patches(pixels)
        return tuple(block(x).tanh() for block in self.blocks)


def copy_fusion(reference: nn.Module, ours: nn.Module, batch_norm: bool) -> None:
    ours.project.load_state_dict(reference.projection.state_dict())
    for unit, wanted in ((ours.skip, reference.residual_layer1), (ours.refine, reference.residual_layer2)):
        if isinstance(unit, nn.Identity):
            continue
        parts = [wanted.convolution1, wanted.convolution2]
        if batch_norm:
            parts = [wanted.convolution1, wanted.batch_norm1, wanted.convolution2, wanted.batch_norm2]
        mine = [layer for layer in unit.layers if not isinstance(layer, nn.ReLU)]
        for source, target in zip(parts, mine, strict=True):
            target.load_state_dict(source.state_dict())


@pytest.mark.parametrize("batch_norm", [False, True])
@torch.no_grad()
def test_equals_transformers(batch_norm: bool) -> None:
    """Reassembling to factors 4, 2, 1, 1/2 and fusing, with the readout token ignored."""
    torch.manual_seed(1)
    config = DPTConfig(
        hidden_size=16,
        neck_hidden_sizes=[6, 8, 16, 12],
        fusion_hidden_size=8,
        reassemble_factors=[4, 2, 1, 0.5],
        readout_type="ignore",
        is_hybrid=False,
        use_batch_norm_in_fusion_residual=batch_norm,
    )
    reference = DPTNeck(config).eval()
    for layer in reference.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for each in (layer.running_mean, layer.running_var, layer.weight, layer.bias):
                each.uniform_(0.5, 1.5)
    ours = DptDecoder(BLOCKS, 8, (6, 8, 16, 12), batch_norm=batch_norm, aligned_corners=True).eval()
    for wanted, layer in zip(reference.reassemble_stage.layers, ours.reassemble, strict=True):
        values = [*wanted.projection.state_dict().values(), *wanted.resize.state_dict().values()]
        layer.load_state_dict(dict(zip(layer.state_dict(), values, strict=True)))
    for wanted, layer in zip(reference.convs, ours.project, strict=True):
        layer.load_state_dict(wanted.state_dict())
    for wanted, layer in zip(reference.fusion_stage.layers, reversed(ours.fusions), strict=True):
        copy_fusion(wanted, layer, batch_norm)
    maps = tuple(torch.randn(2, 16, 4, 6) for _ in range(4))
    tokens = [torch.cat([torch.randn(2, 1, 16), m.flatten(2).mT], dim=1) for m in maps]
    expected = reference(tokens, 4, 6)[-1]
    (got,) = ours(maps)
    assert got.shape == expected.shape == (2, 8, 32, 48)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def delta(decoder: DptDecoder) -> None:
    """Make every projection of a decoder of width 1 the identity and every residual unit nothing."""
    for parameter in decoder.parameters():
        parameter.zero_()
    for conv in decoder.project:
        conv.weight[0, 0, 1, 1] = 1
    for fusion in decoder.fusions:
        fusion.project.weight.fill_(1)


@pytest.mark.parametrize("aligned_corners", [False, True])
@torch.no_grad()
def test_a_pyramid_by_hand(aligned_corners: bool) -> None:
    """Maps at strides 4 and 8: 0..3 plus 10 from the single coarser cell; then upsampled, or not."""
    inputs = (FeatureSpec(1, 4), FeatureSpec(1, 8))
    maps = (torch.tensor([[[[0.0, 1.0], [2.0, 3.0]]]]), torch.tensor([[[[10.0]]]]))
    quick = DptDecoder(inputs, 1, full=False, aligned_corners=aligned_corners)
    full = DptDecoder(inputs, 1, aligned_corners=aligned_corners)
    delta(quick)
    delta(full)
    assert quick.features == (FeatureSpec(1, 4),)
    assert quick(maps)[0].tolist() == [[[[10, 11], [12, 13]]]]
    assert full.features == (FeatureSpec(1, 2),)
    first_row = [0, 1 / 3, 2 / 3, 1] if aligned_corners else [0, 0.25, 0.75, 1]
    assert full(maps)[0][0, 0, 0].tolist() == pytest.approx([10 + x for x in first_row])


@torch.no_grad()
def test_levels_that_do_not_halve_evenly_fit() -> None:
    """Three by five cells at stride 16: stride 32 has two by three, and all meet at 3 * 16 by 5 * 16 px."""
    decoder = DptDecoder(BLOCKS, 4, (2, 2, 2, 2)).eval()
    maps = tuple(torch.randn(1, 16, 3, 5) for _ in range(4))
    assert [layer(m).shape[-2:] for layer, m in zip(decoder.reassemble, maps, strict=True)] == [
        (12, 20),
        (6, 10),
        (3, 5),
        (2, 3),
    ]
    assert decoder(maps)[0].shape == (1, 4, 24, 40)


@torch.no_grad()
def test_one_cell() -> None:
    decoder = DptDecoder(BLOCKS, 4, (2, 2, 2, 2), aligned_corners=True).eval()
    (got,) = decoder((torch.randn(1, 16, 1, 1),) * 4)
    assert got.shape == (1, 4, 8, 8)
    assert got.isfinite().all()


@pytest.mark.parametrize(
    ("inputs", "features"),
    [
        ((FeatureSpec(5, 4), FeatureSpec(6, 8), FeatureSpec(7, 16)), 2),
        ((FeatureSpec(8, 8),) * 4, 2),
        ((FeatureSpec(8, 32),) * 3, 2),
        ((FeatureSpec(5, 8), FeatureSpec(6, 16)), 4),
    ],
)
@torch.no_grad()
def test_other_backbones(inputs: tuple[FeatureSpec, ...], features: int) -> None:
    decoder = DptDecoder(inputs, 8, (4, 4, 4, 4)).eval()
    maps: tuple[Tensor, ...] = tuple(torch.randn(1, f.channels, 64 // f.stride, 96 // f.stride) for f in inputs)
    assert decoder.features == (FeatureSpec(8, features),)
    assert decoder(maps)[0].shape == (1, 8, 64 // features, 96 // features)


def test_published_size() -> None:
    """DPT-Base, section 3.2: four 1x1 to (96, 192, 384, 768), resampling, 3x3 to 256, four fusions of 256."""
    with torch.device("meta"):
        decoder = DptDecoder((FeatureSpec(768, 16),) * 4)
    widths = (96, 192, 384, 768)
    project = sum(769 * w for w in widths) + 96 * 96 * 16 + 96 + 192 * 192 * 4 + 192 + 768 * 768 * 9 + 768
    to_width = sum(9 * w * 256 for w in widths)
    residual_units = (4 + 3) * 2 * (9 * 256 * 256 + 256)
    assert sum(p.numel() for p in decoder.parameters()) == project + to_width + residual_units + 4 * (256 * 256 + 256)


@pytest.mark.parametrize("strides", [(16,), (16,) * 5, (4, 8, 8), (4, 16)])
def test_other_strides_are_refused(strides: tuple[int, ...]) -> None:
    given = ", ".join(map(str, strides))
    with pytest.raises(InputError, match=rf"dpt: wanted .* 2 to 4 maps .*, got strides {given}; choose out_indices"):
        DptDecoder(tuple(FeatureSpec(4, stride) for stride in strides))
