"""DopQ-ViT: attention maps on a grid that is dense near 0 and near 1, norms at a scale that outliers do not move.

Yang et al.: DopQ-ViT: Towards Distribution-Friendly and Outlier-Aware Post-Training Quantization for Vision
Transformers, arXiv:2408.03291. Its published formulas could not be had and its code is not public: both parts are our
own completion of what the abstract says of them.

TanQ-style: attention maps take the quantizer of `quantizers.tanq`, which spends codes on the many values near 0 and on
the few near 1 that must be kept; scale and angle are those of least squared error of the map. MOSF-style: a norm is
brought to the median of its channels' scales, which is the least far from all of them in the mean
(`ranges.median_scale`), in place of RepQ-ViT's mean. All else, with its deviations, is RepQ-ViT.

The median changes stored numbers, not the answer. A reparameterization is exact, so that a channel keeps its codes
round(x / s_c) + z_c whatever scale it is brought to; what that multiplies the next weights by as a whole, their scales
per output channel take back. What the paper gains by MOSF must come from more than the abstract tells. So what sets
this method apart from RepQ-ViT is its grid for attention maps.
"""

import math
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from denselab.compress.fold_layer_norms import FoldableNorm, fold_layer_norms, foldable_norms
from denselab.compress.graph import Graph
from denselab.compress.methods import repq_vit
from denselab.compress.methods.method import Calibration, Method, Seen, fitted, unfit
from denselab.compress.observe import Stats
from denselab.compress.plan import Grid, QuantPlan, QuantSpec
from denselab.compress.quantizers import ChannelFold, LogSqrt2, Quantizer, TanQ, Uniform
from denselab.compress.ranges import least_error, median_scale, percentile_scales
from denselab.compress.simulate import QuantizedGraph
from denselab.compress.sites import QuantSite
from denselab.errors import InputError

ANGLES = tuple(math.pi / 2 * step / 16 for step in range(1, 16))
"""Radians that are tried, from nearly uniform to nearly all codes at the ends."""

_GRIDS = (Grid.UNIFORM, Grid.LOG_SQRT2, Grid.TANQ)
_SAMPLED = 2**16


def spec(site: QuantSite, bits: int) -> QuantSpec:
    """TanQ where RepQ-ViT has log-sqrt2, affine for all else."""
    of_repq = repq_vit.spec(site, bits)
    return replace(of_repq, grid=Grid.TANQ) if of_repq.grid is Grid.LOG_SQRT2 else of_repq


def quantize(graph: Graph, stats: Stats, plan: QuantPlan, calibration: Calibration) -> QuantizedGraph:
    """Fit a plan. Raises InputError as `fitted`, and for grids it cannot fit."""
    plan.check(graph.site_list())
    for key, each in plan.specs.items():
        if each.grid not in _GRIDS:
            raise InputError(f"{key}: {unfit(DOPQ_VIT.name, each)}")
    maps = {key: each for key, each in plan.specs.items() if each.grid is Grid.TANQ}
    others = {key: each for key, each in plan.specs.items() if key not in maps}
    start = repq_vit.quantize(graph, stats, replace(plan, specs=others), calibration)
    scaled, quantizers = _brought_to_medians(graph, stats, start)
    quantizers |= fitted(scaled, stats, replace(plan, specs=maps), fit)
    return QuantizedGraph(scaled, plan, {key: quantizers[key] for key in plan.specs})


def fit(site: QuantSite, spec: QuantSpec, seen: Seen) -> TanQ:
    """The TanQ quantizer of least squared error, of percentiles and the greatest number as scale and of `ANGLES`."""
    values = seen.values if seen.keep else seen.values.flatten()[:: math.ceil(seen.values.numel() / _SAMPLED)]
    scales = [*percentile_scales(values, keep=seen.keep), torch.where(seen.high > 0, seen.high, 1)]
    angles = [torch.tensor(angle, dtype=values.dtype) for angle in ANGLES]
    return least_error(values, [TanQ(scale, angle, spec.bits) for scale in scales for angle in angles])


def _brought_to_medians(graph: Graph, stats: Stats, start: QuantizedGraph) -> tuple[Graph, dict[str, Quantizer]]:
    """RepQ-ViT's graph and quantizers, norms brought to the median in place of the mean: all channels times a factor.

    graph: before its norms were changed.
    """
    quantizers = dict(start.quantizers)
    weight_of = {product.left: product.right for product in graph.found.products}
    folds: list[tuple[FoldableNorm, ChannelFold]] = []
    for norm, changed in zip(foldable_norms(graph), foldable_norms(start.graph), strict=True):
        found = repq_vit.norm_fold(norm, stats, start.plan)
        if found is None:
            continue
        _, fold = found
        median = median_scale(fold.ratio * fold.scale)
        factor = median / fold.scale
        unmoved = torch.zeros_like(fold.offset)
        folds.append((changed, ChannelFold(torch.ones_like(fold.ratio) / factor, unmoved, median, fold.zero_point)))
        for reader in norm.readers:
            for key, times in ((reader.site.key, factor), (weight_of[reader.site.key], 1 / factor)):
                if key in quantizers:
                    quantizers[key] = _times(quantizers[key], times)
    return fold_layer_norms(start.graph, folds), quantizers


def _times(quantizer: Quantizer, factor: Float[Tensor, ""]) -> Quantizer:
    """For numbers that are a factor larger, the same codes; of the grids with a scale that RepQ-ViT fits."""
    assert isinstance(quantizer, Uniform | LogSqrt2)
    return replace(quantizer, scale=quantizer.scale * factor)


DOPQ_VIT = Method("dopq-vit", spec, quantize)
