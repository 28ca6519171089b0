"""The semantic segmentation branch of Panoptic FPN.

Kirillov, Girshick, He, Dollar: Panoptic Feature Pyramid Networks, CVPR 2019, section 3.1 and Fig. 3.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from denselab.pixel_decoders.fpn import FpnDecoder
from denselab.types import FeatureSpec


class UpsampleStage(nn.Module):
    """3x3 convolution, group norm, ReLU, and 2x bilinear upsampling unless `scale` is 1."""

    def __init__(self, inputs: int, outputs: int, scale: int) -> None:
        super().__init__()
        self.scale = scale
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(32, outputs)

    def forward(self, x: Float[Tensor, "B C h w"]) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        if self.scale == 1:
            return x
        return F.interpolate(x, scale_factor=float(self.scale), mode="bilinear", align_corners=False)


class PanopticFpnDecoder(nn.Module):
    """An FPN whose levels are brought to the finest stride and summed: one map of `width` channels.

    A level at 1/32 goes through three upsampling stages, 1/16 through two, 1/8 through one; 1/4 through one stage
    that does not upsample. The 1x1 convolution and the final 4x upsampling are the head's and the decode's.
    """

    def __init__(self, inputs: tuple[FeatureSpec, ...], fpn_width: int = 256, width: int = 128) -> None:
        super().__init__()
        self.fpn = FpnDecoder(inputs, fpn_width)
        finest = inputs[0].stride
        self.branches = nn.ModuleList(_branch(fpn_width, width, f.stride // finest) for f in inputs)
        self.features = (FeatureSpec(width, finest),)

    def forward(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        levels = self.fpn(maps)
        total = self.branches[0](levels[0])
        for branch, level in zip(self.branches[1:], levels[1:], strict=True):
            total = total + branch(level)
        return (total,)


def _branch(inputs: int, width: int, ratio: int) -> nn.Sequential:
    stages = max(1, ratio.bit_length() - 1)
    return nn.Sequential(*(UpsampleStage(inputs if i == 0 else width, width, min(ratio, 2)) for i in range(stages)))
