"""DeepLabv3+: ASPP of atrous separable convolutions, and a small decoder that sharpens its edges.

Chen, Zhu, Papandreou, Schroff, Adam: Encoder-Decoder with Atrous Separable Convolution for Semantic Image
Segmentation, ECCV 2018.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from denselab.layers import conv_bn_relu
from denselab.pixel_decoders.deeplabv3 import Aspp, separable_conv
from denselab.types import FeatureSpec


class DeepLabV3PlusDecoder(nn.Module):
    """ASPP on the coarsest map, upsampled and joined with the finest map (section 3.1, Fig. 2).

    The finest map (stride 4) goes through a 1x1 convolution to 48 channels (Table 1); two 3x3 convolutions of 256
    channels follow (Table 2). They and the atrous ones are separable, as with Xception in section 4.3.
    """

    def __init__(self, inputs: tuple[FeatureSpec, ...], width: int = 256, low_level_width: int = 48) -> None:
        super().__init__()
        self.aspp = Aspp(inputs[-1], width, separable=True, dropout=0.1)
        self.low_level = conv_bn_relu(inputs[0].channels, low_level_width, kernel=1)
        self.refine = nn.Sequential(separable_conv(width + low_level_width, width), separable_conv(width, width))
        self.features = (FeatureSpec(width, inputs[0].stride),)

    def forward(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        low_level = self.low_level(maps[0])
        x = F.interpolate(self.aspp(maps[-1]), size=low_level.shape[-2:], mode="bilinear", align_corners=False)
        return (self.refine(torch.cat([x, low_level], dim=1)),)
