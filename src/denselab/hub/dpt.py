"""DPT and Depth Anything of transformers: a vision transformer, its layers reassembled into a pyramid, and fused.

Ranftl, Bochkovskiy, Koltun: Vision Transformers for Dense Prediction, ICCV 2021, Fig. 1. Yang, Kang, Huang, Xu, Feng,
Zhao: Depth Anything, CVPR 2024; Yang, Kang, Huang, Zhao, Xu, Feng, Zhao: Depth Anything V2, NeurIPS 2024.
"""

import math
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import DepthAnythingForDepthEstimation, DPTForDepthEstimation, DPTForSemanticSegmentation

from denselab.errors import InputError
from denselab.heads.per_pixel import identity_values
from denselab.hub.parts import HubSettings, resize, to_map, to_tokens
from denselab.model import DensePredictor
from denselab.pixel_decoders.pass_through import PassThrough
from denselab.types import FeatureSpec, HeadSpec, MaskNorm, QueryOutput, ValueKind

LEAST_INVERSE_DEPTH = 1e-3
"""What is farther than this is put there when relative inverse depth is turned into relative depth."""

_HYBRID_STRIDES = (4, 8)
"""Of the two maps that a hybrid network takes from its convolutions (DPT, section 3.1)."""


class TransformerLayers(nn.Module):
    """Some layers of a vision transformer, each as a map, and after the maps their class tokens [B, 1, C].

    A hybrid network gives two maps of its convolutions first. patches: sizes are multiples of this many patches.
    Position embeddings are resized as transformers does.
    """

    def __init__(self, net: Any, patches: int, settings: HubSettings) -> None:
        super().__init__()
        self.net = net
        config = net.config
        self.hybrid: bool = config.is_hybrid
        self.kept = tuple(config.backbone_out_indices)[2 if self.hybrid else 0 :]
        self.patch_px: int = config.patch_size
        self.size_multiple = patches * self.patch_px
        layers = (FeatureSpec(config.hidden_size, config.patch_size),) * len(self.kept)
        sizes = zip(config.neck_hidden_sizes, _HYBRID_STRIDES, strict=False)
        self.features = (*(FeatureSpec(*each) for each in sizes), *layers) if self.hybrid else layers
        self.mean, self.std = settings.mean, settings.std

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> tuple[Tensor, ...]:
        height, width = pixels.shape[-2] // self.patch_px, pixels.shape[-1] // self.patch_px
        any_size = {"interpolate_pos_encoding": True} if self.hybrid else {}
        embedded = self.net.embeddings(pixels, **any_size)
        tokens = embedded.last_hidden_states
        layers: list[Tensor] = []
        for layer in self.net.encoder.layer:
            tokens = layer(tokens)
            layers.append(tokens)
        kept = [layers[i] for i in self.kept]
        return (*(embedded.intermediate_activations or ()), *_maps_then_class_tokens(kept, height, width))


class Dinov2Layers(nn.Module):
    """The same of DINOv2, each layer normalised.

    transformers leaves position embeddings alone at one size, a choice that would tie a traced model to that size;
    here they are always resized, to which at that size nothing happens.
    """

    def __init__(self, net: Any, patches: int, settings: HubSettings) -> None:
        super().__init__()
        config = net.config
        if config.model_type != "dinov2":
            raise InputError(
                f"backbone_config: wanted a depth network on dinov2, got one on {config.model_type}, "
                "which is not supported yet; choose another model"
            )
        self.net = net
        self.kept = tuple(config.stage_names.index(name) for name in config.out_features)
        self.patch_px: int = config.patch_size
        self.size_multiple = patches * self.patch_px
        self.features = (FeatureSpec(config.hidden_size, self.patch_px),) * len(self.kept)
        self.mean, self.std = settings.mean, settings.std

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> tuple[Tensor, ...]:
        height, width = pixels.shape[-2] // self.patch_px, pixels.shape[-1] // self.patch_px
        embeddings = self.net.embeddings
        positions = embeddings.position_embeddings
        side = math.isqrt(positions.shape[1] - 1)
        grid = F.interpolate(to_map(positions[:, 1:], side, side), size=(height, width), mode="bicubic")
        patches = to_map(embeddings.patch_embeddings(pixels), height, width) + grid
        class_token = (embeddings.cls_token + positions[:, :1]).expand(len(pixels), -1, -1)
        layers: list[Tensor] = [embeddings.dropout(to_tokens(class_token, patches))]
        for block in self.net.encoder.layer:
            layers.append(block(layers[-1]))
        norm = self.net.layernorm if self.net.config.apply_layernorm else nn.Identity()
        return _maps_then_class_tokens([norm(layers[i]) for i in self.kept], height, width)


def _maps_then_class_tokens(layers: list[Tensor], height: int, width: int) -> tuple[Tensor, ...]:
    return (*(to_map(t[:, 1:], height, width) for t in layers), *(t[:, :1] for t in layers))


class FusionHead(nn.Module):
    """The neck, which reassembles and fuses the maps, and the convolutions after it: one channel per component.

    What comes out at other than a whole number of px per cell (patches of 14 px under DPT) is resized to the input.
    """

    def __init__(
        self, neck: Any, head: Any, inputs: tuple[FeatureSpec, ...], num_queries: int, settings: HubSettings
    ) -> None:
        super().__init__()
        self.neck, self.head = neck, head
        self.relative_depth = settings.relative_depth
        self.patch_px = inputs[-1].stride
        self.num_maps = len(inputs)
        # The finest map of the neck has reassemble_factors[0] cells a patch; fusion and head double that each.
        cells_per_patch = 4 * neck.config.reassemble_factors[0]
        self.spans_whole_px = self.patch_px % cells_per_patch == 0
        stride = int(self.patch_px // cells_per_patch) if self.spans_whole_px else 1
        self.spec = HeadSpec(num_queries, num_queries, stride, MaskNorm.SOFTMAX, ValueKind.IDENTITY)

    def forward(self, maps: tuple[Tensor, ...]) -> QueryOutput:
        maps, class_tokens = maps[: self.num_maps], maps[self.num_maps :]
        height, width = maps[-1].shape[-2:]
        plain = self.num_maps - len(class_tokens)
        layers = [*maps[:plain], *(to_tokens(*each) for each in zip(class_tokens, maps[plain:], strict=True))]
        answer = self.answer(self.neck(layers, height, width), height, width)
        if self.relative_depth:
            answer = 1 / answer.clamp(min=LEAST_INVERSE_DEPTH)
        return QueryOutput(answer, identity_values(answer))

    def answer(self, fused: list[Tensor], height: int, width: int) -> Float[Tensor, "B D h w"]:
        """Depth or class logits, on a grid of `spec.mask_stride`."""
        answer = self.head(fused)
        answer = answer[:, None] if answer.ndim == 3 else answer
        return answer if self.spans_whole_px else resize(answer, (height * self.patch_px, width * self.patch_px))


class DepthAnythingHead(FusionHead):
    """The same, resized to the size of the input between the convolutions.

    They are called one by one, for transformers turns that size into plain integers, which ties a traced model to it.
    """

    def __init__(self, neck: Any, head: Any, inputs: tuple[FeatureSpec, ...], settings: HubSettings) -> None:
        super().__init__(neck, head, inputs, 1, settings)
        self.spec = HeadSpec(1, 1, 1, MaskNorm.SOFTMAX, ValueKind.IDENTITY)

    def answer(self, fused: list[Tensor], height: int, width: int) -> Float[Tensor, "B 1 H W"]:
        """Depth at the size of the input."""
        head = self.head
        size_hw = (height * self.patch_px, width * self.patch_px)
        x = F.interpolate(head.conv1(fused[head.head_in_index]), size=size_hw, mode="bilinear", align_corners=True)
        return head.activation2(head.conv3(head.activation1(head.conv2(x)))) * head.max_depth


def dpt(net: DPTForDepthEstimation | DPTForSemanticSegmentation, settings: HubSettings) -> DensePredictor:
    """Its weights lie below `backbone.net` (theirs: `dpt` or `backbone`), `head.neck` and `head.head`."""
    other: Any = getattr(net, "backbone", None)
    patches = round(1 / min(1, *net.config.reassemble_factors))  # else the coarsest map, doubled, is too large
    backbone = (
        TransformerLayers(net.dpt, patches, settings) if other is None else Dinov2Layers(other, patches, settings)
    )
    decoder = PassThrough(backbone.features)
    config: Any = net.config
    queries = config.num_labels if isinstance(net, DPTForSemanticSegmentation) else 1
    return DensePredictor(backbone, decoder, FusionHead(net.neck, net.head, decoder.features, queries, settings))


def depth_anything(net: DepthAnythingForDepthEstimation, settings: HubSettings) -> DensePredictor:
    """Its weights lie below `backbone.net` (theirs: `backbone`), `head.neck` and `head.head`."""
    backbone = Dinov2Layers(net.backbone, 1, settings)
    decoder = PassThrough(backbone.features)
    return DensePredictor(backbone, decoder, DepthAnythingHead(net.neck, net.head, decoder.features, settings))
