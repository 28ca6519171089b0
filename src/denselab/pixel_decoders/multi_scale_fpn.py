"""The convolutional pixel decoder of mask transformers: a map for the masks, and maps for the queries to attend to.

Cheng, Schwing, Kirillov: Per-Pixel Classification is Not All You Need for Semantic Segmentation, NeurIPS 2021
(MaskFormer), section 3.3 and appendix A; several of its scales leave, as Mask2Former (Cheng et al. 2022) wants them.
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from denselab.types import FeatureSpec


class MultiScaleFpnDecoder(nn.Module):
    """Top-down path with group norm; gives mask features at the finest stride, then the maps of the coarser strides.

    Coarsest map: 3x3 convolution. Every finer one: 1x1 convolution and norm, plus the coarser map upsampled by
    nearest neighbour, then a 3x3 convolution. Each 3x3 convolution is followed by norm and ReLU; norms have 32 groups,
    fewer where a group would have less than the 8 channels it has at the published width. The finest map
    leaves only through one more 3x3 convolution, as mask features [B, mask_width, h, w]; the others leave as they
    are, [B, width, ...], finest first.
    Deviation: no multi-scale deformable attention, which Mask2Former prefers here (its ablation of pixel decoders
    has FPN as the simplest choice): it needs a compiled kernel to be fast, and export of it is fragile.
    """

    def __init__(self, inputs: tuple[FeatureSpec, ...], width: int = 256, mask_width: int = 256) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(_conv_norm(f.channels, width, kernel=1) for f in inputs[:-1])
        self.outputs = nn.ModuleList(_conv_norm(width, width, kernel=3) for _ in inputs[:-1])
        self.coarsest = _conv_norm(inputs[-1].channels, width, kernel=3)
        self.mask_features = nn.Conv2d(width, mask_width, 3, padding=1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_uniform_(layer.weight, a=1)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        self.features = (
            FeatureSpec(mask_width, inputs[0].stride),
            *(FeatureSpec(width, f.stride) for f in inputs[1:]),
        )

    def forward(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        merged = [F.relu(self.coarsest(maps[-1]))]
        for level in range(len(maps) - 2, -1, -1):
            lateral = self.laterals[level](maps[level])
            x = lateral + F.interpolate(merged[0], size=lateral.shape[-2:], mode="nearest")
            merged.insert(0, F.relu(self.outputs[level](x)))
        return (self.mask_features(merged[0]), *merged[1:])


def _conv_norm(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    groups = math.gcd(32, outputs, max(1, outputs // 8))
    return nn.Sequential(conv, nn.GroupNorm(groups, outputs))
