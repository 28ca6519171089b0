"""Instance segmentation: every mask that says a thing, best first; masks may overlap."""

from dataclasses import dataclass
from typing import assert_never

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from denselab.tasks.blend import chosen_probs
from denselab.types import HeadSpec, MaskNorm, QueryOutput

InstanceAnswer = tuple[UInt8[Tensor, "B N H W"], Int[Tensor, "B N"], Float[Tensor, "B N"]]
"""masks uint8 [B, N, H, W] of 0 and 1, classes int32 [B, N], scores [B, N], best first."""


@dataclass(frozen=True)
class InstanceRules:
    """max_instances: how many masks are returned. mask_confidence: probability that makes a pixel a mask's, for masks
    that compete over queries (kMaX-DeepLab); for masks of their own it is 0.5 (MaskFormer).
    """

    max_instances: int = 100
    mask_confidence: float = 0.4


def decode(
    output: QueryOutput,
    spec: HeadSpec,
    size_hw: tuple[int, int],
    things: tuple[int, ...],
    rules: InstanceRules,
    network_hw: tuple[int, int] | None = None,
) -> InstanceAnswer:
    """The best pairs of mask and thing class at input size, of a head whose values are class logits.

    Score: class probability times mean mask probability inside the mask (Mask2Former, Cheng et al. 2022, appendix on
    post-processing). One mask may be returned under several classes, as the measure of the field, AP, rewards.
    """
    class_ids = torch.tensor(things, device=output.values.device)
    class_probs = output.values.softmax(dim=-1)[..., class_ids]
    count = min(rules.max_instances, class_probs.shape[1] * len(things))
    scores, places = class_probs.flatten(1).topk(count, dim=1)
    slots, labels = places // len(things), class_ids[places % len(things)]
    probs = chosen_probs(output.mask_logits, slots, spec, size_hw, network_hw)
    masks = probs > _confidence(spec.mask_norm, rules)
    confidence = (probs * masks).sum(dim=(2, 3)) / masks.sum(dim=(2, 3)).clamp(min=1)
    scores, order = (scores * confidence).topk(count, dim=1)
    masks = masks.gather(1, order[..., None, None].expand_as(masks))
    return masks.byte(), labels.gather(1, order).int(), scores


def _confidence(norm: MaskNorm, rules: InstanceRules) -> float:
    match norm:
        case MaskNorm.SOFTMAX:
            return rules.mask_confidence
        case MaskNorm.SIGMOID:
            return 0.5
        case _:
            assert_never(norm)
