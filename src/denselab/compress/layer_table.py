"""A row for every layer of a plan: its bits, what counts on it, what they lose, and how far it is off."""

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from denselab.compress.bit_losses import Importance, Measured, side_losses
from denselab.compress.graph import Graph
from denselab.compress.plan import QuantPlan, kept_sites
from denselab.compress.quantizers import quantized as through
from denselab.compress.relevance.scores import SavedRelevance
from denselab.compress.saved_file import reading
from denselab.compress.simulate import QuantizedGraph
from denselab.compress.site_groups import site_groups
from denselab.files import write_json

COLUMNS = ("layer", "operation", "bits", "relevance", "sensitivity", "error")
"""Of the table per layer."""


@dataclass(frozen=True)
class Layer:
    """One product, such as a linear layer or that of queries and keys.

    first, second: its operands, the weight first where there is one; their bits None in float. relevance: share of all.
    loss: what its group loses at these bits while the rest is float; None where nobody measured. error: sum of the
    relative squared errors of what it reads. kept: at 8 bits whatever the budget.
    """

    name: str
    op: str
    first: str
    second: str
    first_bits: int | None
    second_bits: int | None
    relevance: float
    loss: float | None
    error: float
    kept: bool


def layer_table(
    graph: Graph,
    plan: QuantPlan,
    relevance: SavedRelevance,
    errors: Mapping[str, float],
    measured: Measured | None,
    importance: Importance,
) -> tuple[Layer, ...]:
    """Every product of a graph in order of execution. errors: of `site_errors`. measured: None with a plan as given."""
    sites, kept = graph.found.by_key, kept_sites(graph, plan.kept)
    total = math.fsum(each.magnitude for each in relevance.scores.values()) or 1.0
    of_group = {key: group.key for group in site_groups(graph, plan.kept) for key in group.sites}
    losses = None if measured is None or importance is Importance.UNIFORM else side_losses(measured, importance)

    def bits(key: str) -> int | None:
        return plan.specs[key].bits if key in plan.specs else None

    def loss(key: str) -> float | None:
        width = bits(key)
        if losses is None or width is None:
            return None
        return losses[0 if sites[key].is_weight else 1].get(of_group[key], {}).get(width)

    rows: list[Layer] = []
    for product in graph.found.products:
        both = (product.right, product.left) if sites[product.right].is_weight else (product.left, product.right)
        known = [each for each in map(loss, both) if each is not None]
        first, second = (sites[key] for key in both)
        rows.append(
            Layer(
                first.module or "(model)",
                first.op.value,
                first.operand.value,
                second.operand.value,
                bits(first.key),
                bits(second.key),
                math.fsum(relevance.scores[key].magnitude for key in both if key in relevance.scores) / total,
                math.fsum(known) if known else None,
                math.fsum(errors.get(key, 0.0) for key in both),
                not kept.isdisjoint(both),
            )
        )
    return tuple(rows)


def layer_cells(layer: Layer) -> tuple[str, ...]:
    """One row of the table, in the order of COLUMNS."""
    loss = "-" if layer.loss is None else f"{layer.loss:.2e}"
    operands = f"{layer.first} {_bits(layer.first_bits)}, {layer.second} {_bits(layer.second_bits)}"
    kept = " (kept)" if layer.kept else ""
    return (layer.name, layer.op, operands + kept, f"{100 * layer.relevance:.1f} %", loss, f"{100 * layer.error:.3f} %")


def sites_in_float(graph: Graph, plan: QuantPlan) -> tuple[str, ...]:
    """What a plan leaves in float, counted, in words: sites by their operand and operation."""
    counted = Counter((site.op, site.operand) for site in graph.sites if site.key not in plan.specs)
    return tuple(f"{count} x {operand.value} of {op.value}" for (op, operand), count in counted.items())


def site_errors(quantized: QuantizedGraph, batches: Sequence[Tensor]) -> dict[str, float]:
    """Of every planned site: squared error over squared size, from photos that run through the float network."""
    sums = {key: [0.0, 0.0] for key in quantized.quantizers}

    def watching(key: str) -> Callable[[Tensor], Tensor]:
        def hook(x: Tensor) -> Tensor:
            sums[key][0] += (through(quantized.quantizers[key], x) - x).double().square().sum().item()
            sums[key][1] += x.double().square().sum().item()
            return x

        return hook

    hooks = {key: watching(key) for key in sums}
    with torch.no_grad():
        for pixels in batches:
            quantized.graph.run(pixels, hooks=hooks)
    return {key: error / size if size else 0.0 for key, (error, size) in sums.items()}


def write_layers(layers: Sequence[Layer], path: Path) -> None:
    """As readable JSON, atomically."""
    write_json(path, {"layers": [vars(each) for each in layers]})


def read_layers(path: Path) -> tuple[Layer, ...]:
    """Raises InputError, naming the file, for a missing or damaged one."""
    with reading(path, "a table of layers", "delete it"):
        return tuple(Layer(**each) for each in json.loads(path.read_bytes())["layers"])


def _bits(bits: int | None) -> str:
    return "float" if bits is None else str(bits)
