"""From classes, centres and offsets to segments: the decode of a head that has no queries.

Cheng et al.: Panoptic-DeepLab, CVPR 2020, section 3.2 (grouping and merging) and "instance segmentation" in
section 4; majority vote from DeeperLab (Yang et al. 2019).

Positions are in cells of the mask grid, counted between the middles of cells: the middle of cell i lies at input px
(i + 1/2) * mask_stride. Classes are decided at full size, on scores upsampled bilinearly; the nearest centre and the
class probability of a pixel are those of its cell. Where classes meet, borders are therefore as sharp as those of
semantic segmentation; only the border between two touching objects follows the grid.
Deviations: the paper upsamples heat and offsets too, which costs mask_stride squared as many distances (at 1024x2048
and stride 4: 1.7 GB for 200 centres, against 105 MB). Its limit for stuff is in px and another per data set; here
it is a share of the image.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from denselab.tasks import semantic
from denselab.tasks.instance import InstanceAnswer
from denselab.tasks.panoptic import PanopticAnswer
from denselab.types import HeadSpec, QueryOutput, ValueKind


@dataclass(frozen=True)
class GroupingRules:
    """How centres are found and what is kept (section 3.2).

    threshold: heat that a centre must exceed. nms_px: side of the window, in input px, in which it must be the
    hottest; on the grid, as many cells as the window reaches into. max_centres: the hottest are kept.
    min_stuff_share: a stuff class on a smaller share of the image is void; the paper's 2048 px of 1024x2048.
    """

    threshold: float = 0.1
    nms_px: int = 7
    max_centres: int = 200
    min_stuff_share: float = 1 / 1024


def group_centres(
    output: QueryOutput, spec: HeadSpec, size_hw: tuple[int, int], things: tuple[int, ...], rules: GroupingRules
) -> PanopticAnswer:
    """Panoptic ids int32 [B, H, W], and the class int32 and score [B, S] of every slot, S = K + max_centres.

    Id 0 is void, id n is slot n - 1. Slot c < K is all of stuff class c; slot K + i is the thing around the i-th
    hottest centre, with the class that most of its pixels have. Thing pixels are void where no centre was found.
    Score: mean probability of the slot's class over its pixels, for things times the heat of the centre; 0 where the
    slot has no pixel. things: the ids of the classes whose objects are told apart.
    """
    if spec.value_kind is not ValueKind.CENTRE_OFFSET:
        raise TypeError(f"value_kind: wanted CENTRE_OFFSET, got {spec.value_kind}")
    stride, classes, slots = spec.mask_stride, spec.num_queries - 3, spec.num_queries - 3 + rules.max_centres
    rows, columns = ((side + stride - 1) // stride for side in size_hw)
    inside = output.mask_logits[:, :, :rows, :columns].float()
    centres, heat = find_centres(inside[:, -3], stride, rules)
    nearest = nearest_centre(inside[:, -2:] / stride, centres, heat > 0)

    labels = semantic.decode(output, spec, size_hw).flatten(1).long()
    cells = _cell_of_pixel(size_hw, stride, columns).to(labels.device).expand_as(labels)
    is_thing = torch.tensor([class_id in things for class_id in range(classes)], device=labels.device)[labels]
    thing_ids = torch.where(heat[:, :1] > 0, nearest.gather(1, cells) + classes + 1, 0)
    ids = torch.where(is_thing, thing_ids, labels + 1)

    votes = _sums(torch.ones_like(cells, dtype=heat.dtype), ids * classes + labels, (slots + 1) * classes)
    votes = votes.unflatten(1, (slots + 1, classes))
    area_px, slot_classes = votes.sum(dim=2), votes.argmax(dim=2)
    smallest = [math.inf, *[rules.min_stuff_share] * classes, *[0.0] * rules.max_centres]
    smallest_px = torch.tensor(smallest, device=labels.device) * labels.shape[1]
    used = (area_px > 0) & (area_px >= smallest_px)

    probs = inside[:, :-3].softmax(dim=1).flatten(1)
    own_probs = probs.gather(1, slot_classes.gather(1, ids) * (rows * columns) + cells)
    confidence = _sums(own_probs, ids, slots + 1) / area_px.clamp(min=1)
    scores = torch.where(used, confidence * F.pad(heat, (classes + 1, 0), value=1.0), 0)
    ids = torch.where(used.gather(1, ids), ids, 0).unflatten(1, size_hw)
    return ids.int(), slot_classes[:, 1:].int(), scores[:, 1:]


def instances_of_centres(
    output: QueryOutput,
    spec: HeadSpec,
    size_hw: tuple[int, int],
    things: tuple[int, ...],
    rules: GroupingRules,
    max_instances: int,
) -> InstanceAnswer:
    """The best-scored things of `group_centres`, best first: masks of 0 and 1, classes int32, scores (0: unused).

    N is max_instances, or max_centres where that is less.
    """
    ids, classes, scores = group_centres(output, spec, size_hw, things, rules)
    first = spec.num_queries - 3
    scores, best = scores[:, first:].topk(min(max_instances, rules.max_centres), dim=1)
    masks = ids[:, None] == (best + first + 1)[..., None, None]
    return masks.byte(), classes[:, first:].gather(1, best), scores


def find_centres(
    centre_logits: Float[Tensor, "B h w"], stride: int, rules: GroupingRules
) -> tuple[Float[Tensor, "B N 2"], Float[Tensor, "B N"]]:
    """The N = max_centres hottest peaks, hottest first: row and column on the grid, and heat; 0 for no centre.

    A peak is a maximum of its window by max pooling. It is looked for among logits, which do not saturate.
    """
    reach = math.ceil(rules.nms_px // 2 / stride)
    hottest = F.max_pool2d(centre_logits[:, None], 2 * reach + 1, 1, reach)[:, 0]
    is_peak = (centre_logits == hottest) & (centre_logits.sigmoid() > rules.threshold)
    heat = torch.where(is_peak, centre_logits.sigmoid(), 0).flatten(1)
    heat = F.pad(heat, (0, rules.max_centres))  # small grids have fewer cells than centres are asked for
    heat, places = heat.topk(rules.max_centres, dim=1)
    rows = places // centre_logits.shape[-1]
    columns = places - rows * centre_logits.shape[-1]  # the remainder by a symbolic size does not export
    return torch.stack([rows, columns], dim=2).to(heat.dtype), heat


def nearest_centre(
    offsets: Float[Tensor, "B 2 h w"], centres: Float[Tensor, "B N 2"], valid: Bool[Tensor, "B N"]
) -> Int[Tensor, "B hw"]:
    """Index of the valid centre that is nearest to cell + offset, all in cells.

    Not as a matrix product, which OpenVINO computes in bf16 where the CPU has it: positions need more than 8 bits.
    """
    rows, columns = offsets.shape[-2:]
    row = torch.arange(rows, dtype=offsets.dtype, device=offsets.device)[:, None] + offsets[:, 0]
    column = torch.arange(columns, dtype=offsets.dtype, device=offsets.device) + offsets[:, 1]
    far_if_invalid = torch.where(valid[..., None], centres, torch.inf)
    down, right = (centre[..., None] for centre in far_if_invalid.unbind(dim=2))
    squared = (row.flatten(1)[:, None] - down).square() + (column.flatten(1)[:, None] - right).square()
    return squared.min(dim=1).indices


def _cell_of_pixel(size_hw: tuple[int, int], stride: int, columns: int) -> Int[Tensor, "HW"]:
    """Index of the cell of the grid that every pixel lies in."""
    height, width = size_hw
    return ((torch.arange(height) // stride)[:, None] * columns + torch.arange(width) // stride).flatten()


def _sums(values: Float[Tensor, "B P"], bins: Int[Tensor, "B P"], count: int) -> Float[Tensor, "B count"]:
    """Sum of the values in every bin."""
    return values.new_zeros(values.shape[0], count).scatter_add(1, bins, values)
