"""Changing a captured graph: a copy that shares every parameter it does not replace, proved to say the same.

The model of the user, and the graph that was copied, keep their parameters.
"""

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from denselab.compress.find_sites import find_sites
from denselab.compress.graph import Graph, ShapesRun
from denselab.compress.sites import ModelHash
from denselab.errors import InputError

PARITY = 1e-4
"""How far an output may move when parameters are folded into each other, relative to its largest value: rounding of
float32 through a deep network."""


def argument(node: fx.Node, number: int, default: Any = None) -> Any:
    """An argument of an operation; the default where it is left out."""
    return node.args[number] if number < len(node.args) else default


def packet(node: object) -> Any:
    """The operation of a node whatever its overload; None if it is not one."""
    return getattr(node.target, "overloadpacket", None) if isinstance(node, fx.Node) else None


def is_stored(node: object) -> bool:
    """Whether an argument is a parameter or buffer itself."""
    return isinstance(node, fx.Node) and node.op == "get_attr"


def stored_tensor(module: nn.Module, node: fx.Node) -> Tensor:
    """The parameter or buffer of a module that a node of its graph stands for."""
    return cast("Tensor", _attribute(module, str(node.target)))


def is_shared(node: fx.Node) -> bool:
    """Whether several operations read a parameter."""
    return sum(len(each.users) for each in node.graph.find_nodes(op="get_attr", target=cast("Any", node.target))) > 1


def bias_name(weight: fx.Node) -> str:
    """What the bias beside a stored weight is called."""
    folder = str(weight.target).rpartition(".")[0]
    return f"{folder}.bias" if folder else "bias"


def float_dtype(graph: Graph) -> torch.dtype:
    """What a graph computes in: the type of its parameters."""
    return next((each.dtype for each in graph.module.parameters() if each.is_floating_point()), torch.float32)


class GraphEdit:
    """A copy of a graph that is being changed. nodes: of the copy, by the nodes that they are copies of."""

    def __init__(self, graph: Graph) -> None:
        self.source = graph
        self.nodes: dict[fx.Node, fx.Node] = {}
        self.graph = fx.Graph()
        output = self.graph.output(self.graph.graph_copy(graph.module.graph, self.nodes))
        self.nodes[graph.module.graph.output_node()] = output
        self.graph.set_codegen(cast("Any", graph.module.graph)._codegen)
        self.module = fx.GraphModule(graph.module, self.graph)

    def stored(self, node: fx.Node) -> Tensor:
        """The parameter or buffer that a node stands for."""
        return stored_tensor(self.module, node)

    def set_parameter(self, reader: fx.Node, number: int, value: Tensor, name: str) -> None:
        """Give an operation another parameter, in place of what it reads there, or None.

        It takes the name of the one that it replaces, and where there is none, or others read that too, the name given
        with a number after it, if that is taken.
        """
        old = argument(reader, number)
        if is_stored(old) and not is_shared(old):
            node = old
            _set_attribute(self.module, str(old.target), _as_parameter(value))
        else:
            node = self.parameter(reader, value, name)
        args = [*reader.args, *([None] * (number + 1 - len(reader.args)))]
        args[number] = node
        reader.args = tuple(args)

    def parameter(self, before: fx.Node, value: Tensor, name: str) -> fx.Node:
        """A node for a new parameter, in front of another node; a number follows its name if that is taken."""
        free = name
        number = 2
        while _has_attribute(self.module, free):
            free, number = f"{name}_{number}", number + 1
        _set_attribute(self.module, free, _as_parameter(value))
        with self.graph.inserting_before(before):
            return self.graph.get_attr(free)

    def finish(self, same_model: bool, same_answer: bool = True) -> Graph:
        """The changed graph; what nothing reads any more is gone.

        same_model: whether files that were made for the source are valid for it too (it keeps the hash).
        same_answer: raise InputError where its answer to a random image is not that of the source.
        """
        self.graph.eliminate_dead_code()
        self.graph.lint()
        module = fx.GraphModule(self.module, self.graph)
        inputs = _random_inputs(self.source)
        run = ShapesRun(module)
        with torch.no_grad():
            answer = run.run(*inputs)
            if same_answer:
                _check_same(self.source.run(*inputs), answer)
        found = find_sites(module.graph, run.shapes, images=len(inputs[0]))
        model = self.source.model if same_model else ModelHash.of(module, found)
        return replace(self.source, module=module, found=found, model=model)


def _random_inputs(graph: Graph) -> tuple[Tensor, ...]:
    dtype, generator = float_dtype(graph), torch.Generator().manual_seed(0)
    return tuple(torch.rand(shape, generator=generator, dtype=dtype) for shape in graph.example_shapes)


def _check_same(wanted: Any, got: Any) -> None:
    for before, after in zip(pytree.tree_leaves(wanted), pytree.tree_leaves(got), strict=True):
        if not isinstance(before, Tensor) or not before.is_floating_point() or not before.numel():
            continue
        apart = torch.where(before == after, 0, (after - before).abs()).max()  # equal infinities
        size = before.abs().where(before.isfinite(), 0).max()
        if not apart <= PARITY * size:
            raise InputError(
                f"model: folding its parameters changes its answer by {apart:.3g}, where the largest value is "
                f"{size:.3g}; wanted at most {PARITY:g} of it: are there weights of extreme size?"
            )


def _as_parameter(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach(), requires_grad=value.is_floating_point())


def _attribute(module: nn.Module, path: str) -> Any:
    folder, _, name = path.rpartition(".")
    return getattr(module.get_submodule(folder), name)


def _has_attribute(module: nn.Module, path: str) -> bool:
    try:
        _attribute(module, path)
    except AttributeError:
        return False
    return True


def _set_attribute(module: nn.Module, path: str, value: nn.Parameter) -> None:
    folder, _, name = path.rpartition(".")
    owner = module
    for part in folder.split(".") if folder else ():
        if not hasattr(owner, part):
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    if hasattr(owner, name):
        delattr(owner, name)
    owner.register_parameter(name, value)
