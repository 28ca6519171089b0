"""The types that flow through a dense predictor, and the protocols its parts keep.

Legend for shapes: B batch, Q queries, K classes, D value width, N segments, H W input size in px, h w mask grid.
"""

from dataclasses import dataclass, fields
from enum import Enum
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
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

    IDENTITY: channel q of the masks is component q of the answer (class logit q of a per-pixel classifier, metres, a
    component of a normal); `values` is the identity matrix and no decoder needs to blend with it.
    BLENDED: the answer at a pixel is sum_q mask_prob[q] * values[q] (PolyMaX).
    CLASS_LOGITS: values[q] are logits over K classes and, last, "no object": D = K + 1 (mask classification).
    CENTRE_OFFSET: no queries yet: the Q = K + 3 masks are K class logits, the logit that a centre is here, and the
    way to the centre of the pixel's object, down and right, in input px (Panoptic-DeepLab); `values` is the identity.
    """

    IDENTITY = "channel q is component q"
    BLENDED = "blended by masks"
    CLASS_LOGITS = "class logits, no object last"
    CENTRE_OFFSET = "class logits, centre logit, offset"


@dataclass(frozen=True)
class HeadSpec:
    """What a head returns, so that a decoder never guesses.

    mask_stride: input px per cell of the mask grid. aux: of the outputs in `QueryOutput.aux`, in their order.
    """

    num_queries: int
    value_dim: int
    mask_stride: int
    mask_norm: MaskNorm
    value_kind: ValueKind
    aux: tuple["HeadSpec", ...] = ()


@dataclass(frozen=True)
class QueryOutput:
    """A set of masks, and what each mask says. Not checked here: torch rebuilds it with non-tensors while tracing.

    mask_logits: [B, Q, h, w]; values: [B, Q, D]; pixel_embed: [B, C, h, w], unit vectors, or None;
    aux: outputs of earlier layers or auxiliary branches, used by losses only: as many as `HeadSpec.aux` while
    training, none in evaluation mode.
    """

    mask_logits: Float[Tensor, "B Q h w"]
    values: Float[Tensor, "B Q D"]
    pixel_embed: Tensor | None = None
    aux: tuple["QueryOutput", ...] = ()


torch.export.register_dataclass(QueryOutput, serialized_type_name="denselab.QueryOutput")


@dataclass(frozen=True)
class SegmentTargets:
    """The true segments of one image, cut and padded as the image is.

    masks: bool [N, H, W], may overlap; class_ids: int64 [N], 0..K-1. void: bool [H, W], pixels of which nothing is
    known (crowds, padding, ignored ones); other pixels in no mask belong to no object. None: all in no mask are void.
    """

    masks: Bool[Tensor, "N H W"]
    class_ids: Int[Tensor, "N"]
    void: Bool[Tensor, "H W"] | None = None


@dataclass(frozen=True)
class Targets:
    """What is true of a batch, for the tasks that are trained; None for the others. Padding is void everywhere.

    class_ids: int64 [B, H, W], 255 void. segments: per image. depth_m: float32 [B, H, W] metres, 0 unknown.
    normals: float32 [B, 3, H, W], unit, x right, y down, z forward; zeros unknown.
    """

    class_ids: Int[Tensor, "B H W"] | None = None
    segments: tuple[SegmentTargets, ...] | None = None
    depth_m: Float[Tensor, "B H W"] | None = None
    normals: Float[Tensor, "B 3 H W"] | None = None

    def to(self, device: torch.device) -> "Targets":
        """The same on a device."""
        return _moved(self, device)


def _moved(value: Any, device: torch.device) -> Any:
    match value:
        case Tensor():
            return value.to(device, non_blocking=True)
        case tuple():
            return tuple(_moved(each, device) for each in value)
        case SegmentTargets() | Targets():
            return type(value)(*(_moved(getattr(value, each.name), device) for each in fields(value)))
        case _:
            return value


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


@runtime_checkable
class Scheduled(Protocol):
    """A part that changes over a training run, as the mask annealing of EoMT does."""

    def set_progress(self, progress: float) -> None:
        """progress: share of the run that is over, 0..1."""
        ...
