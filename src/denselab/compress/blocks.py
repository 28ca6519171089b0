"""A captured graph cut into blocks that run alone, one after another, from the values at the cuts.

Blocks are what reconstruction after training optimises (Li et al.: BRECQ, ICLR 2021, section 3.2: residual units, since
their errors hardly interact). They are found by the paths of modules alone: the innermost numbered module of at least
two layers ("blocks.3", "layers.1.blocks.0", "layer2.0"), outside of those the modules that multiply activations (an
attention), else single layers. A block is a run of operations in order of execution; what stands between two of them
is cut where the fewest numbers pass, so that a last norm and the choice of a token belong to the block before them.

Whatever skips a block (a residual, a feature tap) is carried past it by the values.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from denselab.compress.edit import GraphEdit, float_dtype
from denselab.compress.graph import Graph, Hook
from denselab.compress.sites import FoundSites, Place, module_of

Values = dict[str, Any]
"""What later operations still read at a cut, by the name of the node that made it: tensors and sizes."""


@dataclass(frozen=True, eq=False)
class Block:
    """Operations that follow each other.

    name: the module that holds its products. graph: from its inputs to the tuple of its outputs, with the sites that
    are read in it. sites: those that are read here first; every site of a model is so in exactly one block.
    inputs, outputs: names of values. live: what is still read after it.
    """

    name: str
    graph: Graph
    sites: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    live: frozenset[str]

    def run(self, values: Values, hooks: Mapping[str, Hook] | None = None) -> Values:
        """The values after the block from those before it; hooks on its sites as in `Graph.run`."""
        inputs = [values[name] for name in self.inputs]
        # As compiled code where nobody looks: an interpreter takes as long as a small block computes.
        made = self.graph.run(*inputs, hooks=hooks) if hooks else self.graph.module(*inputs)
        after = {**values, **dict(zip(self.outputs, made, strict=True))}
        return {name: value for name, value in after.items() if name in self.live}


@dataclass(frozen=True, eq=False)
class Blocks:
    """All blocks of a graph in order of execution; every operation is in exactly one."""

    graph: Graph
    blocks: tuple[Block, ...]

    def start(self, *inputs: Tensor) -> Values:
        """The values before the first block."""
        names = (node.name for node in self.graph.module.graph.nodes if node.op == "placeholder")
        return dict(zip(names, inputs, strict=True))

    def answer(self, values: Values) -> Any:
        """What the model returns, from the values after the last block."""
        nodes = self.graph.module.graph
        return nodes.process_outputs(map_arg(nodes.output_node().args[0], lambda node: values[node.name]))


def find_blocks(graph: Graph) -> Blocks:
    """The blocks of a graph, over its own parameters; a graph without products is one block."""
    stored = _stored(graph)
    order = [node for node in graph.module.graph.nodes if _computes(node) and node not in stored]
    last_use = _last_use(graph, order, stored)
    measured = _Measured(graph.module)
    with torch.no_grad():
        measured.run(*(torch.zeros(shape, dtype=float_dtype(graph)) for shape in graph.example_shapes))

    def passing(cut: int) -> list[fx.Node]:
        """What is made before a place in the order and read after it."""
        return [node for node, (made, read) in last_use.items() if made < cut <= read]

    cuts = [0]
    for before, after in pairwise(_runs(graph, order)):
        between = range(before[1] + 1, after[0] + 1)
        sizes = {cut: sum(measured.sizes[node] for node in passing(cut)) for cut in between}
        cuts.append(min(reversed(between), key=sizes.__getitem__))
    cuts.append(len(order))
    first_read = {key: places[0].node for key, places in graph.found.places.items()}
    blocks: list[Block] = []
    for start, end in pairwise(cuts):
        nodes = order[start:end]
        live = passing(end)
        outputs = [node for node in live if start <= last_use[node][0] < end]
        if end == len(order):
            # An answer may hold parameters as they are.
            outputs += [node for node in graph.module.graph.output_node().all_input_nodes if node in stored]
            live += outputs
        inside = set(nodes)
        sites = tuple(key for key, node in first_read.items() if node in inside)
        reads = {each for node in nodes for each in _read(node, stored)}
        inputs = [node for node in graph.module.graph.nodes if node in reads and node not in inside]
        blocks.append(
            Block(
                _common_module(graph, nodes),
                _part(graph, nodes, inputs, outputs),
                sites,
                tuple(node.name for node in inputs),
                tuple(node.name for node in outputs),
                frozenset(node.name for node in live),
            )
        )
    return Blocks(graph, tuple(blocks))


def with_parameters(graph: Graph, values: Mapping[str, Tensor], trainable: bool = False) -> Graph:
    """The same operations and sites over other parameters, by name; the rest is shared with the graph given.

    Files that were made for the graph stay valid (it keeps its hash), though its answer may change.
    """
    edit = GraphEdit(graph)
    for name, value in values.items():
        folder, _, leaf = name.rpartition(".")
        edit.module.get_submodule(folder).register_parameter(leaf, nn.Parameter(value, requires_grad=trainable))
    return replace(graph, module=edit.module, found=_moved(graph.found, edit.nodes))


def frozen(graph: Graph) -> Graph:
    """The same graph over the same numbers, for which nobody asks gradients."""
    return with_parameters(graph, {name: value.detach() for name, value in graph.module.named_parameters()})


def _moved(found: FoundSites, copies: Mapping[fx.Node, fx.Node]) -> FoundSites:
    """The sites that are read by the copies of nodes."""
    places = {
        key: tuple(Place(copies[each.node], each.argument) for each in places if each.node in copies)
        for key, places in found.places.items()
    }
    kept = {key: each for key, each in places.items() if each}
    return FoundSites(
        tuple(site for site in found.sites if site.key in kept),
        tuple(each for each in found.products if each.left in kept and each.right in kept),
        kept,
    )


def _computes(node: fx.Node) -> bool:
    return node.op not in ("placeholder", "get_attr", "output")


def _stored(graph: Graph) -> set[fx.Node]:
    """Parameters, and what is computed from them and constants alone: every block that reads them has its own."""
    found: set[fx.Node] = set()
    for node in graph.module.graph.nodes:
        if node.op == "get_attr" or (_computes(node) and all(each in found for each in node.all_input_nodes)):
            found.add(node)
    return found


def _last_use(graph: Graph, order: Sequence[fx.Node], stored: set[fx.Node]) -> dict[fx.Node, tuple[int, int]]:
    """When a value is made, -1 for the images, and when it is read for the last time: places in the order."""
    place = {node: number for number, node in enumerate(order)} | {graph.module.graph.output_node(): len(order)}
    return {
        node: (place.get(node, -1), max((place[user] for user in node.users), default=-1))
        for node in graph.module.graph.nodes
        if node not in stored and node.op != "output"
    }


def _read(node: fx.Node, stored: set[fx.Node]) -> list[fx.Node]:
    return [each for each in node.all_input_nodes if each not in stored]


def _runs(graph: Graph, order: Sequence[fx.Node]) -> list[tuple[int, int]]:
    """First and last place in the order of the operations that lie within one block for certain."""
    label_of = _Labels(graph)
    labels = [(number, label) for number, node in enumerate(order) if (label := label_of(node)) is not None]
    runs: list[tuple[str, int, int]] = []
    for label, members in groupby(labels, key=lambda each: each[1]):
        numbers = [number for number, _ in members]
        if not any(order[number] in label_of.products for number in numbers):
            continue
        if runs and runs[-1][0] == label:
            runs[-1] = (label, runs[-1][1], numbers[-1])
        else:
            runs.append((label, numbers[0], numbers[-1]))
    return [(first, last) for _, first, last in runs]


class _Labels:
    """Which block a node is in, as the paths of its modules say; None where they say nothing."""

    def __init__(self, graph: Graph) -> None:
        self.products = {place.node for places in graph.found.places.values() for place in places}
        weights: dict[str, set[str]] = {}
        layers: set[fx.Node] = set()
        for site in graph.sites:
            for place in graph.found.places[site.key] if site.is_weight else ():
                layers.add(place.node)
                for path in _modules(place.node):
                    weights.setdefault(path, set()).add(site.key)
        self.of_several = {path for path, keys in weights.items() if len(keys) > 1}
        self.of_activations = {module_of(node) for node in self.products - layers} - {""}

    def __call__(self, node: fx.Node) -> str | None:
        paths = _modules(node)
        repeated = [path for path in reversed(paths) if path in self.of_several]
        for path in repeated:
            if path.rpartition(".")[2].isdigit():
                return path
        for path in repeated:
            if path[-1:].isdigit():
                return path
        for path in paths:
            if path in self.of_activations:
                return path
        return (module_of(node) or node.name) if node in self.products else None


def _modules(node: fx.Node) -> list[str]:
    """Paths of the modules that run a node, outermost first, without the model itself."""
    return [path for path, _ in (node.meta.get("nn_module_stack") or {}).values() if path]


def _common_module(graph: Graph, nodes: Sequence[fx.Node]) -> str:
    inside = set(nodes)
    paths = [
        site.module.split(".")
        for site in graph.sites
        if any(place.node in inside for place in graph.found.places[site.key])
    ]
    common: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def _part(graph: Graph, nodes: Sequence[fx.Node], inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> Graph:
    """A graph of some nodes; what they read is given, or copied where it is stored."""
    part = fx.Graph()
    copies = {node: part.placeholder(node.name) for node in inputs}

    def copied(node: fx.Node) -> fx.Node:
        if node not in copies:
            copies[node] = part.node_copy(node, copied)
        return copies[node]

    for node in nodes:
        copied(node)
    part.output(tuple(copied(node) for node in outputs))
    module = fx.GraphModule(graph.module, part)
    given = set(inputs)
    computed = {node: copy for node, copy in copies.items() if node not in given}
    return replace(graph, module=module, found=_moved(graph.found, computed), check_sizes=_any_sizes)


def _any_sizes(*inputs: Tensor) -> None:
    """What is given to a part was made by the parts before it."""


class _Measured(fx.Interpreter):
    """One run of a graph that notes how many numbers every value holds; lists of tensors are no place to cut."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.sizes: dict[fx.Node, float] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.sizes[n] = value.numel()
        else:
            self.sizes[n] = math.inf if isinstance(value, list | tuple) else 0
        return value
