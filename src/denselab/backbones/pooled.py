"""The maps after each pooling, of a network whose features are the maps before it (VGG)."""

from typing import cast

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from denselab.types import Backbone, FeatureSpec


class PooledBackbone(nn.Module):
    """pool1 .. pool5 of a VGG: every map of `backbone` at stride 16 or finer, 2x2 max-pooled to twice its stride."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = cast("nn.Module", backbone)
        self.features = tuple(FeatureSpec(f.channels, 2 * f.stride) for f in backbone.features if f.stride <= 16)
        self.size_multiple = backbone.size_multiple
        self.mean, self.std = backbone.mean, backbone.std

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> tuple[Tensor, ...]:
        return tuple(F.max_pool2d(m, 2) for m in self.backbone(pixels)[: len(self.features)])
