"""One-to-one matching of queries to true segments, and true masks on the grid of predicted ones."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from denselab.errors import InputError
from denselab.types import SegmentTargets

_MASKS_AT_ONCE = 16  # bounds the memory of masks as floats at input size
_WORST_COST = 1e6


@dataclass(frozen=True)
class Match:
    """Pairs of one image: query queries[i] answers for segment segments[i]. int64 [M], queries rising."""

    queries: Int[Tensor, "M"]
    segments: Int[Tensor, "M"]


@torch.no_grad()
def match(costs: Sequence[Float[Tensor, "Q N"]]) -> tuple[Match, ...]:
    """The one-to-one matching of least total cost in every image of a batch (Kuhn 1955; Carion et al. 2020, eq. 1).

    costs: per image, all of the same Q. Of min(Q, N) pairs: where segments outnumber queries, those are left
    unmatched whose absence makes the total least. Costs that are not finite, of a model that has diverged, are taken
    as very high, so that the loss can say so instead.
    """
    counts = [cost.shape[1] for cost in costs]
    finite = torch.cat(list(costs), dim=1).float().nan_to_num(_WORST_COST, _WORST_COST, -_WORST_COST)
    matches: list[Match] = []
    for cost in finite.cpu().split(counts, dim=1):  # one transfer for the batch
        queries, segments = linear_sum_assignment(cost.numpy())
        matches.append(Match(*(torch.as_tensor(ids, device=finite.device) for ids in (queries, segments))))
    return tuple(matches)


def masks_on_grid(masks: Bool[Tensor, "N H W"], grid_hw: tuple[int, int], stride: int) -> Float[Tensor, "N h w"]:
    """The share of each cell that a mask covers, 0..1; what lies right of or below the image is covered by none.

    Cells are stride x stride px. Losses take the shares themselves as soft targets, for small objects. Measured at
    stride 4 on discs (radius 1.6 to 10 px) and poles (1 to 5 px wide): free logits fitted to each kind of target with
    `mask_id_loss` and `dice_loss`, upsampled bilinearly, argmax: mean IoU 0.59 with shares, 0.51 with `solid`, 0.45
    with the mask that covers most, 0.44 with nearest pixels, 0.39 with majorities.
    Raises InputError if the grid is smaller than the masks.
    """
    height, width = masks.shape[1:]
    below, right = grid_hw[0] * stride - height, grid_hw[1] * stride - width
    if below < 0 or right < 0:
        raise InputError(
            f"segments: wanted masks of at most {grid_hw[0] * stride}x{grid_hw[1] * stride} px, the area of a "
            f"{grid_hw[0]}x{grid_hw[1]} mask grid of stride {stride}, got {height}x{width}; cut them as the image is"
        )
    if stride == 1 and below == right == 0:
        return masks.float()
    if not len(masks):
        return masks.new_zeros((0, *grid_hw), dtype=torch.float32)
    return torch.cat(
        [F.avg_pool2d(F.pad(some.float(), (0, right, 0, below)), stride) for some in masks.split(_MASKS_AT_ONCE)]
    )


def background(target: SegmentTargets) -> Bool[Tensor, "H W"]:
    """Pixels known to be of no segment: in no mask and not void."""
    in_one = target.masks.any(dim=0)
    return torch.zeros_like(in_one) if target.void is None else ~(in_one | target.void)


def solid(shares: Float[Tensor, "N h w"]) -> Bool[Tensor, "N h w"]:
    """Cells at least half covered; for a mask that covers half of none, those it covers most, so that none is lost."""
    most = shares.amax(dim=(1, 2), keepdim=True)
    return (shares >= most.clamp(max=0.5)) & (shares > 0)


def ids_on_grid(
    class_ids: Int[Tensor, "B H W"], grid_hw: tuple[int, int], stride: int, void: int = 255
) -> Int[Tensor, "B h w"]:
    """The id at the centre pixel of each cell (the upper left of four); void right of and below the image."""
    height, width = class_ids.shape[1:]
    padded = F.pad(class_ids, (0, grid_hw[1] * stride - width, 0, grid_hw[0] * stride - height), value=void)
    first = (stride - 1) // 2
    return padded[:, first::stride, first::stride]


def resized(maps: Float[Tensor, "B C h w"], hw: tuple[int, int]) -> Float[Tensor, "B C h2 w2"]:
    """Maps of an earlier layer on another grid over the same area, bilinearly."""
    return maps if maps.shape[2:] == hw else F.interpolate(maps, size=hw, mode="bilinear", align_corners=False)
