"""Instance segmentation: every mask that says a thing, best first; masks may overlap."""

from dataclasses import dataclass
from typing import assert_never

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from denselab.tasks.blend import prober
from denselab.types import HeadSpec, MaskNorm, QueryOutput

AT_ONCE = 4
"""Masks that are upsampled together: a hundred at 3 megapixels would take gigabytes."""

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
    probs_of, least = prober(output.mask_logits, spec, size_hw, network_hw, AT_ONCE), _confidence(spec.mask_norm, rules)
    sure = torch.cat([_mean_inside(probs_of(some), least) for some in slots.split(AT_ONCE, dim=1)], dim=1)
    scores, order = (scores * sure).topk(count, dim=1)
    # Once more in their order: an engine that keeps all masks to sort them needs many times the memory.
    masks = [(probs_of(some) > least).byte() for some in slots.gather(1, order).split(AT_ONCE, dim=1)]
    return torch.cat(masks, dim=1), labels.gather(1, order).int(), scores


def _mean_inside(probs: Float[Tensor, "B N H W"], least: float) -> Float[Tensor, "B N"]:
    """Mean mask probability where it is above `least`, 0 where it is nowhere."""
    inside = (probs > least).to(probs.dtype)
    return (probs * inside).sum(dim=(2, 3)) / inside.sum(dim=(2, 3)).clamp(min=1)


def _confidence(norm: MaskNorm, rules: InstanceRules) -> float:
    match norm:
        case MaskNorm.SOFTMAX:
            return rules.mask_confidence
        case MaskNorm.SIGMOID:
            return 0.5
        case _:
            assert_never(norm)
