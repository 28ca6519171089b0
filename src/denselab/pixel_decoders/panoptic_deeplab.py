"""Panoptic-DeepLab's dual ASPP and dual decoder: one branch for classes, one for objects.

Cheng, Collins, Zhu, Liu, Huang, Adam, Chen: Panoptic-DeepLab: A Simple, Strong, and Fast Baseline for Bottom-Up
Panoptic Segmentation, CVPR 2020, section 3.1 and Fig. 2.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from denselab.errors import InputError
from denselab.layers import conv_bn_relu
from denselab.pixel_decoders.deeplabv3 import Aspp, separable_conv
from denselab.types import FeatureSpec


class PanopticDeepLabDecoder(nn.Module):
    """From the coarsest map and those at strides 8 and 4 to a semantic and an instance map, both at stride 4.

    width, instance_width: channels of the two maps that leave. skip_widths, instance_skip_widths: channels that the
    skips at strides 8 and 4 are projected to; aspp_width: of both ASPPs. Defaults are the paper's.
    Deviation: maps are enlarged by plain bilinear interpolation to the size of the skip, not with aligned corners.
    Raises InputError where the backbone lacks stride 4 or 8.
    """

    def __init__(
        self,
        inputs: tuple[FeatureSpec, ...],
        width: int = 256,
        instance_width: int = 128,
        skip_widths: tuple[int, int] = (64, 32),
        instance_skip_widths: tuple[int, int] = (32, 16),
        aspp_width: int = 256,
    ) -> None:
        super().__init__()
        strides = [f.stride for f in inputs]
        if not {4, 8} <= set(strides):
            raise InputError(
                "panoptic_deeplab: wanted a backbone with maps at strides 4 and 8, got "
                f"{', '.join(map(str, strides))}; choose another, say resnet50"
            )
        self.skips = [strides.index(stride) for stride in (8, 4)]
        context, skips = inputs[-1], [inputs[i] for i in self.skips]
        self.semantic = DecoderBranch(context, skips, aspp_width, skip_widths, width)
        self.instance = DecoderBranch(context, skips, aspp_width, instance_skip_widths, instance_width)
        self.features = (FeatureSpec(width, 4), FeatureSpec(instance_width, 4))

    def forward(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        skips = [maps[i] for i in self.skips]
        return self.semantic(maps[-1], skips), self.instance(maps[-1], skips)


class DecoderBranch(nn.Module):
    """ASPP; then per skip, coarse to fine: upsample, join the projected skip, one separable 5x5 convolution."""

    def __init__(
        self, context: FeatureSpec, skips: list[FeatureSpec], aspp_width: int, skip_widths: tuple[int, int], width: int
    ) -> None:
        super().__init__()
        self.aspp = Aspp(context, aspp_width, dropout=0.1)
        self.projections = nn.ModuleList(
            conv_bn_relu(skip.channels, to, kernel=1) for skip, to in zip(skips, skip_widths, strict=True)
        )
        joined = [before + to for before, to in zip((aspp_width, width), skip_widths, strict=True)]
        self.fusions = nn.ModuleList(separable_conv(channels, width, kernel=5) for channels in joined)

    def forward(self, context: Tensor, skips: list[Tensor]) -> Tensor:
        x = self.aspp(context)
        for skip, project, fuse in zip(skips, self.projections, self.fusions, strict=True):
            x = F.interpolate(x, size=skip.shape[-2:], mode="bilinear", align_corners=False)
            x = fuse(torch.cat([x, project(skip)], dim=1))
        return x
