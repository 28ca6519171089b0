"""Compression from Python, in five lines: any network, any photos, an ONNX file.

    graph = capture(network, photos[:1])
    stats = observe(graph, [photos])
    plan = choose_plan(graph, stats, [photos], "4.0bits")
    quantized = quantize(graph, stats, plan, [photos])
    export(quantized, "small.onnx")

Each result can be saved and read again (`Graph.site_list`, `Stats`, `QuantPlan`). `denselab compress` does the same,
and measures what it wrote.
"""

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor, nn

from denselab.compress.bit_losses import Importance
from denselab.compress.budgets import parse_budget
from denselab.compress.choose_bits import EXACT_CANDIDATES, choose_bits
from denselab.compress.fold_norms import fold_norms
from denselab.compress.graph import ANY_SIZE, Axis, Graph
from denselab.compress.graph import capture as captured
from denselab.compress.methods.all import measuring, method_named
from denselab.compress.methods.method import Calibration
from denselab.compress.observing import Stats
from denselab.compress.observing import observe as observe
from denselab.compress.plan import KEPT, Kept, QuantPlan, exact_everywhere
from denselab.compress.relevance.scores import Batches, Start
from denselab.compress.relevance.sensitivity import Change, squared_change
from denselab.compress.simulate import QuantizedGraph
from denselab.compress.site_groups import float_bytes
from denselab.compress.to_onnx import quantized_to_onnx
from denselab.errors import InputError
from denselab.files import atomic_path


def capture(network: nn.Module, *example: Tensor, free: frozenset[Axis] = ANY_SIZE) -> Graph:
    """The network as a graph, batch norms folded (see `graph.capture`, whose errors these are, and `fold_norms`)."""
    return fold_norms(captured(network, *example, free=free))


def choose_plan(
    graph: Graph,
    stats: Stats,
    batches: Batches,
    budget: str,
    method: str = "auto",
    importance: Importance = Importance.SENSITIVITY,
    kept: Iterable[Kept] = KEPT,
    change: Change = squared_change,
    start: Start | None = None,
    seed: int = 0,
) -> QuantPlan:
    """The plan of least loss within a budget such as "4.0bits", "2.5MB" or "0.25x": of the parameters, not of a file.

    Weights have at most `plan.MOST_WEIGHT_BITS`.
    change: how far an answer is from another. start: what relevance asks about; see `choose_bits`, whose errors these
    are, as are those of `parse_budget`.
    """
    chosen = method_named(method)
    bits = choose_bits(
        graph,
        stats,
        measuring(chosen),
        Calibration(batches, change, seed),
        parse_budget(budget, float_bytes(graph)),
        importance,
        EXACT_CANDIDATES,
        kept=kept,
        start=start,
    ).bits
    return QuantPlan.make(graph, chosen.name, chosen.spec, exact_everywhere(graph, bits), kept)


def quantize(
    graph: Graph,
    stats: Stats,
    plan: QuantPlan,
    batches: Batches = (),
    change: Change = squared_change,
    seed: int = 0,
) -> QuantizedGraph:
    """The network as a plan says, by the plan's own method, simulated in torch. batches: for methods that look again.

    Raises InputError for an unknown method, and as the method does.
    """
    return method_named(plan.method).quantize(graph, stats, plan, Calibration(batches, change, seed))


def export(quantized: QuantizedGraph, path: str | Path) -> Path:
    """Write ONNX of `pixels` to the network's outputs. Raises InputError: no .onnx, sites that cannot be written."""
    out = Path(path)
    if out.suffix != ".onnx":
        raise InputError(f"{out}: wanted a file name that ends in .onnx; rename it")
    model = quantized_to_onnx(quantized)
    with atomic_path(out) as partial:
        partial.write_bytes(model.SerializeToString())
    return out
