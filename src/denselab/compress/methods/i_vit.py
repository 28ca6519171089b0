"""I-ViT: a whole network in integers, softmax, GELU and LayerNorm among them.

Li & Gu: I-ViT: Integer-only Quantization for Efficient Vision Transformer Inference, ICCV 2023, arXiv:2207.01405;
zkkli/I-ViT@380ba99. Unlike the other methods it has no bits to plan (8 at the operands of products, 16 between), and
what it makes is no simulation in float but the program of integers itself (`integer.program`), which is also its file
(`integer.program_onnx`).

Deviation: the paper trains the quantized network and takes its ranges from running extremes. Here nothing is trained;
an operand's range is the share of its greatest magnitude that quantizes what was observed with the least squared error.
"""

from collections.abc import Callable
from dataclasses import dataclass

from denselab.compress.graph import Graph
from denselab.compress.integer.build import build_program
from denselab.compress.integer.builder import OPERAND_BITS, Calibrated, magnitudes
from denselab.compress.integer.program import IntegerProgram
from denselab.compress.methods.method import Calibration
from denselab.compress.observing import SiteStats, Stats
from denselab.compress.ranges import grid, least_error, symmetric
from denselab.errors import InputError

_SHARES = tuple(1 - step / 20 for step in range(16))


@dataclass(frozen=True)
class IntegerMethod:
    """A published way to make a trained network a program of integers.

    name: as on the command line. quantize: calibrates the scales and builds it.
    """

    name: str
    quantize: Callable[[Graph, Stats, Calibration], IntegerProgram]


def quantize(graph: Graph, stats: Stats, calibration: Calibration) -> IntegerProgram:
    """The integer program of a captured classifier. calibration: its batches are run once more, for what is no site.

    Raises InputError for statistics of another model, no images, NaN, and as `build_program` for what has no integer
    form.
    """
    graph.model.check_same(stats.model, "stats")
    found: dict[int, float] = {}
    operands: dict[str, float] = {}
    for site in graph.sites:
        if not site.is_weight:
            seen = stats.sites[site.key]
            try:
                operands[site.key] = found[id(seen)] if id(seen) in found else operand_scale(seen)
            except InputError as error:
                raise InputError(f"{site.key}: {error}") from error
            found[id(seen)] = operands[site.key]
    return build_program(graph, Calibrated(operands, magnitudes(graph, calibration.batches)))


def operand_scale(seen: SiteStats) -> float:
    """The scale of a symmetric 8-bit code for what was seen of an operand."""
    whole = symmetric(*seen.extremes(), OPERAND_BITS)
    return least_error(seen.values(), grid(whole, _SHARES)).scale.item()


I_VIT = IntegerMethod("i-vit", quantize)
