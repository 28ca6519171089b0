"""Losses for depth in metres, over pixels whose depth is known.

Eigen, Puhrsch, Fergus: Depth Map Prediction from a Single Image, NeurIPS 2014 (SILog); Bhat et al.: AdaBins, CVPR 2021,
eq. 4 (its scale, as in PolyMaX); Ranftl et al.: MiDaS, TPAMI 2022, section 5 (alignment); Li and Snavely: MegaDepth,
CVPR 2018, section 4 (gradients). Every loss is a mean over the images that have a known pixel.
"""

import math
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from denselab.losses.weighted import check_weights, weighted_sum

_LEAST_M = 1e-2
_LEAST_SPREAD = 1e-3  # per metre


@dataclass(frozen=True)
class DepthLossWeights:
    """How much each loss of `depth_loss` counts; those at 0 are not computed. Raises InputError if none counts.

    silog: scale-invariant logarithmic. l1: metres. log_l1: |ln p - ln t|. aligned: scale- and shift-invariant, of
    1 / depth. gradient: slopes of ln p - ln t.
    """

    silog: float = 1.0
    l1: float = 0.0
    log_l1: float = 0.0
    aligned: float = 0.0
    gradient: float = 0.0

    def __post_init__(self) -> None:
        """Check the weights."""
        check_weights("depth", asdict(self))


DEFAULT_WEIGHTS = DepthLossWeights()


def depth_loss(
    pred_m: Float[Tensor, "B H W"], target_m: Float[Tensor, "B H W"], weights: DepthLossWeights = DEFAULT_WEIGHTS
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of losses in float32, and each by name, unweighted and detached. target_m: 0 is unknown."""
    known = target_m > 0
    pred_m, target_m = pred_m.float(), target_m.float().where(known, 1.0)
    log_ratio = _log(pred_m) - target_m.log()
    losses = {
        "silog": lambda: silog(log_ratio, known),
        "l1": lambda: known_mean((pred_m - target_m).abs(), known),
        "log_l1": lambda: known_mean(log_ratio.abs(), known),
        "aligned": lambda: aligned_l1(1 / pred_m.clamp(min=_LEAST_M), 1 / target_m, known),
        "gradient": lambda: gradient_matching(log_ratio, known),
    }
    return weighted_sum(losses, asdict(weights))


def known_mean(losses: Float[Tensor, "B H W"], known: Bool[Tensor, "B H W"]) -> Tensor:
    """Mean over the known pixels of an image, then over the images that have any; 0 where none has."""
    counts = known.sum(dim=(1, 2))
    means = losses.where(known, 0).sum(dim=(1, 2)) / counts.clamp(min=1)
    return means.sum() / (counts > 0).sum().clamp(min=1)


def silog(
    log_ratio: Float[Tensor, "B H W"],
    known: Bool[Tensor, "B H W"],
    scale: float = 10.0,
    variance_focus: float = 0.85,
) -> Tensor:
    """scale * sqrt(mean(g^2) - lambda * mean(g)^2), g = ln p - ln t (Eigen et al., eq. 4; AdaBins, eq. 4).

    lambda = variance_focus: 0 is the root mean square of logs, 1 forgives any common factor. Per image; AdaBins' code
    takes the pixels of a batch together, which is invariant only to a factor that all its images share.
    """
    counts = known.sum(dim=(1, 2)).clamp(min=1)
    mean = log_ratio.where(known, 0).sum(dim=(1, 2)) / counts
    variance = (log_ratio - mean[:, None, None]).where(known, 0).square().sum(dim=(1, 2)) / counts
    squared = variance + (1 - variance_focus) * mean.square()
    off = squared > 1e-12  # the root has no gradient at 0
    roots = squared.where(off, 1).sqrt().where(off, 0)
    return scale * roots.sum() / known.any(dim=2).any(dim=1).sum().clamp(min=1)


def aligned_l1(
    pred: Float[Tensor, "B H W"], target: Float[Tensor, "B H W"], known: Bool[Tensor, "B H W"], kept: float = 0.8
) -> Tensor:
    """Scale- and shift-invariant loss: half the mean of |p' - t'| after both are aligned (MiDaS, section 5).

    x' = (x - median x) / mean |x - median x| over the known pixels of an image. Of their errors the `kept` share with
    the smallest is summed (the "trimmed" loss), and divided by the number of all. MiDaS aligns disparities.
    """
    losses: list[Tensor] = []
    for one_pred, one_target, one_known in zip(pred, target, known, strict=True):
        if one_known.any():
            errors = (_aligned(one_pred[one_known]) - _aligned(one_target[one_known])).abs()
            fewest = math.ceil(kept * errors.numel())
            losses.append(errors.sort().values[:fewest].sum() / (2 * errors.numel()))
    return torch.stack(losses).mean() if losses else pred.sum() * 0


def gradient_matching(errors: Float[Tensor, "B H W"], known: Bool[Tensor, "B H W"], scales: int = 4) -> Tensor:
    """Sum over scales of the mean of |dx error| + |dy error| between neighbours (MegaDepth, MiDaS).

    Scale k takes every 2^k-th row and column. Only pairs of known pixels; a mean over known pixels.
    """
    terms: list[Tensor] = []
    for step in (2**scale for scale in range(scales)):
        at, seen = errors[:, ::step, ::step], known[:, ::step, ::step]
        across = at.diff(dim=2).abs().where(seen[:, :, 1:] & seen[:, :, :-1], 0).sum(dim=(1, 2))
        down = at.diff(dim=1).abs().where(seen[:, 1:] & seen[:, :-1], 0).sum(dim=(1, 2))
        counts = seen.sum(dim=(1, 2))
        terms.append(((across + down) / counts.clamp(min=1)).sum() / (counts > 0).sum().clamp(min=1))
    return torch.stack(terms).sum()


def _log(metres: Float[Tensor, "B H W"]) -> Float[Tensor, "B H W"]:
    """ln, continued straight below 1 cm, so that a prediction of 0 or less is told the way back."""
    return metres.clamp(min=_LEAST_M).log() + (metres.clamp(max=_LEAST_M) - _LEAST_M) / _LEAST_M


def _aligned(values: Float[Tensor, "P"]) -> Float[Tensor, "P"]:
    centred = values - values.median()
    return centred / centred.abs().mean().clamp(min=_LEAST_SPREAD)
