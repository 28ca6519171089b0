"""The types that flow through a dense predictor, and the protocols its parts keep.

Legend for shapes: B batch, Q queries, K classes, D value width, H W input size in px, h w mask grid.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class ImageBatch:
    """Images of one batch, padded right and bottom to a common size.

    pixels: float32 [B, 3, H, W], RGB in [0, 1]; not mean/std-normalised, the model owns that.
    valid: bool [B, H, W], False on padding.
    source_hw: height and width of every image before padding, in px.
    """

    pixels: Float[Tensor, "B 3 H W"]
    valid: Bool[Tensor, "B H W"]
    source_hw: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class FeatureSpec:
    """One feature map: its channels, and how many input px one of its cells spans."""

    channels: int
    stride: int


class MaskNorm(Enum):
    """How mask logits become probabilities: compete over queries, or each query by itself."""

    SOFTMAX = "softmax over queries"
    SIGMOID = "sigmoid per query"


class ValueKind(Enum):
    """What the values of a head are.

    IDENTITY: query q says class q (a per-pixel classifier); `values` is the identity matrix and no decoder
    needs to blend with it. LEARNED: values are predicted.
    """

    IDENTITY = "query q is class q"
    LEARNED = "predicted"


@dataclass(frozen=True)
class HeadSpec:
    """What a head returns, so that a decoder never guesses.

    mask_stride: input px per cell of the mask grid.
    """

    num_queries: int
    value_dim: int
    mask_stride: int
    mask_norm: MaskNorm
    value_kind: ValueKind


@dataclass(frozen=True)
class QueryOutput:
    """A set of masks, and what each mask says. Not checked here: torch rebuilds it with non-tensors while tracing.

    mask_logits: [B, Q, h, w]; values: [B, Q, D]; pixel_embed: [B, C, h, w] or None;
    aux: outputs of earlier layers or auxiliary branches, used by losses only.
    """

    mask_logits: Float[Tensor, "B Q h w"]
    values: Float[Tensor, "B Q D"]
    pixel_embed: Tensor | None = None
    aux: tuple["QueryOutput", ...] = ()


torch.export.register_dataclass(QueryOutput, serialized_type_name="denselab.QueryOutput")


@runtime_checkable
class Backbone(Protocol):
    """Pixels to feature maps, finest first, one per entry of `features`.

    size_multiple: H and W of the input are multiples of this (the model pads).
    mean, std: RGB statistics the backbone was trained with, for pixels in [0, 1].
    """

    features: tuple[FeatureSpec, ...]
    size_multiple: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, pixels: Float[Tensor, "B 3 H W"]) -> tuple[Tensor, ...]: ...


@runtime_checkable
class PixelDecoder(Protocol):
    """Feature maps to finer feature maps; takes what its backbone's `features` announce."""

    features: tuple[FeatureSpec, ...]

    def __call__(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]: ...


@runtime_checkable
class Head(Protocol):
    """Feature maps of the pixel decoder to a QueryOutput."""

    spec: HeadSpec

    def __call__(self, maps: tuple[Tensor, ...]) -> QueryOutput: ...
