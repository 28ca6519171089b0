"""LRP-QViT: bits by relevance, and RepQ-ViT whose outlying channels after a LayerNorm are clipped first.

Ranjan and Savakis: LRP-QViT: Mixed-Precision Vision Transformer Quantization via Layer-wise Relevance Propagation,
arXiv:2401.11243. Scores of relevance (LRP from the logits) say which layers get more bits than the mean. What follows
a LayerNorm is quantized per channel with clipped ranges and becomes per tensor as in `repq_vit`: a few channels of
extreme range would else be a burden on the weights that take the change back, whose inputs grow r1 = s_c / mean s
times. All else is as in RepQ-ViT.

The paper's code is not public and its formulas were not at hand: what follows is our completion. Clipping: s_c becomes
min(s_c, quantile p of s), the middle of the channel's range stays; p is the one of `CLIPS`, no clipping among them,
of least squared error of what the readers of the norm compute from the sample, their weights quantized as well. Bits:
b_l = b + spread (Omega_l - mean Omega) / deviation of Omega, rounded and kept within limits, then moved one by one,
those farthest from that number first, until the mean bits of weights and of activations meet the budget. Both sides of
a group (`site_groups`) get the same bits.
"""

import math
from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from denselab.compress.bit_losses import within_kinds
from denselab.compress.fold_layer_norms import FoldableNorm, NormReader
from denselab.compress.graph import Graph
from denselab.compress.methods.method import Calibration, Method, Seen
from denselab.compress.methods.repq_vit import Clip, fit, fold_of_moving, reparameterized, spec
from denselab.compress.observing import Stats, weights
from denselab.compress.plan import KEPT, Kept, QuantPlan, kept_axes
from denselab.compress.quantizers import Uniform, quantized
from denselab.compress.ranges import extremes
from denselab.compress.relevance.scores import Score
from denselab.compress.simulate import QuantizedGraph
from denselab.compress.site_groups import SiteGroup, site_groups
from denselab.errors import InputError

CLIPS = (1.0, 0.99, 0.97, 0.95, 0.9)
"""Shares of the channels whose scales are not clipped."""

_ROWS = 512


def quantize(graph: Graph, stats: Stats, plan: QuantPlan, calibration: Calibration) -> QuantizedGraph:
    """Clip, change the norms, then fit what the plan says. Raises InputError as RepQ-ViT."""
    return reparameterized(graph, stats, plan, least_error_clip(graph, plan))


def clipped(per_channel: Uniform, share: float, moves: Bool[Tensor, "C"]) -> Uniform:
    """No scale above the quantile of those of the channels that move; the middle of every range stays.

    per_channel: affine, [1, C].
    """
    assert per_channel.zero_point is not None
    scale = per_channel.scale
    most = scale.squeeze(0)[moves].double().quantile(share).to(scale.dtype)
    smaller = scale.minimum(most)
    half = (per_channel.levels - 1) / 2
    middle = (half - per_channel.zero_point) * scale
    zero_point = (half - middle / smaller).round().to(torch.int32)
    return Uniform(smaller, torch.where(scale > most, zero_point, per_channel.zero_point), per_channel.bits)


def least_error_clip(graph: Graph, plan: QuantPlan) -> Clip:
    """The share of `CLIPS` of least error of what the readers of a norm compute, their weights quantized by the plan.

    Readers whose weight the plan leaves float count with it; a norm without a reader of its sample is left as it is.
    """
    stored = weights(graph)
    weight_of = {product.left: product.right for product in graph.found.products}

    def clip(
        norm: FoldableNorm, rows: Float[Tensor, "rows C"], moves: Bool[Tensor, "C"], per_channel: Uniform
    ) -> Uniform:
        sample = rows[:: math.ceil(len(rows) / _ROWS)]
        candidates = [clipped(per_channel, share, moves) for share in CLIPS]

        def error(candidate: Uniform) -> float:
            return sum(
                _reader_error(graph, plan, reader, weight_of[reader.site.key], stored, candidate, sample, moves)
                for reader in norm.readers
            )

        errors = [error(each) for each in candidates]
        return candidates[errors.index(min(errors))]

    return clip


def _reader_error(
    graph: Graph,
    plan: QuantPlan,
    reader: NormReader,
    key: str,
    stored: Mapping[str, Float[Tensor, "O I ..."]],
    per_channel: Uniform,
    rows: Float[Tensor, "rows C"],
    moves: Bool[Tensor, "C"],
) -> float:
    """|W x - Q(W) Q(x)|^2 / |W x|^2 of a reader after the change, a convolution tap by tap. key: of its weight."""
    fold = fold_of_moving(per_channel, moves)
    changed = fold.apply(rows)
    seen = quantized(Uniform(fold.scale, fold.zero_point.to(torch.int32), per_channel.bits), changed)
    weight = stored[key].detach()
    kernel = (1,) * (weight.ndim - 2)
    grown = weight * reader.per_input(fold).ratio.view(-1, *kernel)
    on_grid = grown
    if key in plan.specs:
        site, planned = graph.found.by_key[key], plan.specs[key]
        keep = kept_axes(site, planned.granularity)
        on_grid = quantized(fit(site, planned, Seen(grown, *extremes(grown, keep), keep)), grown)
    exact, got = (
        torch.einsum("ri,oi...->ro...", values[:, reader.channels], each)
        for values, each in ((changed, grown), (seen, on_grid))
    )
    error, size = (each.double().square().sum().item() for each in (got - exact, exact))
    return error / size if size else error


def bits_by_relevance(
    graph: Graph,
    scores: Mapping[str, Score],
    mean_bits: float,
    spread: float = 1.0,
    lowest: int = 2,
    highest: int = 8,
    kept: Iterable[Kept] = KEPT,
) -> dict[str, int]:
    """The paper's rule: bits of every site by key from its relevance, at most so many in the mean of weights and of
    activations.

    scores: relevance by site, of LRP or any other. spread: bits per standard deviation of the scores. What is kept has
    8 bits and counts in the mean. Raises InputError for sites without a score and a mean that cannot be met.
    """
    groups = site_groups(graph, kept)
    if missing := [key for key in graph.found.by_key if key not in scores]:
        raise InputError(f"scores: wanted one for every site, got none for {missing[0]!r}; measure relevance again")
    omegas = within_kinds(
        {group.key: math.fsum(scores[key].magnitude for key in group.activations) for group in groups}
    )
    free = [group for group in groups if group.free]
    if not free:
        raise InputError("kept: wanted a site whose bits can be chosen, got none")
    shares = torch.tensor([omegas[group.key] for group in free], dtype=torch.float64)
    deviation = shares.std(unbiased=False).item() or 1.0
    targets = {group.key: mean_bits + spread * (omegas[group.key] - shares.mean().item()) / deviation for group in free}
    bits = {key: min(max(round(target), lowest), highest) for key, target in targets.items()}
    while over := _over(groups, bits, mean_bits):
        lowerable = [group.key for group in free if bits[group.key] > lowest and _counts(group, over)]
        if not lowerable:
            raise InputError(
                f"mean_bits: wanted at least what {lowest} bits need with what is kept at 8, got {mean_bits:g}"
            )
        bits[max(lowerable, key=lambda key: bits[key] - targets[key])] -= 1
    for key in sorted(targets, key=lambda key: bits[key] - targets[key]):
        if bits[key] < min(targets[key], highest) and not _over(groups, bits | {key: bits[key] + 1}, mean_bits):
            bits[key] += 1
    at_8 = dict.fromkeys(graph.found.by_key, 8)
    return at_8 | {key: bits[group.key] for group in free for key in group.free}


def _over(groups: Iterable[SiteGroup], bits: Mapping[str, int], mean_bits: float) -> tuple[bool, bool] | tuple[()]:
    """Whether weights, and whether activations, have more bits in the mean; nothing if neither has."""
    excess = [0.0, 0.0]
    for group in groups:
        for side, (elements, stays) in enumerate(
            ((group.weight_elements, group.weights_kept), (group.activation_elements, group.activations_kept))
        ):
            excess[side] += elements * ((8 if stays or not group.free else bits[group.key]) - mean_bits)
    over = (excess[0] > 1e-9, excess[1] > 1e-9)
    return over if any(over) else ()


def _counts(group: SiteGroup, over: tuple[bool, ...]) -> bool:
    """Whether fewer bits of a group lower a mean that is exceeded."""
    of_weights = over[0] and group.weight_elements > 0 and not group.weights_kept
    return of_weights or (over[1] and group.activation_elements > 0 and not group.activations_kept)


LRP_QVIT = Method("lrp-qvit", spec, quantize)
