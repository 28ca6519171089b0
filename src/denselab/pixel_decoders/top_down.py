"""A light top-down decoder of our own: FPN's additive path (Lin et al. 2017, Fig. 3) with one output map."""

import torch.nn.functional as F
from torch import Tensor, nn

from denselab.layers import conv_bn_relu
from denselab.types import FeatureSpec


class TopDownDecoder(nn.Module):
    """From the coarsest map to the finest: project, upsample x2, add the lateral, smooth with a 3x3 convolution.

    Unlike FPN it smooths before it upsamples further and returns only the finest map, which is all a per-pixel
    head needs.
    """

    def __init__(self, inputs: tuple[FeatureSpec, ...], width: int = 64) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(conv_bn_relu(f.channels, width, kernel=1) for f in inputs)
        self.smooth = nn.ModuleList(conv_bn_relu(width, width) for _ in inputs[:-1])
        self.features = (FeatureSpec(width, inputs[0].stride),)

    def forward(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = self.laterals[-1](maps[-1])
        for level in range(len(maps) - 2, -1, -1):
            finer = maps[level]
            x = F.interpolate(x, size=finer.shape[-2:], mode="bilinear", align_corners=False)
            x = self.smooth[level](x + self.laterals[level](finer))
        return (x,)
