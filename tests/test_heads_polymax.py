"""Values, regression and PolyMaX: what values mean, by hand; what a blend is; the contract of heads."""

import math

import pytest
import torch
from torch import nn

from denselab.errors import InputError
from denselab.heads.kmax import KMaXHead
from denselab.heads.polymax import PolyMaXHead
from denselab.heads.regression import RegressionHead
from denselab.heads.values import ClassValues, DepthValues, NormalValues, Values, activated, spread
from denselab.layers import Norm
from denselab.model import DensePredictor
from denselab.pixel_decoders.pass_through import PassThrough
from denselab.tasks.blend import blended
from denselab.types import FeatureSpec, Head, MaskNorm, ValueKind
from head_checks import TinyPyramid, check_batch, check_gradients, check_shapes

DEPTH = DepthValues(max_m=60.0)


def polymax(
    values: Values,
    norm: Norm = Norm.GROUP,
    layers: tuple[int, ...] = (1, 1),
    channels: tuple[int, ...] = (16, 16, 16, 16),
) -> DensePredictor:
    torch.manual_seed(0)
    backbone = TinyPyramid(channels)
    head = PolyMaXHead(backbone.features, values, 7, layers, 32, 16, 48, 2, norm=norm)
    for name, parameter in head.named_parameters():  # kMaX begins with updates of zero
        if name.endswith("norm.weight") and not parameter.any():
            nn.init.constant_(parameter, 0.5)
    return DensePredictor(backbone, PassThrough(backbone.features), head)


# --- values ---


def test_depth_by_hand() -> None:
    """Half-way between 0.1 m and 10 m, in log depth, lies 1 m; a quarter of the way 0.1 * 100^(1/4) m."""
    raw = torch.tensor([-100.0, -math.log(3), 0.0, 100.0])
    torch.testing.assert_close(activated(raw, DepthValues()), torch.tensor([0.1, 0.1 * 100**0.25, 1.0, 10.0]))


def test_metres_are_float32() -> None:
    near_max = torch.tensor([6.0, 6.03125], dtype=torch.bfloat16)
    assert activated(near_max, DEPTH).dtype == torch.float32
    assert activated(near_max, DEPTH).unique().numel() == 2


def test_logits_and_normals_stay() -> None:
    raw = torch.randn(2, 3)
    assert activated(raw, ClassValues(3)) is raw
    assert activated(raw, NormalValues()) is raw


def test_depths_begin_evenly_in_log_depth() -> None:
    """Four bins of 0.1 .. 10 m begin at their middles: 1/8, 3/8, 5/8, 7/8 of two decades."""
    depths = activated(spread(DepthValues(), 4), DepthValues())
    torch.testing.assert_close(depths[:, 0].log10(), torch.tensor([-0.75, -0.25, 0.25, 0.75]), atol=1e-6, rtol=0)


def test_normals_begin_spread_over_the_half_that_faces_the_camera() -> None:
    normals = spread(NormalValues(), 128)
    torch.testing.assert_close(normals.norm(dim=1), torch.ones(128))
    assert (normals[:, 2] < 0).all()
    torch.testing.assert_close(normals.mean(dim=0), torch.tensor([0.0, 0.0, -0.5]), atol=0.02, rtol=0)
    nearest = (normals @ normals.T - 2 * torch.eye(128)).amax(dim=1).arccos()
    assert nearest.min() > 0.6 * math.sqrt(2 * math.pi / 128)  # the side of each one's share of the half sphere


def test_one_query_begins_in_the_middle() -> None:
    assert spread(DepthValues(), 1).tolist() == [[0]]
    assert spread(ClassValues(3), 1).tolist() == [[0, 0, 0]]


@pytest.mark.parametrize(("max_m", "min_m"), [(1.0, 1.0), (10.0, 0.0), (10.0, -1.0)])
def test_depth_range_is_checked(max_m: float, min_m: float) -> None:
    with pytest.raises(InputError, match=f"wanted 0 < min_m < max_m, got min_m={min_m:g}, max_m={max_m:g}"):
        DepthValues(max_m, min_m)


# --- regression ---


@pytest.mark.parametrize("values", [ClassValues(5), DEPTH, NormalValues()])
def test_regression_keeps_the_contract(values: Values) -> None:
    torch.manual_seed(0)
    backbone = TinyPyramid()
    model = DensePredictor(backbone, PassThrough(backbone.features), RegressionHead(backbone.features[:1], values, 8))
    assert isinstance(model.head, Head)
    assert model.spec.mask_stride == 2
    assert (model.spec.num_queries, model.spec.value_dim) == (values.dim, values.dim)
    assert model.spec.value_kind is ValueKind.IDENTITY
    check_shapes(model)
    check_batch(model)
    model.backbone.rest = nn.ModuleList()
    check_gradients(model)


@torch.no_grad()
def test_regression_by_hand() -> None:
    """A map of ones through identity convolutions and a weight of log 3 is three quarters of the way to max_m."""
    head = RegressionHead((FeatureSpec(2, 4),), DepthValues(), 1).eval()
    for layer in (head.reduce, head.refine, head.regress):
        layer.weight.zero_()
        layer.bias.zero_()
        layer.weight[0, 0, layer.weight.shape[2] // 2, layer.weight.shape[3] // 2] = 1
    head.regress.weight.fill_(math.log(3))
    output = head((torch.ones(1, 2, 3, 5),))
    torch.testing.assert_close(output.mask_logits, torch.full((1, 1, 6, 10), 0.1 * 100**0.75))
    assert output.values.tolist() == [[[1]]]


@torch.no_grad()
def test_regression_at_stride_1_does_not_upsample() -> None:
    head = RegressionHead((FeatureSpec(4, 1),), NormalValues(), 4)
    assert head.spec.mask_stride == 1
    assert head((torch.randn(1, 4, 3, 5),)).mask_logits.shape == (1, 3, 3, 5)


# --- PolyMaX ---


@pytest.mark.parametrize("values", [ClassValues(5), DEPTH, NormalValues()])
def test_polymax_keeps_the_contract(values: Values) -> None:
    model = polymax(values)
    assert isinstance(model.head, Head)
    spec = model.spec
    assert (spec.num_queries, spec.value_dim, spec.mask_stride) == (7, values.dim, 4)
    assert (spec.mask_norm, spec.value_kind) == (MaskNorm.SOFTMAX, ValueKind.BLENDED)
    assert [(each.mask_stride, each.value_dim, each.value_kind) for each in spec.aux] == [
        (32, values.dim, ValueKind.BLENDED),
        (16, values.dim, ValueKind.BLENDED),
    ]
    check_shapes(model)
    check_batch(model)
    check_gradients(model)


@torch.no_grad()
def test_polymax_is_kmax_with_values() -> None:
    """Masks are those of kMaX; values are its class logits but the last, from where the queries begin, in metres."""
    head = polymax(DEPTH).head.eval()
    maps = tuple(torch.randn(1, 16, 64 // f.stride, 96 // f.stride) for f in TinyPyramid((16,) * 4).features)
    assert isinstance(head.decoder, KMaXHead)
    kmax, output = head.decoder(maps), head(maps)
    torch.testing.assert_close(output.mask_logits, kmax.mask_logits)
    begin = torch.logit((torch.arange(7) + 0.5) / 7)
    share = (kmax.values[..., 0] + begin).sigmoid()
    torch.testing.assert_close(output.values[..., 0], 0.1 * 600**share)
    probs = kmax.mask_logits.softmax(dim=1)
    torch.testing.assert_close(blended(output, head.spec)[:, 0], (probs * output.values[..., 0, None, None]).sum(dim=1))


@torch.no_grad()
def test_polymax_begins_in_the_middle_of_the_range() -> None:
    """Masks begin alike, so depth begins near the mean of the bins: (60 - 0.1) / log(600) = 9.4 m."""
    torch.manual_seed(0)
    backbone = TinyPyramid((16, 16, 16, 16))
    head = PolyMaXHead(backbone.features, DEPTH, 64, (1,), 32, 16, 48, 2, norm=Norm.GROUP).eval()
    depth_m = blended(head(backbone(torch.rand(1, 3, 64, 64))), head.spec)
    torch.testing.assert_close(depth_m.mean(), torch.tensor(59.9 / math.log(600)), atol=0.5, rtol=0)
