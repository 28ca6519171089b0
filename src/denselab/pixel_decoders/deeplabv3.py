"""Atrous spatial pyramid pooling.

Chen, Papandreou, Schroff, Adam: Rethinking Atrous Convolution for Semantic Image Segmentation, 2017 (DeepLabv3).
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from denselab.layers import conv_bn_relu
from denselab.types import FeatureSpec


def atrous_rates(stride: int) -> tuple[int, int, int]:
    """Rates (6, 12, 18) at output stride 16, doubled at 8 (section 3.3), and by the same rule halved at 32."""
    unit = 96 // stride
    return (unit, 2 * unit, 3 * unit)


def separable_conv(inputs: int, outputs: int, dilation: int = 1, kernel: int = 3) -> nn.Sequential:
    """Atrous separable convolution: depthwise (3x3 there), 1x1 pointwise, batch norm and ReLU after each.

    Chen et al. 2018 (DeepLabv3+), section 3.1 and Fig. 3; norm and ReLU after both as in section 4.3.
    """
    padding = dilation * (kernel // 2)
    depthwise = nn.Conv2d(inputs, inputs, kernel, padding=padding, dilation=dilation, groups=inputs, bias=False)
    return nn.Sequential(depthwise, nn.BatchNorm2d(inputs), nn.ReLU(inplace=True), *conv_bn_relu(inputs, outputs, 1))


class ImagePooling(nn.Module):
    """Image-level features: global average, 1x1 convolution, and back to the size of the map (section 3.3)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.project = conv_bn_relu(inputs, outputs, kernel=1)

    def forward(self, x: Float[Tensor, "B C h w"]) -> Tensor:
        pooled = self.project(x.mean(dim=(2, 3), keepdim=True))
        return pooled.expand(-1, -1, x.shape[-2], x.shape[-1])


class Aspp(nn.Module):
    """Parallel 1x1 and three atrous 3x3 convolutions and image pooling, concatenated, then 1x1 (Fig. 5)."""

    def __init__(self, inputs: FeatureSpec, width: int = 256, separable: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        channels = inputs.channels
        branches: list[nn.Module] = [conv_bn_relu(channels, width, kernel=1)]
        for rate in atrous_rates(inputs.stride):
            atrous = separable_conv(channels, width, rate) if separable else conv_bn_relu(channels, width, 3, 1, rate)
            branches.append(atrous)
        self.branches = nn.ModuleList([*branches, ImagePooling(channels, width)])
        self.project = conv_bn_relu(len(self.branches) * width, width, kernel=1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "B C h w"]) -> Tensor:
        return self.dropout(self.project(torch.cat([branch(x) for branch in self.branches], dim=1)))


class DeepLabV3Decoder(nn.Module):
    """ASPP on the coarsest map, which the backbone gives at output stride 8 or 16 (section 3.3).

    Dropout of 0.1 before the classifier follows the authors' released code, not the paper.
    """

    def __init__(self, inputs: tuple[FeatureSpec, ...], width: int = 256) -> None:
        super().__init__()
        self.aspp = Aspp(inputs[-1], width, dropout=0.1)
        self.features = (FeatureSpec(width, inputs[-1].stride),)

    def forward(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (self.aspp(maps[-1]),)
