"""The integer operators as ONNX subgraphs of integer nodes only, equal to the last bit to those in numpy and torch.

What ONNX (opset 20) has no signed operator for is put together exactly:
- BitShift takes unsigned types only, and Div truncates toward zero. Where no operand is negative, `x >> n` is Div by
  2^n, or BitShift of uint32 where n varies by element. Else it is (x - (x & (2^n - 1))) / 2^n, and floor(x / d) is
  (x - Mod(x, d)) / d, as Mod with fmod = 0 has the sign of the divisor d > 0: nothing is left to truncate. Mod is slow.
- `x << n` is Mul by 2^n.
- Min, Max and Clip of int64 are Where and Less: on x86-64 ONNX Runtime gives the wrong operand where the two differ in
  some of their upper halves (seen in 1.31; microsoft/onnxruntime#25280). Those of int32 are right.

Softmax, LayerNorm and requantization need int64. The CPU plugin of OpenVINO (2026.4) computes it in int32, so that its
integers are wrong there.

A subgraph checks no bounds: the caller keeps inputs within those that the operators state. All take any signed integer
type and return int32.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from denselab.compress.integer.arrays import INT32_MOST
from denselab.compress.integer.layer_norm import NEWTON_START, IntegerLayerNorm
from denselab.compress.integer.requantize import Dyadic
from denselab.compress.integer.shift_exp import ShiftExp
from denselab.compress.integer.shiftgelu import ShiftGELU
from denselab.compress.integer.shiftmax import Shiftmax
from denselab.export.graph import OPSET

_IR_VERSION = 10

Shape = Sequence[int | str | None]


class IntegerGraph:
    """Nodes and constants of a graph that grows; values are named by `prefix` and a running number."""

    def __init__(self, prefix: str = "integer") -> None:
        self.prefix = prefix
        self.nodes: list[NodeProto] = []
        self.initializers: list[TensorProto] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def add(self, op: str, *inputs: str, **attributes: Any) -> str:
        """Append a node of one output, whose name is returned."""
        name = f"{self.prefix}_{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], name, **attributes))
        return name

    def int32(self, values: ArrayLike) -> str:
        """A constant; the same one is stored once."""
        return self.constant(np.asarray(values, np.int32))

    def int64(self, values: ArrayLike) -> str:
        """A constant; the same one is stored once."""
        return self.constant(np.asarray(values, np.int64))

    def constant(self, values: NDArray[np.integer[Any]]) -> str:
        """A constant of its own integer type; the same one is stored once."""
        key = (values.dtype.name, values.shape, values.tobytes())
        if key not in self._constants:
            self._constants[key] = f"{self.prefix}_{values.dtype.name}_{len(self._constants)}"
            self.initializers.append(numpy_helper.from_array(values, self._constants[key]))
        return self._constants[key]

    def to_model(
        self, inputs: Mapping[str, Shape], outputs: Mapping[str, Shape], input_type: int = TensorProto.INT32
    ) -> ModelProto:
        """A model of inputs of one integer type and int32 outputs of these shapes; None is any size."""
        given, returned = (
            [helper.make_tensor_value_info(name, kind, shape) for name, shape in end.items()]
            for end, kind in ((inputs, input_type), (outputs, TensorProto.INT32))
        )
        graph = helper.make_graph(self.nodes, self.prefix, given, returned, self.initializers)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=_IR_VERSION)


def add_shiftmax(graph: IntegerGraph, q: str, constants: Shiftmax) -> str:
    """Nodes of `shiftmax`."""
    q = graph.add("Cast", q, to=TensorProto.INT32)
    exps = _shift_exp(graph, graph.add("Sub", q, _row_max(graph, q)), constants.exp)
    exps, one = graph.add("Cast", exps, to=TensorProto.INT64), graph.int64(2**constants.reciprocal_bits - 1)
    total = _lesser(graph, graph.add("ReduceSum", exps, graph.int64([-1])), one)
    shares = graph.add("Mul", exps, graph.add("Div", one, total))
    divisor = graph.int64(2 ** (constants.reciprocal_bits + 1 - constants.output_bits))
    return graph.add("Cast", graph.add("Div", shares, divisor), to=TensorProto.INT32)


def add_shiftgelu(graph: IntegerGraph, q: str, constants: ShiftGELU) -> str:
    """Nodes of `shiftgelu`."""
    q = graph.add("Cast", q, to=TensorProto.INT32)
    top = graph.add("Max", _row_max(graph, q) if constants.row_maximum else q, graph.int32(0))
    exps = _shift_exp(graph, graph.add("Sub", q, top), constants.exp)
    exps_of_zero = _shift_exp(graph, graph.add("Neg", top), constants.exp)
    factor = graph.add("Div", graph.int32(INT32_MOST), graph.add("Add", exps, exps_of_zero))
    divisor = graph.int32(1 << (32 - constants.output_bits))
    sigmoids = graph.add("Div", graph.add("Mul", exps, factor), divisor)  # nothing is negative
    return graph.add("Mul", q, sigmoids)


def add_layer_norm(graph: IntegerGraph, q: str, constants: IntegerLayerNorm) -> str:
    """Nodes of `layer_norm`."""
    q = graph.add("Cast", q, to=TensorProto.INT32)
    centred = graph.add("Sub", q, _rounded_mean(graph, q, len(constants.bias)))
    wide = graph.add("Cast", centred, to=TensorProto.INT64)
    root = _integer_sqrt(
        graph, graph.add("ReduceSum", graph.add("Mul", wide, wide), graph.int64([-1])), constants.steps
    )
    factor = graph.add("Cast", graph.add("Div", graph.int64(INT32_MOST), root), to=TensorProto.INT32)
    shifted = _shifted_right(graph, graph.add("Mul", centred, factor), graph.int32, np.add(constants.down, 1))
    return graph.add("Add", shifted, graph.int32(constants.bias))


def add_requantize(graph: IntegerGraph, q: str, dyadic: Dyadic, bits: int = 8) -> str:
    """Nodes of `requantize`."""
    return _clipped(graph, _rescale(graph, q, dyadic), bits)


def add_requantized_sum(
    graph: IntegerGraph, q: str, dyadic: Dyadic, other: str, other_dyadic: Dyadic, bits: int = 8
) -> str:
    """Nodes of `requantized_sum`."""
    both = graph.add("Add", _rescale(graph, q, dyadic), _rescale(graph, other, other_dyadic))
    return _clipped(graph, both, bits)


def _shift_exp(graph: IntegerGraph, q: str, exp: ShiftExp) -> str:
    lowest, x0 = graph.int32(exp.lowest), graph.int32(exp.x0)
    if exp.up > 0:
        q = graph.add("Mul", graph.add("Max", q, graph.int32(exp.lowest >> exp.up)), graph.int32(1 << exp.up))
    elif exp.up < 0:
        q = _shifted_right(graph, q, graph.int32, -exp.up)
    q = graph.add("Max", q, lowest)
    more = graph.add("Add", q, _shifted_right(graph, q, graph.int32, 1))
    q = graph.add("Max", graph.add("Sub", more, _shifted_right(graph, q, graph.int32, 4)), lowest)
    steps = graph.add("Div", q, x0)  # neither is positive
    rest = graph.add("Sub", q, graph.add("Mul", steps, x0))
    line = graph.add("Mul", graph.add("Sub", rest, graph.int32(2 * exp.x0)), graph.int32(1 << exp.shift))
    by = graph.add("Cast", graph.add("Add", steps, graph.int32(1)), to=TensorProto.UINT32)
    shifted = graph.add("BitShift", graph.add("Cast", line, to=TensorProto.UINT32), by, direction="RIGHT")
    return graph.add("Cast", shifted, to=TensorProto.INT32)


def _row_max(graph: IntegerGraph, q: str) -> str:
    return graph.add("ReduceMax", q, graph.int64([-1]))


def _rounded_mean(graph: IntegerGraph, q: str, count: int) -> str:
    total = graph.add("ReduceSum", q, graph.int64([-1]))
    odd = graph.add("Mod", _floor_div(graph, total, graph.int32(count)), graph.int32(2))
    twice = graph.add("Add", graph.add("Mul", total, graph.int32(2)), graph.int32(count - 1))
    return _floor_div(graph, graph.add("Add", twice, odd), graph.int32(2 * count))


def _integer_sqrt(graph: IntegerGraph, squares: str, steps: int) -> str:
    """The root of 0 is 1, as that of 1 is; above it no step leads to 0."""
    one, two, start = (graph.int64(value) for value in (1, 2, NEWTON_START))
    squares = _greater(graph, squares, one)
    root = graph.add("Div", graph.add("Add", graph.add("Div", squares, start), start), two)
    for _ in range(steps - 1):
        both = graph.add("Add", graph.add("Div", squares, root), root)
        root = _lesser(graph, graph.add("Div", both, two), root)
    return root


def _rescale(graph: IntegerGraph, q: str, dyadic: Dyadic) -> str:
    product = graph.add("Mul", graph.add("Cast", q, to=TensorProto.INT64), graph.int64(dyadic.multiplier))
    divisor = graph.int64(np.left_shift(1, dyadic.shift))
    odd = graph.add("Div", graph.add("BitwiseAnd", product, divisor), divisor)
    almost_half = graph.int64(np.left_shift(1, dyadic.shift - 1) - 1)
    rounded = graph.add("Add", graph.add("Add", product, almost_half), odd)
    return _shifted_right(graph, rounded, graph.int64, dyadic.shift)


def _clipped(graph: IntegerGraph, x: str, bits: int) -> str:
    low, high = graph.int64(-(2 ** (bits - 1))), graph.int64(2 ** (bits - 1) - 1)
    return graph.add("Cast", _greater(graph, _lesser(graph, x, high), low), to=TensorProto.INT32)


def _lesser(graph: IntegerGraph, x: str, y: str) -> str:
    return graph.add("Where", graph.add("Less", x, y), x, y)


def _greater(graph: IntegerGraph, x: str, y: str) -> str:
    return graph.add("Where", graph.add("Less", x, y), y, x)


def _floor_div(graph: IntegerGraph, x: str, divisor: str) -> str:
    """floor(x / divisor) for a divisor above 0."""
    return graph.add("Div", graph.add("Sub", x, graph.add("Mod", x, divisor)), divisor)


def _shifted_right(graph: IntegerGraph, x: str, constant: Callable[[ArrayLike], str], bits: ArrayLike) -> str:
    """x >> bits of any sign. constant: of the type of x."""
    power = np.left_shift(1, bits)
    rest = graph.add("BitwiseAnd", x, constant(power - 1))
    return graph.add("Div", graph.add("Sub", x, rest), constant(power))
