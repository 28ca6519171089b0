"""What an integer program is built with: its steps so far, the scales of values, and what the graph's nodes are.

A value is 8 bits where a product reads it, and otherwise 16: between a layer and what only moves or joins its numbers,
in residual sums, and before a norm and a GELU. Where all that read it want the same 8 bits, moves and sums in between
are done on those.
"""

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx
from torch.fx.node import map_arg

from denselab.compress.edit import float_dtype, packet
from denselab.compress.graph import Axis, Graph
from denselab.compress.integer.program import IMAGES, Code, Constant, Operation, Requantize, Step
from denselab.compress.integer.requantize import dyadic_for
from denselab.compress.sites import module_of
from denselab.errors import InputError

aten = torch.ops.aten

OPERAND_BITS = 8
BETWEEN_BITS = 16
SUM_BITS = 32
HEADROOM = 2.0
"""What 16 bits hold, in greatest magnitudes seen: images to come may exceed those of the calibration."""

SAME = {aten.clone, aten.contiguous, aten.alias, aten.detach, aten.dropout, aten._to_copy, aten.to, aten.lift_fresh}
RESHAPES = {
    *(aten.view, aten._unsafe_view, aten.reshape, aten.flatten, aten.unflatten, aten.squeeze, aten.unsqueeze),
}
PERMUTATIONS = {aten.permute, aten.transpose, aten.t, aten.mT, aten.movedim, aten.swapaxes}
PARTS = {aten.unbind, aten.split, aten.split_with_sizes, aten.chunk}
PADS = {aten.pad, aten.constant_pad_nd}
FACTORS = {aten.mul, aten.div}
MOVES = {
    *(aten.slice, aten.select, aten.roll, aten.cat, aten.expand, aten.relu, aten.max_pool2d),
    *(SAME | RESHAPES | PERMUTATIONS | PARTS | PADS),
}
"""What commutes with a positive scale, so that the code it is read with may be taken before it."""


@dataclass(frozen=True)
class Calibrated:
    """What a program is made with.

    operands: the scale of the 8-bit code of every site that is computed from the image, by key. magnitudes: the
    greatest seen of every node of the graph that is, by name.
    """

    operands: Mapping[str, float]
    magnitudes: Mapping[str, float]


def magnitudes(graph: Graph, batches: Iterable[Tensor]) -> dict[str, float]:
    """The greatest magnitude of all that a graph computes, over calibration images, by the name of the node.

    Raises InputError for no images, and naming the operation for NaN and infinity.
    """
    run = _Magnitudes(graph.module)
    at_once = None if Axis.BATCH in graph.free else graph.example_shapes[0][0]
    with torch.no_grad():
        for batch in batches:
            for part in batch.split(at_once or max(len(batch), 1)):
                graph.check_sizes(part)
                run.run(part)
    if not run.seen:
        raise InputError("images: wanted at least one to calibrate with, got none; add images")
    return run.seen


class _Magnitudes(fx.Interpreter):
    """A run that notes the greatest magnitude of every float tensor."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seen: dict[str, float] = {}
        self.extra_traceback = False  # else torch writes into the text of errors

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op != "get_attr" and isinstance(value, Tensor) and value.is_floating_point() and value.numel():
            most = value.abs().amax().item()
            if not math.isfinite(most):
                raise InputError(
                    f"images: wanted finite numbers, got NaN or infinity from {n.target} in the module "
                    f"{module_of(n)!r}; I-ViT has no code for them"
                )
            self.seen[n.name] = max(most, self.seen.get(n.name, 0.0))
        return value


class _Seen(fx.Interpreter):
    """A run that keeps sizes and stored values, the shapes of all tensors, and what is computed from the image."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[fx.Node, Any] = {}
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}
        self.moving: set[fx.Node] = set()

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        is_size = isinstance(value, int | float | bool)
        if n.op == "placeholder" or (not is_size and any(each in self.moving for each in n.all_input_nodes)):
            self.moving.add(n)
        else:
            self.values[n] = value
        if isinstance(value, Tensor):
            self.shapes[n] = tuple(value.shape)
        return value


@dataclass(frozen=True, eq=False)
class Value:
    """Integers of a program: their scale, which broadcasts to them, and a bound on their bits."""

    name: str
    scale: NDArray[np.float64]
    bits: int

    @property
    def is_plain(self) -> bool:
        """Whether one positive scale holds for all."""
        return not self.scale.ndim and bool(self.scale > 0)


class Builder:
    """Steps that grow, and what is known of the nodes of the graph."""

    def __init__(self, graph: Graph, calibrated: Calibrated) -> None:
        self.graph = graph
        self.calibrated = calibrated
        self.free = Axis.BATCH in graph.free
        example = graph.example_shapes[0]
        dtype = float_dtype(graph)
        count = 2 if self.free else example[0]
        self.seen = _run(graph, torch.zeros(count, *example[1:], dtype=dtype))
        self.seen_more = _run(graph, torch.zeros(count + 1, *example[1:], dtype=dtype)) if self.free else self.seen
        self.count = count
        self.keys = {(place.node, place.argument): key for key, each in graph.found.places.items() for place in each}
        self.steps: list[Step] = []
        self.names: set[str] = {IMAGES}
        self.values: dict[fx.Node, Value] = {}
        self.coded: dict[tuple[str, Code], Value] = {}
        self.wanted = self._wanted_codes()

    # Values and their codes

    def emit(self, node: fx.Node, operation: Operation, inputs: Sequence[Value], scale: Any, bits: int) -> Value:
        """A new step."""
        return self._step(node.name, operation, inputs, scale, bits)

    def to(self, value: Value, code: Code) -> Value:
        """A value in a code, requantized if it is not."""
        if value.is_plain and value.bits <= code.bits and np.isclose(value.scale, code.scale, rtol=1e-9, atol=0):
            return value
        if (value.name, code) not in self.coded:
            requantize = Requantize(dyadic_for(value.scale, code.scale), code.bits)
            name = f"{value.name}_as_int{code.bits}"
            self.coded[value.name, code] = self._step(name, requantize, [value], code.scale, code.bits)
        return self.coded[value.name, code]

    def constant(self, node: fx.Node, values: NDArray[np.float64], code: Code) -> Value:
        """A stored value in a code."""
        return self.emit(node, Constant(code.of(np.atleast_1d(values))), (), code.scale, code.bits)

    def operand(self, node: fx.Node, number: int) -> Value:
        """What a product reads, in 8 bits. Raises InputError where that is no site."""
        return self.to(self.values[as_node(node.args[number])], self.operand_code(node, number))

    def plain(self, node: fx.Node) -> Value:
        """What a node makes, with one positive scale and of 16 bits at most."""
        value = self.values[node]
        return value if value.is_plain and value.bits <= BETWEEN_BITS else self.to(value, self.own_code(node))

    def moved(self, node: fx.Node) -> Value:
        """What a node makes, as it is best moved about: in the code that all its readers want, if there is one."""
        wanted = self.wanted.get(node)
        return self.plain(node) if wanted is None else self.to(self.values[node], wanted)

    def _step(self, name: str, operation: Operation, inputs: Sequence[Value], scale: Any, bits: int) -> Value:
        free, number = name, 2
        while free in self.names:
            free, number = f"{name}_{number}", number + 1
        self.names.add(free)
        self.steps.append(Step(free, operation, tuple(each.name for each in inputs)))
        return Value(free, np.asarray(scale, np.float64), bits)

    def operand_code(self, node: fx.Node, number: int) -> Code:
        key = self.keys.get((node, number), "")
        if key not in self.calibrated.operands:
            raise self.refused(node, "one of its operands is computed from sizes alone")
        return Code(self.calibrated.operands[key], OPERAND_BITS)

    def code_of(self, node: fx.Node) -> Code:
        return self.wanted.get(node) or self.own_code(node)

    def own_code(self, node: fx.Node, finest: float = 0.0) -> Code:
        most = self.calibrated.magnitudes[node.name]
        scale = HEADROOM * most / (2 ** (BETWEEN_BITS - 1) - 1)
        return Code(max(scale, finest) or 1.0, BETWEEN_BITS)

    def _wanted_codes(self) -> dict[fx.Node, Code]:
        """The one code in which all readers of a node want it, of those nodes where there is one."""
        found: dict[fx.Node, Code] = {}
        for node in reversed(self.graph.module.graph.nodes):
            if node in self.seen.moving and node.op != "output":
                wanted = {self._wanted_by(user, node, found) for user in node.users if user in self.seen.moving}
                code = wanted.pop() if len(wanted) == 1 else None
                if code is not None:
                    found[node] = code
        return found

    def _wanted_by(self, user: fx.Node, node: fx.Node, found: Mapping[fx.Node, Code]) -> Code | None:
        numbers = [number for number, each in enumerate(user.args) if each is node and (user, number) in self.keys]
        if numbers:
            codes = {self.operand_code(user, number) for number in numbers}
            return codes.pop() if len(codes) == 1 else None
        if packet(user) in MOVES or user.target is operator.getitem:
            return found.get(user)
        if packet(user) in FACTORS and user in found:
            factor = self.factor(user)
            if factor is not None and not factor.ndim and factor != 0:
                return Code(found[user].scale / abs(float(factor)), found[user].bits)
        return None

    # What the arguments of nodes are

    def factor(self, node: fx.Node) -> NDArray[np.float64] | None:
        """What a multiplication or division multiplies the image's value with; None where both depend on it."""
        moving = [each in self.seen.moving if isinstance(each, fx.Node) else False for each in node.args[:2]]
        if all(moving) or (packet(node) is aten.div and (moving[1] or node.kwargs.get("rounding_mode"))):
            return None
        by = self.stored(node.args[1 if moving[0] else 0])
        return 1 / by if packet(node) is aten.div else by

    def stored(self, value: Any) -> NDArray[np.float64]:
        """A number, or a stored tensor; one that is repeated for every image, once."""
        if not isinstance(value, fx.Node):
            return np.asarray(value, np.float64)
        found, more = (_array(each.values[value]) for each in (self.seen, self.seen_more))
        if found.shape == more.shape:
            return found
        if found.shape[0] == self.count and found.shape[1:] == more.shape[1:] and (more == more[:1]).all():
            return found[:1]
        raise self.refused(value, "what it makes depends on the number of images")

    def size(self, value: Any) -> Any:
        """An argument that is no tensor, with its sizes as numbers."""
        return map_arg(value, self.seen.values.__getitem__)

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        return self.seen.shapes[node]

    def target(self, node: fx.Node, of: int | None = None) -> tuple[int, ...]:
        """The shape of what a node makes, -1 where it grows with the images (`of`: where it must be their number)."""
        shape, more = self.seen.shapes[node], self.seen_more.shapes[node]
        found = tuple(-1 if fewer != many else fewer for fewer, many in zip(shape, more, strict=True))
        if found.count(-1) > 1 or (of is not None and any(shape[axis] != of for axis in growing(found))):
            raise self.refused(node, "its shape depends on the number of images in more than one way")
        return found

    def refused(self, node: fx.Node, why: str) -> InputError:
        """What is raised for an operation that cannot be lowered."""
        return InputError(
            f"model: I-ViT cannot run {node.target} in the module {module_of(node)!r} in integers: {why}; replace it "
            "in the model, or take another method"
        )


def _run(graph: Graph, images: Tensor) -> _Seen:
    run = _Seen(graph.module)
    with torch.no_grad():
        run.run(images)
    return run


def as_node(value: Any) -> fx.Node:
    """An argument that is known to be a value of the graph."""
    return cast("fx.Node", value)


def _array(value: Any) -> NDArray[np.float64]:
    if isinstance(value, Tensor):
        return value.detach().cpu().double().numpy()
    return np.asarray(value, np.float64)


def growing(shape: Sequence[int]) -> list[int]:
    """The axes of a shape that depend on the number of images."""
    return [axis for axis, length in enumerate(shape) if length == -1]


def pair(value: Any) -> tuple[int, int]:
    """A number for both axes of a map, or one for each."""
    values = [value] * 2 if isinstance(value, int) else list(value)
    return (values[0], values[-1])
