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

from denselab.compress.graph import Graph
from denselab.compress.methods import repq_vit
from denselab.compress.methods.method import Calibration, Method, Seen, unfit
from denselab.compress.observing import Stats
from denselab.compress.plan import Grid, QuantPlan, QuantSpec
from denselab.compress.quantizers import Quantizer, TanQ
from denselab.compress.ranges import least_error, median_scale, percentile_scales
from denselab.compress.simulate import QuantizedGraph
from denselab.compress.sites import QuantSite

ANGLES = tuple(math.pi / 2 * step / 16 for step in range(1, 16))
"""Radians that are tried, from nearly uniform to nearly all codes at the ends."""

_SAMPLED = 2**16


def spec(site: QuantSite, bits: int) -> QuantSpec:
    """TanQ where RepQ-ViT has log-sqrt2, affine for all else."""
    of_repq = repq_vit.spec(site, bits)
    return replace(of_repq, grid=Grid.TANQ) if of_repq.grid is Grid.LOG_SQRT2 else of_repq


def quantize(graph: Graph, stats: Stats, plan: QuantPlan, calibration: Calibration) -> QuantizedGraph:
    """RepQ-ViT's with norms at the median. Raises InputError as `fitted`, and for grids it cannot fit."""
    return repq_vit.reparameterized(graph, stats, plan, target=median_scale, fit=fit)


def fit(site: QuantSite, spec: QuantSpec, seen: Seen) -> Quantizer:
    """A TanQ of least error where the plan has one, else as RepQ-ViT."""
    match spec.grid:
        case Grid.TANQ:
            return fit_tanq(seen, spec.bits)
        case Grid.UNIFORM | Grid.LOG_SQRT2:
            return repq_vit.fit(site, spec, seen)
        case Grid.LOG2 | Grid.ADALOG | Grid.SULQ | Grid.TERNARY:
            raise unfit(DOPQ_VIT.name, spec)


def fit_tanq(seen: Seen, bits: int) -> TanQ:
    """The TanQ quantizer of least squared error, of percentiles and the greatest number as scale and of `ANGLES`."""
    values = seen.values if seen.keep else seen.values.flatten()[:: math.ceil(seen.values.numel() / _SAMPLED)]
    scales = [*percentile_scales(values, keep=seen.keep), torch.where(seen.high > 0, seen.high, 1)]
    angles = [torch.tensor(angle, dtype=values.dtype) for angle in ANGLES]
    return least_error(values, [TanQ(scale, angle, bits) for scale in scales for angle in angles])


DOPQ_VIT = Method("dopq-vit", spec, quantize)
