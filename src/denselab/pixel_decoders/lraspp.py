"""LR-ASPP, the segmentation head of MobileNetV3.

Howard et al.: Searching for MobileNetV3, ICCV 2019, section 6.4 and Fig. 10.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from denselab.layers import conv_bn_relu
from denselab.types import FeatureSpec


class LrAsppDecoder(nn.Module):
    """The coarsest map, gated channel by channel by its average, upsampled and joined with the map at stride 8.

    The paper classifies both maps with a 1x1 convolution each and adds the scores; that is one 1x1 convolution
    (the head's) on the two maps concatenated, which is what leaves here. Its gate averages over 49x49 windows of
    a 1024x2048 input with stride (16, 20); here, as in torchvision, over the whole map, so that any size works.
    """

    def __init__(self, inputs: tuple[FeatureSpec, ...], width: int = 128) -> None:
        super().__init__()
        high = inputs[-1].channels
        self.low_index = next((i for i, f in enumerate(inputs) if f.stride == 8), 0)
        low = inputs[self.low_index]
        self.project = conv_bn_relu(high, width, kernel=1)
        self.gate = nn.Conv2d(high, width, 1, bias=False)
        self.features = (FeatureSpec(width + low.channels, low.stride),)

    def forward(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        low, high = maps[self.low_index], maps[-1]
        gate = self.gate(high.mean(dim=(2, 3), keepdim=True)).sigmoid()
        x = F.interpolate(self.project(high) * gate, size=low.shape[-2:], mode="bilinear", align_corners=False)
        return (torch.cat([x, low], dim=1),)
