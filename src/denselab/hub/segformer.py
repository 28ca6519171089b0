"""SegFormer of transformers: the Mix Transformer as backbone, the all-MLP decoder as head.

Xie, Wang, Yu, Anandkumar, Alvarez, Luo: SegFormer, NeurIPS 2021, Fig. 2.
"""

import math
from itertools import accumulate
from operator import mul
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformers import SegformerForSemanticSegmentation, SegformerModel

from denselab.heads.per_pixel import identity_values
from denselab.hub.parts import HubSettings
from denselab.model import DensePredictor
from denselab.pixel_decoders.pass_through import PassThrough
from denselab.types import FeatureSpec, HeadSpec, MaskNorm, QueryOutput, ValueKind


class MixTransformer(nn.Module):
    """The four stages. Sizes are multiples of each stage's stride times the reduction of its keys (32 px)."""

    def __init__(self, net: SegformerModel, settings: HubSettings) -> None:
        super().__init__()
        self.net = net
        strides = tuple(accumulate(net.config.strides, mul))
        self.features = tuple(FeatureSpec(*each) for each in zip(net.config.hidden_sizes, strides, strict=True))
        self.size_multiple = math.lcm(*(mul(*each) for each in zip(strides, net.config.sr_ratios, strict=True)))
        self.mean, self.std = settings.mean, settings.std
        stages: Any = net.stages
        for stage in stages:
            stage.reshape = True  # else the last stage of some checkpoints forgets its height and width

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> tuple[Tensor, ...]:
        maps: list[Tensor] = [pixels]
        for stage in self.net.stages:
            maps.append(stage(maps[-1]))
        return tuple(maps[1:])


class AllMlpHead(nn.Module):
    """Class logits on the grid of the finest map."""

    def __init__(self, net: nn.Module, inputs: tuple[FeatureSpec, ...], num_classes: int) -> None:
        super().__init__()
        self.net = net
        self.spec = HeadSpec(num_classes, num_classes, inputs[0].stride, MaskNorm.SOFTMAX, ValueKind.IDENTITY)

    def forward(self, maps: tuple[Tensor, ...]) -> QueryOutput:
        logits = self.net(maps)
        return QueryOutput(logits, identity_values(logits))


def segformer(net: SegformerForSemanticSegmentation, settings: HubSettings) -> DensePredictor:
    """Its weights lie below `backbone.net` (theirs: `segformer`) and `head.net` (`decode_head`)."""
    backbone = MixTransformer(net.segformer, settings)
    decoder = PassThrough(backbone.features)
    config: Any = net.config
    return DensePredictor(backbone, decoder, AllMlpHead(net.decode_head, decoder.features, config.num_labels))
