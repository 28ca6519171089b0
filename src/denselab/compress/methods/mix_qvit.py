"""Mix-QViT: bits by relevance times measured sensitivity, from an integer quadratic program.

Ranjan and Savakis: Mix-QViT: Mixed-Precision Vision Transformer Quantization Driven by Layer Importance and
Quantization Sensitivity, arXiv:2501.06357. Quantizers are those of LRP-QViT (`lrp_qvit`). The loss of a layer at a
width is its relevance times the change of the output when it alone has that width; the pair terms of the groups that
matter most make the program quadratic; it is solved exactly (`allocate`). Weights and activations of a layer share
their bits, which are chosen among those around the mean.

Deviations: the change is measured against the float model, not at a baseline width, and per side of a group; the
paper's code is not public. Bits at 2 that are to hold need training: `qat`, `--train-steps`.
"""

import math
from collections.abc import Iterable, Mapping

from denselab.compress.bit_losses import Importance
from denselab.compress.budgets import MeanBits
from denselab.compress.choose_bits import ChosenBits, bits_within
from denselab.compress.graph import Graph
from denselab.compress.measure_losses import IMAGES, measure
from denselab.compress.methods.lrp_qvit import quantize, spec
from denselab.compress.methods.method import Calibration, Method
from denselab.compress.observing import Stats
from denselab.compress.plan import KEPT, Kept
from denselab.compress.quantizers.checks import BITS
from denselab.compress.relevance.scores import Score, Start

MIX_QVIT = Method("mix-qvit", spec, quantize)


def mix_qvit_bits(
    graph: Graph,
    stats: Stats,
    calibration: Calibration,
    mean_bits: float,
    start: Start | None = None,
    relevance: Mapping[str, Score] | None = None,
    most_pairs_of: int = 6,
    kept: Iterable[Kept] = KEPT,
    images: int = IMAGES,
) -> ChosenBits:
    """Bits for every site, so many in the mean of weights and of activations; what is kept counts.

    relevance: LRP of the sites, if it is known; else it is measured from `start`. most_pairs_of: groups with pair
    terms. Raises InputError as `measure_losses.measure` and `allocate`.
    """
    widths = shared_widths(mean_bits)
    asked = {Importance.LRP_TIMES_SENSITIVITY}
    measured = measure(
        graph,
        stats,
        MIX_QVIT,
        calibration,
        asked,
        widths,
        kept=kept,
        start=start,
        relevance=relevance,
        most_pairs_of=most_pairs_of,
        images=images,
    )
    pairs = [(width, width) for width in widths]
    budget = MeanBits(mean_bits, mean_bits)
    return bits_within(graph, measured, budget, Importance.LRP_TIMES_SENSITIVITY, pairs, seed=calibration.seed)


def shared_widths(mean_bits: float) -> list[int]:
    """The widths around a mean: two below it to two above."""
    around = range(math.floor(mean_bits) - 2, math.ceil(mean_bits) + 3)
    return [width for width in around if width in BITS]
