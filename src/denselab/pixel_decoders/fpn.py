"""Feature Pyramid Network: every level gets the strong features of the coarser ones.

Lin, Dollar, Girshick, He, Hariharan, Belongie: Feature Pyramid Networks for Object Detection, CVPR 2017.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from denselab.types import FeatureSpec


class FpnDecoder(nn.Module):
    """C2..C5 to P2..P5, all `width` channels, finest first (section 3, Fig. 3).

    A 1x1 convolution on every map; from coarse to fine, upsample by nearest neighbour and add; a 3x3 convolution
    on every sum. No non-linearities, as in the paper.
    """

    def __init__(self, inputs: tuple[FeatureSpec, ...], width: int = 256) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(nn.Conv2d(f.channels, width, 1) for f in inputs)
        self.outputs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in inputs)
        self.features = tuple(FeatureSpec(width, f.stride) for f in inputs)

    def forward(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        merged = [lateral(m) for lateral, m in zip(self.laterals, maps, strict=True)]
        for level in range(len(merged) - 2, -1, -1):
            finer = merged[level]
            merged[level] = finer + F.interpolate(merged[level + 1], size=finer.shape[-2:], mode="nearest")
        return tuple(output(m) for output, m in zip(self.outputs, merged, strict=True))
