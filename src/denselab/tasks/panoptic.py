"""Panoptic segmentation: masks that say a class compete for pixels."""

from dataclasses import dataclass
from typing import assert_never

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from denselab.tasks.blend import chosen_probs
from denselab.types import HeadSpec, MaskNorm, QueryOutput

PanopticAnswer = tuple[Int[Tensor, "B H W"], Int[Tensor, "B S"], Float[Tensor, "B S"]]
"""ids int32 [B, H, W], 0 void and n for slot n - 1; classes int32 [B, S] and scores [B, S] of the slots."""


@dataclass(frozen=True)
class MergeRules:
    """Which masks become segments.

    thing_score, stuff_score: class probability that a mask must exceed. mask_confidence: probability that makes a
    pixel a mask's. overlap: share of its own pixels that a mask must still find free. class_weight, mask_weight:
    exponents of the two factors of the score by which masks are ordered. max_segments: masks that are looked at, best
    class probability first. The defaults are those of kMaX-DeepLab on COCO (configs/coco/panoptic_segmentation).
    """

    thing_score: float = 0.7
    stuff_score: float = 0.5
    mask_confidence: float = 0.4
    overlap: float = 0.8
    class_weight: float = 1.0
    mask_weight: float = 1.0
    max_segments: int = 64


def decode(
    output: QueryOutput,
    spec: HeadSpec,
    size_hw: tuple[int, int],
    things: tuple[int, ...],
    rules: MergeRules,
    network_hw: tuple[int, int] | None = None,
) -> PanopticAnswer:
    """Segments at input size, of a head whose values are class logits.

    Masks that compete over queries are merged mask by mask (kMaX-DeepLab), masks of their own by the most probable
    one at every pixel (MaskFormer).
    """
    scores, labels = output.values.softmax(dim=-1)[..., :-1].max(dim=-1)
    slots = scores.topk(min(rules.max_segments, scores.shape[1]), dim=1).indices.sort(dim=1).values
    scores, labels = scores.gather(1, slots), labels.gather(1, slots)
    probs = chosen_probs(output.mask_logits, slots, spec, size_hw, network_hw)
    match spec.mask_norm:
        case MaskNorm.SOFTMAX:
            return merge_by_mask(scores, labels, probs, things, rules)
        case MaskNorm.SIGMOID:
            return merge_by_pixel(scores, labels, probs, things, rules)
        case _:
            assert_never(spec.mask_norm)


def merge_by_mask(
    scores: Float[Tensor, "B S"],
    labels: Int[Tensor, "B S"],
    probs: Float[Tensor, "B S H W"],
    things: tuple[int, ...],
    rules: MergeRules,
) -> PanopticAnswer:
    """Masks in falling order of score take the pixels that are free (kMaX-DeepLab, Yu et al. 2022, section 3.3).

    scores, labels: class probability and class id of each mask. The score is class probability times mean mask
    probability inside the mask.
    """
    masks = probs > rules.mask_confidence
    areas = masks.sum(dim=(2, 3))
    confidence = (probs * masks).sum(dim=(2, 3)) / areas.clamp(min=1)
    ranking = scores**rules.class_weight * confidence**rules.mask_weight
    order = _falling(ranking)
    sure = _sure(scores, labels, things, rules)
    masks = masks.gather(1, order[..., None, None].expand_as(masks))
    wanted = rules.overlap * areas.gather(1, order)
    kept = _kept(masks, wanted, sure.gather(1, order), at_most_pairs=rules.mask_confidence >= 1 / 3)
    count = order.shape[1]
    worth = torch.arange(count, 0, -1, device=order.device)  # the first in order is worth most
    best = (worth[:, None, None] * (masks & kept[..., None, None])).amax(dim=1)
    numbers = torch.cat([torch.zeros_like(order[:, :1]), (order + 1).flip(1)], dim=1)
    ids = numbers.gather(1, best.flatten(1)).reshape(best.shape).int()
    return _join_stuff(ids, order, kept, labels, ranking, things)


def _kept(
    masks: Bool[Tensor, "B S H W"], wanted: Float[Tensor, "B S"], sure: Bool[Tensor, "B S"], at_most_pairs: bool
) -> Bool[Tensor, "B S"]:
    """Which masks, taken in order, still find more free pixels than they want.

    at_most_pairs: no pixel is in three masks, as where each holds more than a third of the probability; then the
    overlaps of pairs say how much was taken, and the loop runs over numbers instead of pixels.
    """
    kept: list[Tensor] = []
    if not at_most_pairs:
        free = torch.ones_like(masks[:, 0])
        for index in range(masks.shape[1]):
            fresh = masks[:, index] & free
            kept.append(sure[:, index] & (fresh.sum(dim=(1, 2)) > wanted[:, index]))
            free = free & ~(fresh & kept[-1][:, None, None])
        return torch.stack(kept, dim=1)
    flat = masks.flatten(2).float()
    overlaps = flat @ flat.transpose(1, 2)
    taken = torch.zeros_like(wanted)
    for index in range(masks.shape[1]):
        kept.append(sure[:, index] & (overlaps[:, index, index] - taken[:, index] > wanted[:, index]))
        taken = taken + overlaps[:, index] * kept[-1][:, None]
    return torch.stack(kept, dim=1)


def merge_by_pixel(
    scores: Float[Tensor, "B S"],
    labels: Int[Tensor, "B S"],
    probs: Float[Tensor, "B S H W"],
    things: tuple[int, ...],
    rules: MergeRules,
) -> PanopticAnswer:
    """Every pixel goes to the mask with the highest class times mask probability (MaskFormer, section 3.4).

    A mask stays if it got enough of the pixels where its own probability is at least 0.5, and keeps those of them.
    """
    sure = _sure(scores, labels, things, rules)
    winner = (torch.where(sure, scores, 0.0)[..., None, None] * probs).max(dim=1).indices
    number = torch.arange(scores.shape[1], device=scores.device)[None, :, None, None]
    own, won = probs >= 0.5, winner[:, None] == number
    taken = own & won
    enough = won.sum(dim=(2, 3)) >= rules.overlap * own.sum(dim=(2, 3))
    kept = sure & enough & taken.any(dim=3).any(dim=2)
    ids = ((number + 1) * (taken & kept[..., None, None])).sum(dim=1).int()
    order = _falling(scores)
    return _join_stuff(ids, order, kept.gather(1, order), labels, scores, things)


def _falling(scores: Float[Tensor, "B S"]) -> Int[Tensor, "B S"]:
    return scores.topk(scores.shape[1], dim=1).indices  # a sort, but for engines that have none


def is_thing(labels: Int[Tensor, "B S"], things: tuple[int, ...]) -> Bool[Tensor, "B S"]:
    """Whether a class id is one of the things."""
    return (labels[..., None] == torch.tensor(things, dtype=labels.dtype, device=labels.device)).any(dim=-1)


def _sure(
    scores: Float[Tensor, "B S"], labels: Int[Tensor, "B S"], things: tuple[int, ...], rules: MergeRules
) -> Bool[Tensor, "B S"]:
    thing = is_thing(labels, things)
    return (thing & (scores > rules.thing_score)) | (~thing & (scores > rules.stuff_score))


def _join_stuff(
    ids: Int[Tensor, "B H W"],
    order: Int[Tensor, "B S"],
    kept: Bool[Tensor, "B S"],
    labels: Int[Tensor, "B S"],
    scores: Float[Tensor, "B S"],
    things: tuple[int, ...],
) -> PanopticAnswer:
    """Give all stuff of one class the id of its first mask. kept: of the masks in `order`; labels, scores: of slots."""
    ordered = labels.gather(1, order)
    same = (ordered[:, :, None] == ordered[:, None, :]) & kept[:, None, :]
    first = same.int().argmax(dim=2)  # the place in the order of the first mask kept with that class
    home = torch.where(is_thing(ordered, things), order, order.gather(1, first))
    new_id = torch.zeros_like(order).scatter(1, order, home + 1)
    table = torch.cat([torch.zeros_like(new_id[:, :1]), new_id], dim=1).int()
    batch, height, width = ids.shape
    joined = table.gather(1, ids.reshape(batch, -1).long()).reshape(batch, height, width)
    used = torch.zeros_like(kept).scatter(1, order, kept & (home == order))
    return joined, labels.int(), torch.where(used, scores, 0.0)
