"""RepQ-ViT: calibrate with quantizers that are good but dear, then turn them into cheap ones that say the same.

Li et al.: RepQ-ViT: Scale Reparameterization for Post-Training Quantization of Vision Transformers, ICCV 2023,
arXiv:2212.08254; zkkli/RepQ-ViT@a160561 classification. What follows a LayerNorm is calibrated per channel, and becomes
per tensor by a change of the norm that the layers after it take back (section 3.3; `reparameterize`). Attention maps
are calibrated on powers of the root of two, which run as powers of two (section 3.4; `logarithm`). All else is uniform;
every range is the pair of percentiles of least squared error. Weights, per output channel, are fitted after the change.

Deviations. Zero points are whole numbers. Channels that never move do not count in the means. The extremes are tried
beside the percentiles, since these come from a sample. A norm of several readers is calibrated on what all of them
read, at the bits of the first; a reader with other bits gets a range of its own. The code treats the norms of timm's
blocks; here it is every LayerNorm that a layer reads, found in the graph.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from denselab.compress.fold_layer_norms import FoldableNorm, fold_layer_norms, foldable_norms
from denselab.compress.graph import Graph
from denselab.compress.methods.method import Calibration, Fit, Method, Seen, fitted, unfit
from denselab.compress.observing import SiteStats, Stats
from denselab.compress.plan import Granularity, Grid, QuantPlan, QuantSpec, finest
from denselab.compress.quantizers import ChannelFold, LogSqrt2, Quantizer, Uniform, channel_fold
from denselab.compress.ranges import affine, least_error, percentile_ranges, percentile_scales, symmetric
from denselab.compress.simulate import QuantizedGraph
from denselab.compress.sites import Operand, QuantSite, Source

Clip = Callable[[FoldableNorm, Float[Tensor, "rows C"], Bool[Tensor, "C"], Uniform], Uniform]
"""What a norm's quantizer per channel becomes before it is made one per tensor: from the norm, a sample of it, which of
its channels move, and the quantizer as calibrated, [1, C]."""

Target = Callable[[Float[Tensor, "C"]], Float[Tensor, ""]]
"""The one scale of a norm from those of its channels that move."""


def mean(scales: Float[Tensor, "C"]) -> Float[Tensor, ""]:
    """The paper's `Target`."""
    return scales.mean()


def as_calibrated(norm: FoldableNorm, rows: Tensor, moves: Tensor, per_channel: Uniform) -> Uniform:
    """The `Clip` that changes nothing."""
    return per_channel


def spec(site: QuantSite, bits: int) -> QuantSpec:
    """Log-sqrt2 for attention maps, affine for all else: weights per output channel, activations per tensor."""
    if site.operand is Operand.ATTENTION and site.made_by is Source.SOFTMAX:
        return QuantSpec(bits, Grid.LOG_SQRT2, Granularity.PER_TENSOR)
    return QuantSpec(bits, Grid.UNIFORM, finest(site) if site.is_weight else Granularity.PER_TENSOR)


def fit(site: QuantSite, spec: QuantSpec, seen: Seen) -> Quantizer:
    """The candidate of least squared error, from percentiles and from the extremes."""
    match spec.grid:
        case Grid.UNIFORM:
            ranges = [*percentile_ranges(seen.values, keep=seen.keep), (seen.low, seen.high)]
            uniform = symmetric if spec.symmetric else affine
            return least_error(seen.values, [uniform(*each, spec.bits) for each in ranges])
        case Grid.LOG_SQRT2:
            scales = [*percentile_scales(seen.values, keep=seen.keep), torch.where(seen.high > 0, seen.high, 1)]
            return least_error(seen.values, [LogSqrt2(each, spec.bits) for each in scales])
        case Grid.LOG2 | Grid.ADALOG | Grid.SULQ | Grid.TANQ | Grid.TERNARY:
            raise unfit(REPQ_VIT.name, spec)


def quantize(graph: Graph, stats: Stats, plan: QuantPlan, calibration: Calibration) -> QuantizedGraph:
    """Change the norms, then fit what the plan says. Raises InputError as `fitted`, and for grids it cannot fit."""
    return reparameterized(graph, stats, plan)


def reparameterized(
    graph: Graph, stats: Stats, plan: QuantPlan, clip: Clip = as_calibrated, target: Target = mean, fit: Fit = fit
) -> QuantizedGraph:
    """`quantize` for methods that fit other grids, or differ in what they do with a norm's channels."""
    plan.check(graph.site_list())
    folds = {norm: norm_fold(norm, stats, plan, clip, target) for norm in foldable_norms(graph)}
    found = {norm: fold for norm, fold in folds.items() if fold is not None}
    folded = fold_layer_norms(graph, [(norm, fold) for norm, (_, fold) in found.items()])
    changed = {
        reader.site.key: (bits, reader.per_input(fold))
        for norm, (bits, fold) in found.items()
        for reader in norm.readers
    }
    sites = {key: _changed(seen, changed[key][1]) if key in changed else seen for key, seen in stats.sites.items()}

    def fit_changed(site: QuantSite, spec: QuantSpec, seen: Seen) -> Quantizer:
        bits, fold = changed.get(site.key, (None, None))
        if fold is not None and spec.bits == bits and _becomes_per_tensor(spec):
            return Uniform(fold.scale, fold.zero_point.to(torch.int32), spec.bits)
        return fit(site, spec, seen)

    return QuantizedGraph(folded, plan, fitted(folded, Stats(stats.model, stats.images, sites), plan, fit_changed))


def norm_fold(
    norm: FoldableNorm, stats: Stats, plan: QuantPlan, clip: Clip = as_calibrated, target: Target = mean
) -> tuple[int, ChannelFold] | None:
    """The bits a norm is calibrated at per channel, and the change that makes it one scale and zero point.

    None where no reader is planned so, and for a norm that never moves.
    """
    planned = (plan.specs.get(reader.site.key) for reader in norm.readers)
    bits = next((spec.bits for spec in planned if spec is not None and _becomes_per_tensor(spec)), None)
    if bits is None:
        return None
    rows, low, high = _seen_of_norm(norm, stats)
    moves = high > low
    if not moves.any():
        return None
    ranges = [*percentile_ranges(rows, keep=(1,)), (low.unsqueeze(0), high.unsqueeze(0))]
    per_channel = least_error(rows, [affine(*each, bits, with_zero=False) for each in ranges])
    return bits, fold_of_moving(clip(norm, rows, moves, per_channel), moves, target)


def fold_of_moving(per_channel: Uniform, moves: Bool[Tensor, "C"], target: Target = mean) -> ChannelFold:
    """The change to one scale and the mean zero point of the channels that move; per_channel: affine, [1, C]."""
    assert per_channel.zero_point is not None
    scale, zero_point = target(per_channel.scale.squeeze(0)[moves]), per_channel.zero_point.squeeze(0)[moves]
    return channel_fold(per_channel, scale, zero_point.to(scale.dtype).mean())


def _becomes_per_tensor(spec: QuantSpec) -> bool:
    return spec.grid is Grid.UNIFORM and spec.granularity is Granularity.PER_TENSOR and not spec.symmetric


def _seen_of_norm(norm: FoldableNorm, stats: Stats) -> tuple[Tensor, Tensor, Tensor]:
    """A sample [rows, C] of a norm's channels and their extremes [C], from all that its readers read."""
    seen = {id(stats.sites[reader.site.key]): (reader, stats.sites[reader.site.key]) for reader in norm.readers}
    rows = torch.cat([reader.rows_of_norm(each.rows) for reader, each in seen.values()])
    low = torch.cat([reader.rows_of_norm(each.low.unsqueeze(0)) for reader, each in seen.values()]).amin(0)
    high = torch.cat([reader.rows_of_norm(each.high.unsqueeze(0)) for reader, each in seen.values()]).amax(0)
    return rows, low, high


def _changed(seen: SiteStats, fold: ChannelFold) -> SiteStats:
    """What is seen at the site of a reader after the change of its norm."""
    return replace(seen, low=fold.apply(seen.low), high=fold.apply(seen.high), rows=fold.apply(seen.rows))


REPQ_VIT = Method("repq-vit", spec, quantize)
