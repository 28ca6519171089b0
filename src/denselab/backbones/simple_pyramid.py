"""The simple feature pyramid of ViTDet: four scales from the last map of a plain transformer.

Li, Mao, Girshick, He: Exploring Plain Vision Transformer Backbones for Object Detection, ECCV 2022, Fig. 2(c).
"""

import math
from typing import cast

from jaxtyping import Float
from torch import Tensor, nn

from denselab.types import Backbone, FeatureSpec


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of a map [B, C, h, w]."""

    def forward(self, input: Float[Tensor, "B C h w"]) -> Tensor:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


class SimplePyramid(nn.Module):
    """A backbone with one map turned into a backbone with maps at several strides (section 3).

    From the last map of `backbone`: 2x2 transposed convolutions of stride 2 upwards (layer norm and GELU between
    two of them), 2x2 max pooling downwards, then per scale a 1x1 and a 3x3 convolution, each with layer norm
    (appendix A.2). Each transposed convolution halves the channels, as the authors' code does.
    """

    def __init__(self, backbone: Backbone, width: int = 256, strides: tuple[int, ...] = (4, 8, 16, 32)) -> None:
        super().__init__()
        self.backbone = cast("nn.Module", backbone)
        source = backbone.features[-1]
        self.scales = nn.ModuleList(_scale(source, stride, width) for stride in strides)
        self.features = tuple(FeatureSpec(width, stride) for stride in strides)
        self.size_multiple = math.lcm(backbone.size_multiple, strides[-1])
        self.mean, self.std = backbone.mean, backbone.std

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> tuple[Tensor, ...]:
        last = self.backbone(pixels)[-1]
        return tuple(scale(last) for scale in self.scales)


def _scale(source: FeatureSpec, stride: int, width: int) -> nn.Sequential:
    channels, at = source.channels, source.stride
    layers: list[nn.Module] = []
    while at > stride:
        if layers:
            layers += [ChannelNorm(channels), nn.GELU()]
        layers.append(nn.ConvTranspose2d(channels, channels // 2, 2, 2))
        channels, at = channels // 2, at // 2
    layers += [nn.MaxPool2d(2)] * int(math.log2(stride / at))
    layers += [nn.Conv2d(channels, width, 1, bias=False), ChannelNorm(width)]
    layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), ChannelNorm(width)]
    return nn.Sequential(*layers)
