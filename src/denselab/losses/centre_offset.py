"""The objective of Panoptic-DeepLab: classes, heat of object centres, and offsets to them.

Cheng et al.: Panoptic-DeepLab, CVPR 2020, section 3.2 and 3.3; hard pixels as in DeeperLab (Yang et al. 2019, section
3.3), 20 % as in panoptic-deeplab's code. Positions are px from the upper left edge of the input: cell i of the mask
grid has its middle at (i + 1/2) * stride.

Deviations. Heat and offsets are taught on the mask grid, at the middles of cells, and not upsampled first: both are
smooth, and the decode reads them there. A peak of heat lies in the middle of the cell that holds the centre, as the
code rounds centres to pixels, so that it reaches 1 at any stride. Peaks of small objects are narrower. Heat is the
sigmoid of the centre logit.
"""

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from denselab.losses.matching import background, masks_on_grid, solid
from denselab.losses.pixel import LossWeights, pixel_loss
from denselab.losses.weighted import check_weights, weighted_sum
from denselab.types import HeadSpec, QueryOutput, SegmentTargets, ValueKind

_VOID = 255


@dataclass(frozen=True)
class CentreOffsetWeights:
    """How much each loss counts, as published; those at 0 are not computed. Raises InputError if none counts."""

    semantic: float = 1.0
    heat: float = 200.0
    offset: float = 0.01

    def __post_init__(self) -> None:
        """Check the weights."""
        check_weights("centre_offset", asdict(self))


@dataclass(frozen=True)
class CentreOffsetRules:
    """How targets are made, as published for Cityscapes.

    hard_share: share of the labelled pixels, those with the highest loss, that teach classes. small_weight: of pixels
    of things smaller than small_px ** 2; 1 treats all alike. sigma_px: standard deviation of the heat around a centre.
    sigma_of_side: sigma is at most that share of the square root of an object's area, so that small objects side by
    side keep two peaks, and at least half a cell; None: one sigma for all, as published.
    """

    hard_share: float = 0.2
    small_weight: float = 3.0
    small_px: int = 64
    sigma_px: float = 8.0
    sigma_of_side: float | None = 0.25


DEFAULT_WEIGHTS = CentreOffsetWeights()
DEFAULT_RULES = CentreOffsetRules()


def centre_offset_loss(
    output: QueryOutput,
    spec: HeadSpec,
    segments: tuple[SegmentTargets, ...],
    class_ids: Int[Tensor, "B H W"],
    things: tuple[int, ...],
    weights: CentreOffsetWeights = DEFAULT_WEIGHTS,
    rules: CentreOffsetRules = DEFAULT_RULES,
    class_loss: LossWeights | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of losses in float32, and each by name, unweighted and detached.

    output: CENTRE_OFFSET channels. class_ids: 255 void. things: the classes whose segments have centres.
    class_loss: in place of the bootstrapped cross entropy.
    """
    if spec.value_kind is not ValueKind.CENTRE_OFFSET:
        raise TypeError(f"value_kind: wanted CENTRE_OFFSET, got {spec.value_kind}")
    maps, stride = output.mask_logits.float(), spec.mask_stride
    class_logits, centre_logit, offset_px = maps[:, :-3], maps[:, -3], maps[:, -2:]
    hw = (maps.shape[2], maps.shape[3])
    objects = [_things(each, things) for each in segments]
    truth = [centre_targets(masks, hw, stride, rules) for masks in objects]
    heat, offsets_px, inside = (torch.stack(each) for each in zip(*truth, strict=True))

    def semantic() -> Tensor:
        height, width = class_ids.shape[1:]
        size = (hw[0] * stride, hw[1] * stride)
        logits = F.interpolate(class_logits, size=size, mode="bilinear", align_corners=False)[:, :, :height, :width]
        if class_loss is not None:
            return pixel_loss(logits, class_ids, class_loss, _VOID)[0]
        pixel_weights = torch.stack([small_thing_weights(masks, rules) for masks in objects])
        return bootstrapped_cross_entropy(logits, class_ids, pixel_weights, rules.hard_share)

    def centres() -> Tensor:
        told = [each.masks.any(dim=0) | background(each) for each in segments]
        known = masks_on_grid(torch.stack(told) | (class_ids != _VOID), hw, stride)
        return ((centre_logit.sigmoid() - heat).square() * known).sum() / known.sum().clamp(min=1)

    def offsets() -> Tensor:
        errors = (offset_px - offsets_px).abs().mean(dim=1)
        return errors.where(inside, 0).sum() / inside.sum().clamp(min=1)

    return weighted_sum({"semantic": semantic, "heat": centres, "offset": offsets}, asdict(weights))


@torch.no_grad()
def centre_targets(
    masks: Bool[Tensor, "N H W"], grid_hw: tuple[int, int], stride: int, rules: CentreOffsetRules = DEFAULT_RULES
) -> tuple[Float[Tensor, "h w"], Float[Tensor, "2 h w"], Bool[Tensor, "h w"]]:
    """Of the objects of an image: heat 0..1, the way to the own centre in px (down, right), and the cells in objects.

    The centre is the mean of the mask's pixels. Heat is the largest of exp(-d^2 / (2 sigma^2)) over objects. Where
    masks overlap the last one has the cell; an object too small to fill half a cell has those it covers most.
    """
    masks = masks[masks.any(dim=2).any(dim=1)]
    rows, columns = (_middles_px(count, stride, masks.device) for count in grid_hw)
    if not len(masks):
        empty = rows.new_zeros(grid_hw)
        return empty, empty.expand(2, -1, -1), empty.bool()
    areas = masks.sum(dim=(1, 2))
    down_px = (masks.sum(dim=2) * _middles_px(masks.shape[1], 1, masks.device)).sum(dim=1) / areas
    right_px = (masks.sum(dim=1) * _middles_px(masks.shape[2], 1, masks.device)).sum(dim=1) / areas

    sigma_px = torch.full_like(down_px, rules.sigma_px)
    if rules.sigma_of_side is not None:
        sigma_px = sigma_px.minimum((rules.sigma_of_side * areas.sqrt()).clamp(min=stride / 2))
    bells = [
        torch.exp(-((middles - ((at // stride) + 0.5)[:, None] * stride) ** 2) / (2 * sigma_px**2)[:, None])
        for middles, at in ((rows, down_px), (columns, right_px))
    ]
    heat = (bells[0][:, :, None] * bells[1][:, None, :]).amax(dim=0)

    order = torch.arange(1, len(masks) + 1, device=masks.device)[:, None, None]
    owner = (solid(masks_on_grid(masks, grid_hw, stride)) * order).amax(dim=0)
    own = (owner - 1).clamp(min=0)
    offsets_px = torch.stack([down_px[own] - rows[:, None], right_px[own] - columns])
    return heat, offsets_px, owner > 0


def bootstrapped_cross_entropy(
    logits: Float[Tensor, "B K H W"],
    target: Int[Tensor, "B H W"],
    pixel_weights: Float[Tensor, "B H W"],
    hard_share: float,
) -> Tensor:
    """Mean weighted cross entropy of the labelled pixels of the batch where it is highest; 0 if none is labelled.

    Their number is hard_share of the labelled ones, where the code takes that share of all pixels.
    """
    labelled = target != _VOID
    losses = (F.cross_entropy(logits, target, ignore_index=_VOID, reduction="none") * pixel_weights)[labelled]
    if not losses.numel():
        return logits.sum() * 0
    return losses.topk(max(1, int(hard_share * losses.numel()))).values.mean()


def small_thing_weights(masks: Bool[Tensor, "N H W"], rules: CentreOffsetRules) -> Float[Tensor, "H W"]:
    """`small_weight` on pixels of small objects, 1 elsewhere."""
    small = masks[masks.sum(dim=(1, 2)) < rules.small_px**2].any(dim=0)
    return 1 + (rules.small_weight - 1) * small.float()


def _things(target: SegmentTargets, things: tuple[int, ...]) -> Bool[Tensor, "N H W"]:
    return target.masks[torch.isin(target.class_ids, target.class_ids.new_tensor(things))]


def _middles_px(count: int, stride: int, device: torch.device) -> Float[Tensor, "count"]:
    return (torch.arange(count, device=device) + 0.5) * stride
