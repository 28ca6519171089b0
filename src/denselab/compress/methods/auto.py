"""The method of choice: grids that engines compute with, ranges of least error, and reconstruction where it matters.

Uniform everywhere: activations affine per tensor, weights symmetric per output channel (Jacob et al., CVPR 2018), so
that the integers run as they are. Norms are made per tensor as in RepQ-ViT (`repq_vit`) where that helps: both networks
are tried. Then every block learns its weights, straight through their rounding, and all its scales, so that it gives
what the float block gives, by mean squared error (`reconstruct`), on every image and its mirror image; half of the
elements of activations, drawn anew in each step, stay float meanwhile (QDrop), without which few images are learned by
heart. What an image that nobody learned from is answered decides: the result is the better of before and after, and so
never worse than its start there.

`STEPS` steps per block, where published methods take 1000 to 20 000; blocks with 8 bits alone are left as they are.
Tried at 3 bits and left out, for none did better: AdaRound and an error weighted by the average perturbation Hessian,
which few images tell badly, on PolyMaX; on the ViT of benchmarks/ptq the change of the answer through the rest of the
network as the loss, MLPs rebuilt with ReLU, and training all blocks at once; on the ViT segmenter twice as many steps,
and weights that move a third as fast.
"""

from collections.abc import Sequence
from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from denselab.compress.block_loss import split_images
from denselab.compress.fold_layer_norms import fold_layer_norms, foldable_norms
from denselab.compress.graph import Graph
from denselab.compress.methods import min_max
from denselab.compress.methods.method import Calibration, Method, Seen, closest, fitted, unfit
from denselab.compress.methods.repq_vit import norm_fold
from denselab.compress.observing import Stats, observe
from denselab.compress.plan import Grid, QuantPlan, QuantSpec
from denselab.compress.quantizers import Quantizer
from denselab.compress.ranges import SHRINKAGES, affine, grid, least_error, percentile_ranges, symmetric, ternary
from denselab.compress.reconstruct import Loss, Recipe, StraightThrough, reconstruct
from denselab.compress.simulate import QuantizedGraph
from denselab.compress.sites import QuantSite

STEPS = 120
"""Per block."""

IMAGES_PER_STEP = 16
HELD_SHARE = 0.25
"""Of the batches of images, of those that nobody learns from; with a single batch it is judged by that."""

RECIPE = Recipe(
    Loss.OUTPUT,
    StraightThrough(0.03),
    STEPS,
    scale_rate=0.01,
    drop=0.5,
    images_per_step=IMAGES_PER_STEP,
    below_bits=8,
)

_SHARES = (0.97, 0.99, 0.999, 0.9999, 0.99999)
_ACTIVATION_SHRINKAGES = SHRINKAGES[::5]


def spec(site: QuantSite, bits: int) -> QuantSpec:
    """Uniform everywhere, as engines want it."""
    return min_max.spec(site, bits)


def quantize(graph: Graph, stats: Stats, plan: QuantPlan, calibration: Calibration) -> QuantizedGraph:
    """Fit what the plan says, then reconstruct.

    Raises InputError as `fitted`, for grids that are neither uniform nor ternary, and for no images.
    """
    batches = split_images(graph, calibration.batches, IMAGES_PER_STEP, calibration.seed)
    learned_from = batches[: max(round(len(batches) * (1 - HELD_SHARE)), 1)]
    held = batches[len(learned_from) :] or batches
    starts = [QuantizedGraph(graph, plan, fitted(graph, stats, plan, fit))]
    folds = [(norm, found[1]) for norm in foldable_norms(graph) if (found := norm_fold(norm, stats, plan))]
    if folds:
        folded = fold_layer_norms(graph, folds)
        seen = observe(folded, batches, fewest_images=1, seed=calibration.seed)
        starts.append(QuantizedGraph(folded, plan, fitted(folded, seen, plan, fit)))
    start = closest(graph, starts, held, calibration.change)
    if all(spec.bits >= RECIPE.below_bits for spec in plan.specs.values()):
        return start
    done = reconstruct(start, replace(calibration, batches=_with_mirrored(learned_from)), RECIPE, held)
    return closest(graph, [start, done], held, calibration.change)


def fit(site: QuantSite, spec: QuantSpec, seen: Seen) -> Quantizer:
    """The candidate of least squared error, from percentiles, and from the extremes and shares of them."""
    match spec.grid:
        case Grid.UNIFORM:
            uniform = symmetric if spec.symmetric else affine
            ranges = percentile_ranges(seen.values, _SHARES, seen.keep)
            shrunk = grid(
                uniform(seen.low, seen.high, spec.bits), SHRINKAGES if site.is_weight else _ACTIVATION_SHRINKAGES
            )
            return least_error(seen.values, [*shrunk, *(uniform(*each, spec.bits) for each in ranges)])
        case Grid.TERNARY:
            return ternary(seen.values, seen.keep)
        case Grid.LOG2 | Grid.LOG_SQRT2 | Grid.ADALOG | Grid.SULQ | Grid.TANQ:
            raise unfit(AUTO.name, spec)


def _with_mirrored(batches: Sequence[Float[Tensor, "B 3 H W"]]) -> list[Float[Tensor, "B 3 H W"]]:
    """Every image twice, the second time mirrored: rounding learns from few images, and fits what it does not see."""
    return [*batches, *(each.flip(-1) for each in batches)]


AUTO = Method("auto", spec, quantize)
