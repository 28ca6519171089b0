"""Panoptic-DeepLab's head: what every pixel is, where objects have their centres, and the way there.

Cheng et al.: Panoptic-DeepLab, CVPR 2020, sections 3.1 and 3.2, Fig. 2.
"""

import math
from typing import cast

import torch
from torch import Tensor, nn

from denselab.errors import InputError
from denselab.heads.per_pixel import identity_values
from denselab.pixel_decoders.deeplabv3 import separable_conv
from denselab.types import FeatureSpec, HeadSpec, MaskNorm, QueryOutput, ValueKind


class CentreOffsetHead(nn.Module):
    """Mask channels: K class logits, the logit that a centre is here, and the offset to the centre, down and right.

    inputs: a semantic and an instance map at one stride, or one map for both. Each of the three answers has a
    separable 5x5 convolution (as wide as the semantic map; `instance_width` for centre and offset) and a 1x1.
    The offset leaves in input px and is learned in cells of the grid, as the authors' code learns it: a network
    whose numbers are around 1 need not learn to say 200.
    Deviation: the heat of a centre is the sigmoid of its logit, where the paper regresses it directly; it begins at
    0.01 everywhere, because almost no pixel is a centre, and so that a head that has learned nothing finds none.
    Raises InputError for maps of different strides.
    """

    def __init__(self, inputs: tuple[FeatureSpec, ...], num_classes: int, instance_width: int = 32) -> None:
        super().__init__()
        if len(inputs) not in (1, 2) or inputs[0].stride != inputs[-1].stride:
            raise InputError(
                "centre_offset: wanted a semantic and an instance map of one stride, or one map for both, got strides "
                f"{', '.join(str(f.stride) for f in inputs)}; use PanopticDeepLabDecoder"
            )
        semantic, instance, self.stride = inputs[0].channels, inputs[-1].channels, inputs[0].stride
        self.classify = _predictor(semantic, semantic, num_classes)
        self.centre = _predictor(instance, instance_width, 1, bias=-math.log(99))
        self.offset = _predictor(instance, instance_width, 2)
        channels = num_classes + 3
        self.spec = HeadSpec(channels, channels, self.stride, MaskNorm.SOFTMAX, ValueKind.CENTRE_OFFSET)

    def forward(self, maps: tuple[Tensor, ...]) -> QueryOutput:
        semantic, instance = maps[0], maps[-1]
        offset_px = self.offset(instance) * self.stride
        mask_logits = torch.cat([self.classify(semantic), self.centre(instance), offset_px], dim=1)
        return QueryOutput(mask_logits, identity_values(mask_logits))


def _predictor(inputs: int, width: int, outputs: int, bias: float = 0.0) -> nn.Sequential:
    last = nn.Conv2d(width, outputs, 1)
    nn.init.constant_(cast("Tensor", last.bias), bias)
    return nn.Sequential(separable_conv(inputs, width, kernel=5), last)
