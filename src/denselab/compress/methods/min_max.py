"""The plainest method: uniform grids from the least to the greatest number that was seen.

Jacob et al.: Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference, CVPR 2018,
arXiv:1712.05877, section 3; Krishnamoorthi 2018, arXiv:1806.08342, section 3: activations affine per tensor, weights
symmetric per output channel.
"""

import torch

from denselab.compress.graph import Graph
from denselab.compress.methods.method import Calibration, Method, Seen, fitted, unfit
from denselab.compress.observing import Stats
from denselab.compress.plan import Granularity, Grid, QuantPlan, QuantSpec, finest
from denselab.compress.quantizers import Log2, LogSqrt2, Quantizer
from denselab.compress.ranges import affine, symmetric, ternary
from denselab.compress.simulate import QuantizedGraph
from denselab.compress.sites import QuantSite


def spec(site: QuantSite, bits: int) -> QuantSpec:
    """Uniform everywhere."""
    if site.is_weight:
        return QuantSpec(bits, Grid.UNIFORM, finest(site), symmetric=True)
    return QuantSpec(bits, Grid.UNIFORM, Granularity.PER_TENSOR, symmetric=False)


def quantize(graph: Graph, stats: Stats, plan: QuantPlan, calibration: Calibration) -> QuantizedGraph:
    """Fit a plan. Raises InputError as `fitted`, and for grids whose parameters extremes do not say."""
    return QuantizedGraph(graph, plan, fitted(graph, stats, plan, fit))


def fit(site: QuantSite, spec: QuantSpec, seen: Seen) -> Quantizer:
    """The quantizer whose range are the extremes."""
    match spec.grid:
        case Grid.UNIFORM:
            return (symmetric if spec.symmetric else affine)(seen.low, seen.high, spec.bits)
        case Grid.LOG2 | Grid.LOG_SQRT2:
            scale = torch.where(seen.high > 0, seen.high, 1)
            return (Log2 if spec.grid is Grid.LOG2 else LogSqrt2)(scale, spec.bits)
        case Grid.TERNARY:
            return ternary(seen.values, seen.keep)
        case Grid.ADALOG | Grid.SULQ | Grid.TANQ:
            raise unfit(MIN_MAX.name, spec)


MIN_MAX = Method("minmax", spec, quantize)
