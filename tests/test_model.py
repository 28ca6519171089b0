"""DensePredictor's own work (statistics, padding), and what the zoo builds or refuses."""

import pytest
import torch
from torch import nn

from denselab import zoo
from denselab.errors import InputError
from denselab.heads.per_pixel import PerPixelHead
from denselab.model import DensePredictor, round_up
from denselab.types import FeatureSpec, Head


class Pixels(nn.Module):
    """A backbone that gives the pixels it gets."""

    features = (FeatureSpec(3, 1),)
    size_multiple = 4
    mean = (0.5, 0.25, 0.0)
    std = (0.5, 0.25, 1.0)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (pixels,)


class Through(nn.Module):
    features = Pixels.features

    def forward(self, maps: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return maps


def test_round_up_by_hand() -> None:
    assert [round_up(size, 16) for size in (1, 15, 16, 17, 33)] == [16, 16, 16, 32, 48]


def test_pixels_are_normalised_and_padded_with_the_mean() -> None:
    model = DensePredictor(Pixels(), Through(), PerPixelHead(Pixels.features, 2))
    seen = model.normalize(torch.tensor([1.0, 0.5, 0.25]).view(1, 3, 1, 1).expand(1, 3, 5, 3))
    assert seen.shape == (1, 3, 8, 4)
    assert seen[0, :, 0, 0].tolist() == [1.0, 1.0, 0.25]
    assert seen[0, :, 5:].abs().sum() == seen[0, :, :, 3:].abs().sum() == 0


def test_statistics_are_not_in_checkpoints() -> None:
    model = DensePredictor(Pixels(), Through(), PerPixelHead(Pixels.features, 2))
    assert set(model.state_dict()) == {"head.classify.weight", "head.classify.bias"}


def test_the_head_says_what_leaves() -> None:
    head = PerPixelHead((FeatureSpec(3, 1),), 7)
    assert isinstance(head, Head)
    assert DensePredictor(Pixels(), Through(), head).spec is head.spec
    assert (head.spec.num_queries, head.spec.value_dim, head.spec.mask_stride) == (7, 7, 1)


def test_build_is_the_function_of_that_name() -> None:
    by_name, by_function = zoo.build("small", num_classes=3), zoo.small(3)
    assert [p.shape for p in by_name.parameters()] == [p.shape for p in by_function.parameters()]
    assert zoo.build("deeplabv3", choices={"backbone": "small", "output_stride": 16}).spec.mask_stride == 16
    assert (
        zoo.build("lraspp", choices={"backbone": "test_resnet", "output_stride": 8}).backbone.features[-1].stride == 8
    )


def test_a_backbone_that_cannot_be_dilated_keeps_its_stride() -> None:
    assert zoo.deeplabv3(3, "vgg11").spec.mask_stride == 32


def test_a_plain_transformer_gets_the_scales_a_decoder_reads() -> None:
    assert [f.stride for f in zoo.fpn(3, "test_vit").backbone.features] == [4, 8, 16, 32]
    assert [f.stride for f in zoo.deeplabv3(3, "test_vit").backbone.features] == [16]
    assert [f.stride for f in zoo.deeplabv3plus(3, "test_vit").backbone.features] == [4, 16]
    assert [f.stride for f in zoo.fcn8s(3, "test_vit", width=8).backbone.features] == [8, 16, 32]


def test_lraspp_reads_what_mobilenetv3_gives() -> None:
    """Stride 8 and, dilated, stride 16 (Howard et al. 2019, Fig. 10)."""
    model = zoo.lraspp(3, "mobilenetv3_small_050").eval()
    assert model.backbone.features[-1] == FeatureSpec(288, 16)
    assert model(torch.rand(1, 3, 40, 56)).mask_logits.shape == (1, 3, 48 // 8, 64 // 8)


@pytest.mark.parametrize(
    ("choices", "text"),
    [
        ({"model": "deeplabv4"}, r"model: wanted one of street, small, .*, got 'deeplabv4'; did you mean deeplabv3\?"),
        ({"model": "fpn", "backbone": "resnet51"}, r"backbone: wanted the name of a timm model, got 'resnet51'; did"),
        ({"model": "deeplabv3", "backbone": "smal"}, r"backbone: wanted the name of a timm model, got 'smal'"),
        ({"model": "segnet", "backbone": "small"}, r"segnet: wanted a backbone .*strides 1, 2, 4, 8, 16"),
        ({"model": "segnet", "backbone": "test_resnet"}, r"segnet: wanted .*got strides 2, 4, 8, 16, 32; choose a VGG"),
        (
            {"model": "fcn8s", "backbone": "small"},
            r"fcn8s: wanted a backbone with maps at strides 8, 16, 32, got 4, 8, 16",
        ),
        (
            {"model": "street", "backbone": "resnet18"},
            r"backbone: the model 'street' has no such choice, got 'resnet18'",
        ),
        (
            {"model": "street", "pretrained": True},
            r"pretrained: the model 'street' has no such choice, got True; leave",
        ),
        ({"model": "small", "pretrained": True}, r"pretrained: the backbone 'small' has no pretrained weights; leave"),
        (
            {"model": "fpn", "output_stride": 8},
            r"output_stride: the model 'fpn' has no such choice, got 8; leave it out",
        ),
        (
            {"model": "deeplabv3", "backbone": "small", "output_stride": 8},
            r"output_stride: the backbone 'small' has 16",
        ),
        ({"model": "deeplabv3", "backbone": "test_vit", "output_stride": 8}, r"'test_vit' cannot be dilated to 8"),
        (
            {"model": "fpn", "tasks": ("depth",)},
            r"task: the model 'fpn' serves semantic, got depth; models for it: dpt, polymax, kmax",
        ),
        (
            {"model": "eomt", "tasks": ("panoptic", "semantic")},
            r"task: the model 'eomt' serves one task at a time, got panoptic\+semantic; models for several: kmax",
        ),
        ({"model": "kmax", "tasks": ("depth", "depth")}, r"task: wanted one or more different tasks, got depth\+depth"),
        ({"model": "kmax", "max_depth": 9}, "max_depth: wanted only for depth, got 9 for semantic; leave it out"),
        ({"model": "kmax", "norm": "layer"}, "norm: wanted batch or group or frozen, got 'layer'"),
    ],
)
def test_misuse_is_named(choices: dict[str, object], text: str) -> None:
    given = dict(choices)
    model, tasks = given.pop("model"), given.pop("tasks", ("semantic",))
    with pytest.raises(InputError, match=text):
        zoo.build(model, tasks, 3, given)
