"""The objective of MaX-DeepLab, as kMaX-DeepLab trains with it, for heads whose masks compete over queries.

Wang et al.: MaX-DeepLab, CVPR 2021, section 3.2 (PQ-style loss) and its auxiliary losses; Yu et al.: k-means Mask
Transformer, ECCV 2022. Where they are silent, kmax-deeplab@f8e1d04 kmax_deeplab/modeling/criterion.py, matcher.py.

Deviations. Targets are shares of cells (`masks_on_grid`), not bits: a cell that is partly void counts by its
labelled share. Pixel losses are means over labelled pixels, where the code counts the losses that are not exactly 0.
Segments beyond the number of queries stay unmatched and their pixels become void; the code fails. Earlier layers are
resized to the final mask grid here and not in the head. The background of data that label objects only (`void` of
SegmentTargets), which the paper does not know, belongs to the queries without a segment, whichever they are.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import assert_never

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from denselab.losses.matching import background, ids_on_grid, masks_on_grid, match, resized
from denselab.losses.remax import ReMax, reclass, remask
from denselab.types import HeadSpec, QueryOutput, SegmentTargets, ValueKind

_LEAST_WEIGHT = 1e-5
_VOID_SCORE = -99999.0
_NEVER = -1e9
_LEAST_SAMPLES = 256
_POSITIVE = 0.75  # alpha of the paper; negatives count 1 - alpha


class NegativeWeight(Enum):
    """What the class loss of a query without a segment counts, before 1 - alpha.

    VOID_OVERLAP: the share of its mask that lies in no segment, at least 1e-5, as in both published codes: only a
    query that claims such pixels is taught "no object"; others keep what the head's bias towards it gives them.
    ONE: as in the paper (section 3.2).
    """

    VOID_OVERLAP = "overlap with void"
    ONE = "one"


@dataclass(frozen=True)
class MaxDeepLabWeights:
    """How much each term counts, and how terms are made; the defaults are those of kMaX-DeepLab on COCO.

    class_, dice: the two halves of the PQ-style loss. mask_id: cross entropy over queries per pixel. instance:
    instance discrimination. semantic: auxiliary semantic cross entropy, counted once. Terms at 0 are not computed.
    instance_samples, semantic_samples: pixels drawn per image; 0: all pixels, without chance (semantic only).
    instance_share: of the grid that instance_samples may be at most, but for 256; 0.16 is what 4096 are of the
    published 161x161 cells. The cost grows with the square of the samples: on small images they would be most of a
    training step.
    share_matching: earlier outputs are taught by the matching of the final one.
    dice_on_void: what a mask claims on void counts against its dice too.
    negatives: VOID_OVERLAP is the default because every published score was reached with it, and because with ONE
    the hundred queries without a segment outweigh, at the start of training, the ten with one by about a hundred to
    one: the class loss of these counts their dice, which begins near 0.05.
    """

    class_: float = 3.0
    dice: float = 3.0
    mask_id: float = 0.3
    instance: float = 1.0
    semantic: float = 1.0
    instance_samples: int = 4096
    instance_share: float = 0.16
    semantic_samples: int = 4096
    instance_sample_temperature: float = 1.5
    semantic_sample_temperature: float = 2.0
    instance_temperature: float = 0.3
    share_matching: bool = True
    dice_on_void: bool = False
    negatives: NegativeWeight = NegativeWeight.VOID_OVERLAP


KMAX_COCO = MaxDeepLabWeights()

Noise = torch.Generator | Iterable[Tensor] | None
Draw = Callable[[Tensor], Tensor]
"""Uniform numbers in [0, 1), as many as a tensor has, in its shape."""


def max_deeplab_loss(
    output: QueryOutput,
    spec: HeadSpec,
    targets: tuple[SegmentTargets, ...],
    class_ids: Int[Tensor, "B H W"] | None,
    weights: MaxDeepLabWeights = KMAX_COCO,
    remax: ReMax | None = None,
    noise: Noise = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum over all outputs in float32, and each term by name, unweighted and detached.

    output: class logits and masks that compete; where it has `pixel_embed`, instance discrimination is trained. In
    `aux`, IDENTITY values are the semantic branch, CLASS_LOGITS earlier layers, whose terms end in "_0", "_1", ...
    class_ids: what the semantic branch is taught, 255 void.
    noise: what pixels are drawn with: a generator on the output's device, or uniform numbers [B, pixels] for every
    draw in this order: final pixels, semantic pixels, pixels of each earlier layer.
    """
    with torch.autocast(output.mask_logits.device.type, enabled=False):
        return _objective(output, spec, targets, class_ids, weights, remax, _draw(noise))


def _objective(
    output: QueryOutput,
    spec: HeadSpec,
    targets: tuple[SegmentTargets, ...],
    class_ids: Int[Tensor, "B H W"] | None,
    weights: MaxDeepLabWeights,
    remax: ReMax | None,
    draw: Draw,
) -> tuple[Tensor, dict[str, Tensor]]:
    hw = _hw(output.mask_logits)
    shares = [masks_on_grid(each.masks, hw, spec.mask_stride) for each in targets]
    branches = list(zip(output.aux, spec.aux, strict=True)) if output.aux else []
    layers = [aux for aux, kind in branches if kind.value_kind is ValueKind.CLASS_LOGITS]
    semantic = next((branch for branch in branches if branch[1].value_kind is ValueKind.IDENTITY), None)

    final = _at(output, hw)
    assigned = _assign(final, targets, shares, spec, weights)
    soften = _ReClass(remax.eta, _class_shares(targets, shares, spec.value_dim - 1)) if remax and remax.eta else None
    scaled: list[Tensor] = []
    parts: dict[str, Tensor] = {}

    def add(terms: dict[str, tuple[float, Tensor]], suffix: str = "") -> None:
        scaled.extend(scale * term for scale, term in terms.values())
        parts.update({name + suffix: term.detach() for name, (_, term) in terms.items()})

    add(_terms(final, assigned, weights, soften, draw))
    if semantic and class_ids is not None and weights.semantic:
        logits, stride = semantic[0].mask_logits.float(), semantic[1].mask_stride
        ids = ids_on_grid(class_ids, _hw(logits), stride)
        areas = _at_centres(assigned.areas, spec.mask_stride, _hw(logits), stride)
        areas = areas.where((areas > 0) | (ids == 255), areas[0].numel())  # of a class, but of no segment
        temperature = weights.semantic_sample_temperature
        loss = semantic_loss(logits, ids, areas, weights.semantic_samples, temperature, draw)
        add({"semantic": (weights.semantic, loss)})
    for index, layer in enumerate(layers):
        earlier = _at(layer, hw)
        if semantic and remax and index < remax.relaxed_layers:
            gate = resized(semantic[0].mask_logits.float(), hw)
            gated = remask(earlier.mask_logits, earlier.values, gate)
            earlier = QueryOutput(gated, earlier.values, earlier.pixel_embed)
        if not weights.share_matching:
            assigned = _assign(earlier, targets, shares, spec, weights)
        add(_terms(earlier, assigned, weights, soften, draw), f"_{index}")
    return torch.stack(scaled).sum(), parts


@dataclass(frozen=True)
class _Assigned:
    """What each query of a batch is taught.

    masks: adds up over queries to the share of a cell that is in a segment; zeros where no segment is matched.
    background: the share that is known to be in none, None where data do not tell it from void. labelled: both
    together. classes: one-hot, "no object" last. class_weights, mask_weights: the stop-gradient factors of the
    PQ-style loss. areas: the size in cells of the mask that a cell belongs to, 0 where there is none.
    """

    masks: Float[Tensor, "B Q h w"]
    background: Float[Tensor, "B h w"] | None
    labelled: Float[Tensor, "B h w"]
    classes: Float[Tensor, "B Q D"]
    class_weights: Float[Tensor, "B Q"]
    mask_weights: Float[Tensor, "B Q"]
    areas: Float[Tensor, "B h w"]


@torch.no_grad()
def _assign(
    output: QueryOutput,
    targets: tuple[SegmentTargets, ...],
    shares: Sequence[Float[Tensor, "N h w"]],
    spec: HeadSpec,
    weights: MaxDeepLabWeights,
) -> _Assigned:
    """Match by the similarity p(c) * dice, and lay out what follows from it per query."""
    mask_probs, class_probs = output.mask_logits.softmax(dim=1), output.values.softmax(dim=-1)
    hw, stride, num_classes = _hw(mask_probs), spec.mask_stride, spec.value_dim - 1

    def share(pixels: Sequence[Bool[Tensor, "H W"]]) -> Float[Tensor, "B h w"]:
        return torch.cat([masks_on_grid(each[None], hw, stride) for each in pixels])

    objects = [each.masks.any(dim=0) for each in targets]
    nothing = share([background(each) for each in targets]) if any(each.void is not None for each in targets) else None
    labelled = share(objects) if nothing is None else share(objects) + nothing
    dices = [dice_similarity(*each) for each in zip(mask_probs, shares, labelled, strict=True)]
    recognised = [probs[:, each.class_ids] for probs, each in zip(class_probs, targets, strict=True)]
    matches = match([-dice * probs for dice, probs in zip(dices, recognised, strict=True)])

    masks = torch.zeros_like(mask_probs)
    class_ids = torch.full(mask_probs.shape[:2], num_classes, device=mask_probs.device)
    mask_weights = mask_probs.new_zeros(mask_probs.shape[:2])
    for index, (pairs, each) in enumerate(zip(matches, targets, strict=True)):
        if len(pairs.queries) < len(each.masks):
            objects[index] = each.masks[pairs.segments].any(dim=0)
        masks[index, pairs.queries] = shares[index][pairs.segments]
        class_ids[index, pairs.queries] = each.class_ids[pairs.segments]
        mask_weights[index, pairs.queries] = recognised[index][pairs.queries, pairs.segments].clamp(min=_LEAST_WEIGHT)
    in_one = share(objects)
    masks *= (in_one / masks.sum(dim=1).clamp(min=1e-12))[:, None]  # where masks overlap they share the cell

    match weights.negatives:
        case NegativeWeight.VOID_OVERLAP:
            outside = torch.einsum("bqhw,bhw->bq", mask_probs, 1 - in_one)
            class_weights = outside / (mask_probs.sum(dim=(2, 3)) + 1e-5)
        case NegativeWeight.ONE:
            class_weights = torch.ones_like(mask_weights)
        case _:
            assert_never(weights.negatives)
    for index, pairs in enumerate(matches):
        class_weights[index, pairs.queries] = dices[index][pairs.queries, pairs.segments]
    return _Assigned(
        masks,
        nothing,
        in_one if nothing is None else in_one + nothing,
        F.one_hot(class_ids, num_classes + 1).float(),
        class_weights.clamp(min=_LEAST_WEIGHT),
        mask_weights,
        torch.einsum("bqhw,bq->bhw", masks, masks.sum(dim=(2, 3))),
    )


@dataclass(frozen=True)
class _ReClass:
    eta: float
    class_shares: Float[Tensor, "B K h w"]


def _terms(
    output: QueryOutput, assigned: _Assigned, weights: MaxDeepLabWeights, soften: _ReClass | None, draw: Draw
) -> dict[str, tuple[float, Tensor]]:
    """The terms of one output by name, each with its weight."""
    classes = assigned.classes
    if soften:
        classes = reclass(classes, output.mask_logits.softmax(dim=1), soften.class_shares, soften.eta)
    counted = 1 if weights.dice_on_void else assigned.labelled[:, None]
    terms: dict[str, tuple[float, Callable[[], Tensor]]] = {
        "class": (weights.class_, lambda: class_loss(output.values, classes, assigned.class_weights)),
        "dice": (
            weights.dice,
            lambda: dice_loss(output.mask_logits.softmax(dim=1) * counted, assigned.masks, assigned.mask_weights),
        ),
        "mask_id": (weights.mask_id, lambda: mask_id_loss(output.mask_logits, assigned.masks, assigned.background)),
    }
    embed = output.pixel_embed
    if embed is not None:
        terms["instance"] = (weights.instance, lambda: _instance_term(embed, assigned, weights, draw))
    return {name: (scale, term()) for name, (scale, term) in terms.items() if scale}


def dice_similarity(
    mask_probs: Float[Tensor, "Q h w"], masks: Float[Tensor, "N h w"], labelled: Float[Tensor, "h w"]
) -> Float[Tensor, "Q N"]:
    """Dice coefficient 2 sum(p m) / (sum p + sum m) of every query with every segment, outside void."""
    probs = mask_probs * labelled
    overlap = torch.einsum("qhw,nhw->qn", probs, masks)
    return overlap / ((probs.sum(dim=(1, 2))[:, None] + masks.sum(dim=(1, 2))) / 2 + 1e-5)


def class_loss(
    class_logits: Float[Tensor, "B Q D"], classes: Float[Tensor, "B Q D"], class_weights: Float[Tensor, "B Q"]
) -> Tensor:
    """Weighted cross entropy, mean over queries: alpha for those with a segment, 1 - alpha for "no object"."""
    losses = F.cross_entropy(class_logits.movedim(2, 1), classes.movedim(2, 1), reduction="none")
    empty = classes[..., -1]
    return (losses * class_weights * (_POSITIVE * (1 - empty) + (1 - _POSITIVE) * empty)).mean()


def dice_loss(
    mask_probs: Float[Tensor, "B Q h w"], masks: Float[Tensor, "B Q h w"], mask_weights: Float[Tensor, "B Q"]
) -> Tensor:
    """alpha * mean over queries of (1 - (2 sum(p m) + 1) / (sum p + sum m + 1)), weighted by class probability."""
    overlap = 2 * (mask_probs * masks).sum(dim=(2, 3)) + 1
    total = (mask_probs + masks).sum(dim=(2, 3)) + 1
    return _POSITIVE * (mask_weights * (1 - overlap / total)).mean()


def mask_id_loss(
    mask_logits: Float[Tensor, "B Q h w"],
    masks: Float[Tensor, "B Q h w"],
    background: Float[Tensor, "B h w"] | None = None,
) -> Tensor:
    """Cross entropy over queries at every labelled cell; mean over these, then over images.

    background: share of a cell that should go to queries without a mask, no matter which: -log of the sum of theirs.
    """
    losses = F.cross_entropy(mask_logits, masks, reduction="none").sum(dim=(1, 2))
    cells = masks.sum(dim=(1, 2, 3))
    if background is not None:
        taken = masks.sum(dim=(2, 3)) > 0
        free_logits = mask_logits.masked_fill(taken[:, :, None, None], _NEVER).logsumexp(dim=1)
        owed = background * ~taken.all(dim=1)[:, None, None]
        losses = losses + (owed * (mask_logits.logsumexp(dim=1) - free_logits)).sum(dim=(1, 2))
        cells = cells + owed.sum(dim=(1, 2))
    return (losses / cells.clamp(min=1)).mean()


def _instance_term(
    pixel_embed: Float[Tensor, "B C h2 w2"], assigned: _Assigned, weights: MaxDeepLabWeights, draw: Draw
) -> Tensor:
    share = round(assigned.areas[0].numel() * weights.instance_share)
    count = min(weights.instance_samples, max(_LEAST_SAMPLES, share))
    sampled = _sample(assigned.areas, count, weights.instance_sample_temperature, draw)
    own = assigned.masks.flatten(2).gather(2, sampled[:, None].expand(-1, assigned.masks.shape[1], -1))
    embed = _at_cells(pixel_embed.float(), sampled, _hw(assigned.masks))
    return instance_discrimination_loss(embed, own, weights.instance_temperature)


def instance_discrimination_loss(
    pixel_embed: Float[Tensor, "B C P"], masks: Float[Tensor, "B Q P"], temperature: float
) -> Tensor:
    """Cross entropy of each pixel's similarity to all others with whether they share a mask.

    Similarities are dot products over `temperature`; targets add up to 1 per pixel. Mean over labelled pixels, then
    over images. Pixels on void count nowhere, but as negatives of others. What belongs together is summed up per mask
    first, so that the only table of all pairs of pixels is that of the similarities.
    """
    scaled = pixel_embed / temperature
    sums = masks @ pixel_embed.transpose(1, 2)
    shared = torch.einsum("bqp,bq->bp", masks, masks.sum(dim=2))
    labelled = shared > 0
    to_shared = torch.einsum("bcp,bcp->bp", scaled, sums.transpose(1, 2) @ masks)
    own = F.log_softmax(scaled.transpose(1, 2) @ pixel_embed, dim=2).diagonal(dim1=1, dim2=2)
    to_all = (scaled * pixel_embed).sum(dim=1) - own
    losses = (shared * to_all - to_shared) / shared.clamp(min=1)
    return (losses.sum(dim=1) / labelled.sum(dim=1).clamp(min=1)).mean()


def semantic_loss(
    logits: Float[Tensor, "B K h w"],
    class_ids: Int[Tensor, "B h w"],
    areas: Float[Tensor, "B h w"],
    samples: int,
    temperature: float,
    draw: Draw,
) -> Tensor:
    """Cross entropy of the semantic branch at sampled pixels, small segments oftener; mean over labelled ones."""
    losses = F.cross_entropy(logits, class_ids, ignore_index=255, reduction="none").flatten(1)
    labelled = (class_ids != 255).flatten(1)
    if samples:
        sampled = _sample(areas, samples, temperature, draw)
        losses, labelled = losses.gather(1, sampled), labelled.gather(1, sampled)
    return (losses.sum(dim=1) / labelled.sum(dim=1).clamp(min=1)).mean()


@torch.no_grad()
def _sample(areas: Float[Tensor, "B h w"], count: int, temperature: float, draw: Draw) -> Int[Tensor, "B P"]:
    """Cells drawn without replacement, likely as areas ** -temperature, void last (Gumbel-top-k, Kool et al. 2019)."""
    flat = areas.flatten(1)
    scores = -temperature * flat.clamp(min=1).log() + _VOID_SCORE * (flat == 0)
    gumbel = -(-draw(flat).clamp(min=1e-20).log()).log()
    return (scores + gumbel).topk(min(count, flat.shape[1]), dim=1).indices


def _draw(noise: Noise) -> Draw:
    if noise is None or isinstance(noise, torch.Generator):
        return lambda like: torch.rand(like.shape, generator=noise, device=like.device)
    given = iter(noise)
    return lambda like: next(given).to(like)


def _class_shares(
    targets: tuple[SegmentTargets, ...], shares: Sequence[Float[Tensor, "N h w"]], num_classes: int
) -> Float[Tensor, "B K h w"]:
    """The share of each cell that is of each class."""
    empty = shares[0].new_zeros(num_classes, *shares[0].shape[1:])
    each = [empty.index_add(0, target.class_ids, own) for target, own in zip(targets, shares, strict=True)]
    return torch.stack(each).clamp(max=1)


def _at(output: QueryOutput, hw: tuple[int, int]) -> QueryOutput:
    """In float32, masks on the final grid; embeddings are resized where they are sampled."""
    return QueryOutput(resized(output.mask_logits.float(), hw), output.values.float(), output.pixel_embed)


def _at_cells(
    maps: Float[Tensor, "B C h2 w2"], cells: Int[Tensor, "B P"], hw: tuple[int, int]
) -> Float[Tensor, "B C P"]:
    """Unit vectors at cells of a grid of height and width hw, bilinearly where the maps have another grid."""
    if _hw(maps) == hw:
        return maps.flatten(2).gather(2, cells[:, None].expand(-1, maps.shape[1], -1))
    right, down = (cells % hw[1] + 0.5) / hw[1], (cells // hw[1] + 0.5) / hw[0]
    places = 2 * torch.stack([right, down], dim=2)[:, :, None] - 1
    return F.normalize(F.grid_sample(maps, places, padding_mode="border", align_corners=False)[..., 0], dim=1)


def _at_centres(
    cells: Float[Tensor, "B h w"], stride: int, other_hw: tuple[int, int], other_stride: int
) -> Float[Tensor, "B h2 w2"]:
    """The cells in which the centre pixels of another grid lie."""
    down, right = (
        ((torch.arange(count, device=cells.device) * other_stride + (other_stride - 1) // 2) // stride).clamp(
            max=most - 1
        )
        for count, most in zip(other_hw, cells.shape[1:], strict=True)
    )
    return cells[:, down[:, None], right]


def _hw(maps: Tensor) -> tuple[int, int]:
    return maps.shape[-2], maps.shape[-1]
