"""Mask2Former of transformers: backbone, deformable pixel decoder, masked-attention decoder.

Cheng, Misra, Schwing, Kirillov, Girdhar: Masked-attention Mask Transformer, CVPR 2022, Fig. 2.
"""

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformers import Mask2FormerForUniversalSegmentation

from denselab.hub.parts import HubSettings
from denselab.model import DensePredictor
from denselab.types import FeatureSpec, HeadSpec, MaskNorm, QueryOutput, ValueKind


class PyramidBackbone(nn.Module):
    """A backbone of transformers that gives one map per stage."""

    def __init__(self, net: Any, strides: tuple[int, ...], settings: HubSettings) -> None:
        super().__init__()
        self.net = net
        self.features = tuple(FeatureSpec(*each) for each in zip(net.channels, strides, strict=True))
        self.size_multiple = strides[-1]
        self.mean, self.std = settings.mean, settings.std

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> tuple[Tensor, ...]:
        return tuple(self.net(pixels).feature_maps)


class DeformablePixelDecoder(nn.Module):
    """The map that masks are cut from, and three coarser ones that queries look at, finest first."""

    def __init__(self, net: Any, inputs: tuple[FeatureSpec, ...]) -> None:
        super().__init__()
        self.net = net
        config = net.config
        coarser = (FeatureSpec(config.feature_size, f.stride) for f in inputs[-net.num_feature_levels :])
        self.features = (FeatureSpec(config.mask_feature_size, config.common_stride), *coarser)

    def forward(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        output = self.net(list(maps))
        return (output.mask_features, *reversed(output.multi_scale_features))


class MaskedAttentionHead(nn.Module):
    """Masks and classes of the queries. aux: of the queries before each layer, which training supervises too."""

    def __init__(self, net: Any, classify: nn.Module, inputs: tuple[FeatureSpec, ...], num_classes: int) -> None:
        super().__init__()
        self.net = net
        self.classify = classify
        net.decoder.layerdrop = 0.0  # transformers takes the dropout for it, and outputs would go missing
        queries, width = net.queries_embedder.num_embeddings, num_classes + 1
        one = HeadSpec(queries, width, inputs[0].stride, MaskNorm.SIGMOID, ValueKind.CLASS_LOGITS)
        aux = (one,) * len(net.decoder.layers)
        self.spec = HeadSpec(queries, width, inputs[0].stride, MaskNorm.SIGMOID, ValueKind.CLASS_LOGITS, aux)

    def forward(self, maps: tuple[Tensor, ...]) -> QueryOutput:
        finest, *others = maps
        decoded = self.net(others[::-1], finest)
        said = list(zip(decoded.masks_queries_logits, decoded.intermediate_hidden_states, strict=True))
        last = self.say(*said[-1])
        aux = tuple(self.say(*each) for each in said[:-1]) if self.training else ()
        return QueryOutput(last.mask_logits, last.values, aux=aux)

    def say(self, masks: Float[Tensor, "B Q h w"], queries: Float[Tensor, "Q B C"]) -> QueryOutput:
        """Masks, and class logits of the queries."""
        return QueryOutput(masks, self.classify(queries.transpose(0, 1)))


def mask2former(net: Mask2FormerForUniversalSegmentation, settings: HubSettings) -> DensePredictor:
    """Its weights lie below `backbone.net` (theirs: `model.pixel_level_module.encoder`), `pixel_decoder.net`
    (`model.pixel_level_module.decoder`), `head.net` (`model.transformer_module`), `head.classify` (`class_predictor`).
    """
    pixel_level: Any = net.model.pixel_level_module
    config: Any = net.config
    backbone = PyramidBackbone(pixel_level.encoder, tuple(config.feature_strides), settings)
    decoder = DeformablePixelDecoder(pixel_level.decoder, backbone.features)
    transformer = net.model.transformer_module
    head = MaskedAttentionHead(transformer, net.class_predictor, decoder.features, config.num_labels)
    return DensePredictor(backbone, decoder, head)
