"""I&S-ViT: attention maps on shifted powers of two, and weights that learn in three stages, the smoothest first.

Zhong et al.: I&S-ViT: An Inclusive & Stable Method for Pushing the Limit of Post-Training ViTs Quantization, TPAMI
2025, arXiv:2311.10126; zysxmu/IaS-ViT@9300cea. Attention maps are quantized by SULQ (section 3.2, `quantizers.sulq`)
with the eta of least squared error. The rest is as in RepQ-ViT, in three stages (section 3.3), where the weights of
every block learn to give the float output of the block, by mean squared error:
1. weights float, activations quantized, what follows a LayerNorm per channel: the loss is smooth there;
2. what follows a LayerNorm becomes per tensor by a change of the norm, exactly;
3. weights quantized per output channel, and optimised again.

Deviations. The paper takes 1000 steps of 64 images and a rate of 4e-5, 200 steps at 6 bits; here it is `STEPS`, in each
of the stages, at relative rates that suit them. The code runs SULQ with a level more than fits its bits (see `Sulq`).
"""

from collections.abc import Mapping
from dataclasses import replace

import torch

from denselab.compress.fold_layer_norms import FoldableNorm, NormReader, fold_layer_norms, foldable_norms
from denselab.compress.graph import Graph
from denselab.compress.methods.method import Calibration, Method, Seen, fitted
from denselab.compress.methods.repq_vit import REPQ_VIT, norm_fold
from denselab.compress.methods.repq_vit import fit as fit_as_repq
from denselab.compress.observing import Stats
from denselab.compress.plan import Granularity, Grid, QuantPlan, QuantSpec
from denselab.compress.quantizers import ChannelFold, Quantizer, Uniform
from denselab.compress.ranges import SULQ_ETAS, least_error, sulq
from denselab.compress.reconstruct import Loss, Recipe, StraightThrough, reconstruct
from denselab.compress.simulate import QuantizedGraph
from denselab.compress.sites import Operand, QuantSite, Source

STEPS = 30
"""Per block and stage; the paper takes 1000."""

FLOAT_WEIGHTS = Recipe(Loss.OUTPUT, StraightThrough(0.003), STEPS, scale_rate=0.0)
QUANTIZED_WEIGHTS = Recipe(Loss.OUTPUT, StraightThrough(0.03), STEPS, scale_rate=0.0)


def spec(site: QuantSite, bits: int) -> QuantSpec:
    """SULQ for attention maps; the rest as in RepQ-ViT."""
    if site.operand is Operand.ATTENTION and site.made_by is Source.SOFTMAX:
        return QuantSpec(bits, Grid.SULQ)
    return REPQ_VIT.spec(site, bits)


def quantize(graph: Graph, stats: Stats, plan: QuantPlan, calibration: Calibration) -> QuantizedGraph:
    """The three stages. Raises InputError as `fitted`, for grids it cannot fit, and for no images."""
    plan.check(graph.site_list())
    folds = {norm: found for norm in foldable_norms(graph) if (found := norm_fold(norm, stats, plan)) is not None}
    calibration.say("I&S-ViT: activations")
    smooth = reconstruct(_smooth(graph, stats, plan, folds), calibration, FLOAT_WEIGHTS)
    shifted = {key: each for key, each in plan.specs.items() if each.grid is Grid.SULQ}
    others = {key: each for key, each in plan.specs.items() if key not in shifted}
    start = REPQ_VIT.quantize(smooth.graph, stats, replace(plan, specs=others), calibration)
    found = {**start.quantizers, **fitted(graph, stats, replace(plan, specs=shifted), fit)}
    calibration.say("I&S-ViT: weights")
    wanted = fold_layer_norms(graph, [(norm, fold) for norm, (_, fold) in folds.items()])
    return reconstruct(QuantizedGraph(start.graph, plan, found), calibration, QUANTIZED_WEIGHTS, wanted=wanted)


def fit(site: QuantSite, spec: QuantSpec, seen: Seen) -> Quantizer:
    """SULQ with the eta of least squared error; other grids as RepQ-ViT fits them."""
    if spec.grid is Grid.SULQ:
        return least_error(seen.values, [sulq(seen.low, seen.high, eta, spec.bits) for eta in SULQ_ETAS])
    return fit_as_repq(site, spec, seen)


def _smooth(
    graph: Graph, stats: Stats, plan: QuantPlan, folds: Mapping[FoldableNorm, tuple[int, ChannelFold]]
) -> QuantizedGraph:
    """Activations alone, per channel where a change of the norm will make them per tensor, with the same codes."""
    specs = {key: each for key, each in plan.specs.items() if not graph.found.by_key[key].is_weight}
    quantizers = fitted(graph, stats, replace(plan, specs=specs), fit)
    for norm, (bits, fold) in folds.items():
        for reader in norm.readers:
            if specs.get(reader.site.key) == QuantSpec(bits):
                specs[reader.site.key] = QuantSpec(bits, granularity=Granularity.PER_CHANNEL)
                quantizers[reader.site.key] = _per_channel(reader, fold, bits)
    return QuantizedGraph(graph, replace(plan, specs=specs), quantizers)


def _per_channel(reader: NormReader, fold: ChannelFold, bits: int) -> Uniform:
    """What the fold was made from, for the inputs of a layer."""
    per_input = reader.per_input(fold)
    shape = [-1 if dim == reader.site.channel_axis else 1 for dim in range(len(reader.site.shape))]
    zero_points = (per_input.zero_point - per_input.offset / per_input.scale).round().to(torch.int32)
    return Uniform((per_input.ratio * per_input.scale).view(shape), zero_points.view(shape), bits)


IS_VIT = Method("is-vit", spec, quantize)
