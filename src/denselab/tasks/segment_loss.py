"""The loss of a head that finds segments, chosen by what its values are."""

from typing import assert_never

import torch
from jaxtyping import Int
from torch import Tensor

from denselab.classes import VOID
from denselab.losses.centre_offset import centre_offset_loss
from denselab.losses.mask_classification import mask_classification_loss
from denselab.losses.max_deeplab import max_deeplab_loss
from denselab.losses.pixel import LossWeights
from denselab.losses.remax import ReMax
from denselab.types import HeadSpec, MaskNorm, QueryOutput, SegmentTargets, ValueKind

Loss = tuple[Tensor, dict[str, Tensor]]
"""The sum that is minimised, and its parts by name, detached."""


def segment_loss(
    output: QueryOutput,
    spec: HeadSpec,
    segments: tuple[SegmentTargets, ...],
    class_ids: Int[Tensor, "B H W"],
    things: tuple[int, ...],
    remax: ReMax | None = None,
    class_loss: LossWeights | None = None,
) -> Loss:
    """MaX-DeepLab's where masks compete over queries, MaskFormer's where they do not, else Panoptic-DeepLab's.

    class_ids: 255 void. things: classes whose objects are told apart. remax: relaxes masks that compete (kMaX-DeepLab).
    class_loss: of the classes per pixel beside centres and offsets; None: as published.
    """
    match spec.value_kind:
        case ValueKind.CENTRE_OFFSET:
            return centre_offset_loss(output, spec, segments, class_ids, things, class_loss=class_loss)
        case ValueKind.CLASS_LOGITS if spec.mask_norm is MaskNorm.SOFTMAX:
            return max_deeplab_loss(output, spec, segments, class_ids, remax=remax)
        case ValueKind.CLASS_LOGITS:
            return mask_classification_loss(output, spec, segments)
        case ValueKind.IDENTITY | ValueKind.BLENDED:
            raise TypeError(f"value_kind: wanted CLASS_LOGITS or CENTRE_OFFSET, got {spec.value_kind}")
        case _:
            assert_never(spec.value_kind)


def segments_of_classes(class_ids: Int[Tensor, "B H W"], num_classes: int) -> tuple[SegmentTargets, ...]:
    """One segment per class that is in the image: what semantic labels teach a head that finds segments."""
    every = torch.arange(num_classes, device=class_ids.device)
    masks = class_ids[:, None] == every[None, :, None, None]
    present = masks.any(dim=3).any(dim=2)
    return tuple(SegmentTargets(own[there], every[there]) for own, there in zip(masks, present, strict=True))


def class_maps(segments: tuple[SegmentTargets, ...]) -> Int[Tensor, "B H W"]:
    """The class of the last segment at each pixel, 255 where there is none."""
    maps: list[Tensor] = []
    for each in segments:
        class_ids = each.class_ids.new_full(each.masks.shape[1:], VOID)
        for mask, class_id in zip(each.masks, each.class_ids, strict=True):
            class_ids = torch.where(mask, class_id, class_ids)
        maps.append(class_ids)
    return torch.stack(maps)
