"""The objective of MaskFormer and Mask2Former, for heads whose masks are told each by itself.

Cheng et al.: Per-Pixel Classification is Not All You Need, NeurIPS 2021, section 3.3; Cheng et al.: Masked-attention
Mask Transformer, CVPR 2022, section 3.3 (points, after PointRend) and 3.2.2; Carion et al.: DETR, ECCV 2020, eq. 1-3.

Deviations. Matching looks at every cell of the mask grid, without chance, where Mask2Former draws points. So does the
loss on grids of at most `points` cells, with shares of cells as soft targets; on larger ones it draws points, where
the true masks are read at input size, so that no object is too small. Pixels of which nothing is known, and padding,
count in neither; points are not drawn there on purpose. Losses are divided by the segments of this process's batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import assert_never

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from denselab.losses.matching import Match, background, masks_on_grid, match, resized
from denselab.types import HeadSpec, QueryOutput, SegmentTargets, ValueKind


class PixelLoss(Enum):
    """What a mask logit costs: binary cross entropy (Mask2Former), or focal, alpha 0.25, gamma 2 (MaskFormer)."""

    CROSS_ENTROPY = "binary cross entropy"
    FOCAL = "focal"


@dataclass(frozen=True)
class MaskClassificationWeights:
    """How much each term counts, in the loss and in the cost of matching alike, and how terms are made.

    no_object: weight of queries without a segment in the class loss. points: per mask, None: every cell; a share
    `important` of them are the least certain of `oversample` times as many, the rest even.
    """

    class_: float = 2.0
    mask: float = 5.0
    dice: float = 5.0
    no_object: float = 0.1
    pixel_loss: PixelLoss = PixelLoss.CROSS_ENTROPY
    points: int | None = 12544
    oversample: float = 3.0
    important: float = 0.75


MASK2FORMER = MaskClassificationWeights()
MASKFORMER = MaskClassificationWeights(class_=1, mask=20, dice=1, pixel_loss=PixelLoss.FOCAL, points=None)


def mask_classification_loss(
    output: QueryOutput,
    spec: HeadSpec,
    targets: tuple[SegmentTargets, ...],
    weights: MaskClassificationWeights = MASK2FORMER,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum over all outputs in float32, and each term by name, unweighted and detached.

    output: class logits and sigmoid masks. Every earlier output with class logits is matched by itself; names of its
    terms end in "_0", "_1", ... generator: what points are drawn with, on the device of the output.
    """
    with torch.autocast(output.mask_logits.device.type, enabled=False):
        return _objective(output, spec, targets, weights, generator)


def _objective(
    output: QueryOutput,
    spec: HeadSpec,
    targets: tuple[SegmentTargets, ...],
    weights: MaskClassificationWeights,
    generator: torch.Generator | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    hw = (output.mask_logits.shape[2], output.mask_logits.shape[3])
    earlier = zip(output.aux, spec.aux, strict=True) if output.aux else ()
    layers = [aux for aux, kind in earlier if kind.value_kind is ValueKind.CLASS_LOGITS]
    outputs = [QueryOutput(resized(each.mask_logits.float(), hw), each.values.float()) for each in (output, *layers)]
    truth = [_truth(each, hw, spec.mask_stride) for each in targets]
    costs = [
        matching_cost(mask_logits, class_logits, each.class_ids, each.mask_shares, each.known_share, weights)
        for layer in outputs
        for mask_logits, class_logits, each in zip(layer.mask_logits, layer.values, truth, strict=True)
    ]
    matches = match(costs)

    scaled: list[Tensor] = []
    parts: dict[str, Tensor] = {}
    for index, layer in enumerate(outputs):
        pairs = matches[index * len(truth) : (index + 1) * len(truth)]
        own = _terms(layer, truth, pairs, weights, generator)
        scaled += [weights.class_ * own["class"], weights.mask * own["mask"], weights.dice * own["dice"]]
        parts |= {name + (f"_{index - 1}" if index else ""): term.detach() for name, term in own.items()}
    return torch.stack(scaled).sum(), parts


@dataclass(frozen=True)
class _Truth:
    """Segments of one image: at input size, and as shares of the cells of the mask grid."""

    masks: Bool[Tensor, "N H W"]
    known: Bool[Tensor, "H W"]
    class_ids: Int[Tensor, "N"]
    mask_shares: Float[Tensor, "N h w"]
    known_share: Float[Tensor, "h w"]
    stride: int


def _truth(target: SegmentTargets, hw: tuple[int, int], stride: int) -> _Truth:
    known = target.masks.any(dim=0) | background(target)
    mask_shares, known_share = masks_on_grid(target.masks, hw, stride), masks_on_grid(known[None], hw, stride)[0]
    return _Truth(target.masks, known, target.class_ids, mask_shares, known_share, stride)


def _terms(
    output: QueryOutput,
    truth: Sequence[_Truth],
    matches: Sequence[Match],
    weights: MaskClassificationWeights,
    generator: torch.Generator | None,
) -> dict[str, Tensor]:
    class_ids = torch.full(output.values.shape[:2], output.values.shape[2] - 1, device=output.values.device)
    pixel_losses: list[Tensor] = [output.mask_logits.sum() * 0]
    dice_losses: list[Tensor] = [output.mask_logits.sum() * 0]
    for index, (pairs, each) in enumerate(zip(matches, truth, strict=True)):
        class_ids[index, pairs.queries] = each.class_ids[pairs.segments]
        logits = output.mask_logits[index, pairs.queries]
        if weights.points is None or each.known_share.numel() <= weights.points:
            inside, known = each.mask_shares[pairs.segments].flatten(1), each.known_share.flatten()[None]
            logits = logits.flatten(1)
        else:
            points = _points(logits, each, weights, generator)
            inside, known = _at_points(each, pairs.segments, points)
            logits = logits_at(logits, points)
        pixel_losses.append(pixel_loss(logits, inside, known, weights.pixel_loss).sum())
        dice_losses.append(dice_loss(logits, inside, known).sum())
    count = max(1, sum(len(pairs.queries) for pairs in matches))
    return {
        "class": class_loss(output.values, class_ids, weights.no_object),
        "mask": torch.stack(pixel_losses).sum() / count,
        "dice": torch.stack(dice_losses).sum() / count,
    }


@torch.no_grad()
def matching_cost(
    mask_logits: Float[Tensor, "Q h w"],
    class_logits: Float[Tensor, "Q D"],
    class_ids: Int[Tensor, "N"],
    masks: Float[Tensor, "N h w"],
    known: Float[Tensor, "h w"],
    weights: MaskClassificationWeights,
) -> Float[Tensor, "Q N"]:
    """Of every query for every segment: its terms as in the loss, but -p(c) for the class (DETR, section 3.1)."""
    logits, inside, seen = mask_logits.flatten(1), masks.flatten(1), known.flatten()
    if_inside, if_outside = _pixel_costs(logits, weights.pixel_loss)
    pixel = (if_inside @ inside.T + if_outside @ (seen - inside).T) / seen.sum().clamp(min=1)
    probs = logits.sigmoid() * seen
    dice = 1 - (2 * probs @ inside.T + 1) / (probs.sum(dim=1)[:, None] + inside.sum(dim=1) + 1)
    class_probs = class_logits.softmax(dim=1)[:, class_ids]
    return weights.mask * pixel + weights.dice * dice - weights.class_ * class_probs


def class_loss(class_logits: Float[Tensor, "B Q D"], class_ids: Int[Tensor, "B Q"], no_object: float) -> Tensor:
    """Weighted mean cross entropy over the queries of a batch; the last class, "no object", weighs `no_object`."""
    weight = class_logits.new_ones(class_logits.shape[2])
    weight[-1] = no_object
    return F.cross_entropy(class_logits.flatten(0, 1), class_ids.flatten(), weight)


def pixel_loss(
    logits: Float[Tensor, "M P"], inside: Float[Tensor, "M P"], known: Float[Tensor, "_ P"], kind: PixelLoss
) -> Float[Tensor, "M"]:
    """Mean cross entropy, or focal loss, over the known points of each mask. inside: share in the mask, <= known."""
    if_inside, if_outside = _pixel_costs(logits, kind)
    return (if_inside * inside + if_outside * (known - inside)).sum(dim=1) / known.sum(dim=1).clamp(min=1)


def dice_loss(
    logits: Float[Tensor, "M P"], inside: Float[Tensor, "M P"], known: Float[Tensor, "_ P"]
) -> Float[Tensor, "M"]:
    """1 - (2 sum(p m) + 1) / (sum p + sum m + 1) over the known points of each mask."""
    probs = logits.sigmoid() * known
    return 1 - (2 * (probs * inside).sum(dim=1) + 1) / ((probs + inside).sum(dim=1) + 1)


def _pixel_costs(logits: Tensor, kind: PixelLoss) -> tuple[Tensor, Tensor]:
    """What a logit costs where the mask is, and where it is not."""
    if_inside, if_outside = F.softplus(-logits), F.softplus(logits)
    match kind:
        case PixelLoss.CROSS_ENTROPY:
            return if_inside, if_outside
        case PixelLoss.FOCAL:
            probs = logits.sigmoid()
            return 0.25 * (1 - probs) ** 2 * if_inside, 0.75 * probs**2 * if_outside
        case _:
            assert_never(kind)


def logits_at(maps: Float[Tensor, "M h w"], points: Float[Tensor, "M P 2"]) -> Float[Tensor, "M P"]:
    """Values between cells, bilinearly. points: right and down, 0..1 over the area of the map."""
    places = 2 * points[:, :, None] - 1
    return F.grid_sample(maps[:, None], places, padding_mode="border", align_corners=False)[:, 0, :, 0]


@torch.no_grad()
def _points(
    mask_logits: Float[Tensor, "M h w"],
    truth: _Truth,
    weights: MaskClassificationWeights,
    generator: torch.Generator | None,
) -> Float[Tensor, "M P 2"]:
    """Where each mask is looked at: the least certain of many points, and some anywhere (PointRend, section 3.1)."""
    assert weights.points is not None

    def draw(count: int) -> Float[Tensor, "M count 2"]:
        return torch.rand(len(mask_logits), count, 2, generator=generator, device=mask_logits.device)

    many = draw(int(weights.points * weights.oversample))
    certainty = logits_at(mask_logits, many).abs()
    row, column, in_image = _pixels(many, truth)
    known = truth.known[row, column] & in_image
    count = int(weights.points * weights.important)
    chosen = certainty.where(known, torch.inf).topk(count, dim=1, largest=False).indices
    return torch.cat([many.gather(1, chosen[..., None].expand(-1, -1, 2)), draw(weights.points - count)], dim=1)


def _at_points(
    truth: _Truth, segments: Int[Tensor, "M"], points: Float[Tensor, "M P 2"]
) -> tuple[Float[Tensor, "M P"], Float[Tensor, "M P"]]:
    """Whether the pixel around a point is in the mask, and whether it is known."""
    row, column, in_image = _pixels(points, truth)
    inside = truth.masks[segments[:, None], row, column] & in_image
    known = truth.known[row, column] & in_image
    return inside.float(), known.float()


def _pixels(
    points: Float[Tensor, "M P 2"], truth: _Truth
) -> tuple[Int[Tensor, "M P"], Int[Tensor, "M P"], Bool[Tensor, "M P"]]:
    """Row and column of the pixel around a point, and whether the image reaches there."""
    (rows, columns), (height, width) = truth.known_share.shape, truth.known.shape
    column, row = (points * points.new_tensor([columns, rows]) * truth.stride).long().unbind(dim=2)
    return row.clamp(max=height - 1), column.clamp(max=width - 1), (row < height) & (column < width)
