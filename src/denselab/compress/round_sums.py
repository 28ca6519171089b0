"""Codes of 8 bits for what integer convolutions make and operations in float read, such as sums.

ONNX Runtime computes a convolution in integers only where codes come out of it. In a residual network most outputs are
added to others first; with these codes all of its convolutions run in integers. The roundings become operations of the
graph, so that the simulation makes them as engines do.
"""

from typing import Any

import torch
from torch import fx

from denselab.compress.edit import GraphEdit, packet
from denselab.compress.relevance.scores import Batches
from denselab.compress.simulate import QuantizedGraph
from denselab.compress.sites import Op
from denselab.compress.to_onnx import stored_sites
from denselab.export.integers import HIGHEST_CODE, ActivationGrid, StoredWeight

aten = torch.ops.aten

_RELUS = {aten.relu, aten.relu6, aten.hardtanh}


def round_sums(quantized: QuantizedGraph, images: Batches) -> QuantizedGraph:
    """The network with 8 bits where an output of an integer convolution is read in float; itself if it has no such.

    Ranges are what is seen in float in images, as the graph takes them; where a layer of 8 bits reads the output too,
    that layer's. What leads to no other layer is left: scores stay exact.
    """
    grids = _grids(quantized, images)
    if not grids:
        return quantized
    edit = GraphEdit(quantized.graph)
    for node, grid in grids.items():
        copied = edit.nodes[node]
        numbers = (grid.scale, grid.zero_point, 0, grid.highest)
        with edit.graph.inserting_after(copied):
            passed = edit.graph.call_function(aten.fake_quantize_per_tensor_affine.default, (copied, *numbers))
        copied.replace_all_uses_with(passed, delete_user_cb=lambda user, passed=passed: user is not passed)
    graph = edit.finish(same_model=True, same_answer=False)
    return QuantizedGraph(graph, quantized.plan, quantized.quantizers)


def _grids(quantized: QuantizedGraph, images: Batches) -> dict[fx.Node, ActivationGrid]:
    """The grid of every output that is rounded."""
    graph, stored = quantized.graph, stored_sites(quantized)
    places = graph.found.places
    read_as = {
        (place.node, place.argument): site
        for key, site in stored.items()
        if isinstance(site, ActivationGrid)
        for place in places[key]
    }
    products = {place.node for each in places.values() for place in each}
    convolutions = [
        place.node
        for product in graph.found.products
        if graph.found.by_key[product.left].op is Op.CONV
        and isinstance(weight := stored.get(product.right), StoredWeight)
        and weight.integer
        for place in places[product.left]
    ]
    found: dict[fx.Node, ActivationGrid] = {}
    seen: dict[fx.Node, tuple[float, float]] = {}
    for node in map(_with_activation, convolutions):
        readers = [read_as.get((user, argument)) for user in node.users for argument in _places_of(node, user)]
        grids = [each for each in readers if each is not None]
        if len(grids) == len(readers) or not _leads_to(node, products):
            continue
        if grids and grids[0].highest == HIGHEST_CODE:
            found[node] = grids[0]
        elif not grids:
            seen[node] = (0.0, 0.0)
    if seen:
        run = _RangesRun(graph.module, seen)
        with torch.no_grad():
            for batch in images:
                run.run(batch)
    for node, (low, high) in seen.items():
        scale = (high - low) / HIGHEST_CODE or 1.0
        found[node] = ActivationGrid(scale, round(-low / scale), HIGHEST_CODE)
    return found


class _RangesRun(fx.Interpreter):
    """Runs that widen the ranges of some nodes to what they see."""

    def __init__(self, module: fx.GraphModule, seen: dict[fx.Node, tuple[float, float]]) -> None:
        super().__init__(module)
        self.seen = seen

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.seen:
            low, high = self.seen[n]
            self.seen[n] = min(low, value.min().item()), max(high, value.max().item())
        return value


def _with_activation(node: fx.Node) -> fx.Node:
    """The ReLU that alone reads a convolution, which engines fuse with it; else the convolution."""
    users = list(node.users)
    return users[0] if len(users) == 1 and packet(users[0]) in _RELUS else node


def _places_of(node: fx.Node, user: fx.Node) -> list[int]:
    """At which arguments a user reads a node; -1 where it stands elsewhere."""
    return [number for number, each in enumerate(user.args) if each is node] or [-1]


def _leads_to(node: fx.Node, products: set[fx.Node]) -> bool:
    """Whether something computed from a node is an operand of a product."""
    waiting, known = list(node.users), set[fx.Node]()
    while waiting:
        each = waiting.pop()
        if each in products:
            return True
        if each not in known:
            known.add(each)
            waiting += each.users
    return False
