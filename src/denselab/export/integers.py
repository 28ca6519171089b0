"""Marks of quantized tensors in a traced graph become integers: stored codes, and nodes that engines fuse to kernels.

While a network is traced its quantized tensors pass through `Mark`; `lowered` then writes what the engines want to see,
which was found by looking at the graphs that they execute (ONNX Runtime 1.31, OpenVINO 2026.4):

- Activations are QuantizeLinear and DequantizeLinear on uint8, cut off before where a grid has fewer levels. Zeros
  around them (the padding of a photo) are put around the codes, which are a quarter of the bytes.
- Weights are int8 whose number 0 has code 0: with other zero points OpenVINO computes convolutions in float, and linear
  layers with inputs quantized anew.
- Weights of fewer than 8 bits stay within -64..64: on processors of x86 without VNNI both engines add two products of
  uint8 and int8 in 16 bits, where 255 * 127 * 2 saturates and 255 * 64 * 2 does not. Weights of 8 bits are exact on
  other processors alone.
- Where codes minus zero points are not in that range, W = s (q - c) + s (c - z), c the middle code; the second part,
  one number per output channel, multiplies the sum of the inputs.
- Linear layers are MatMul, and Add of a float bias: both engines fuse the integers, and the rank may be any. (Gemm on
  rows is as fast in ONNX Runtime, and half as fast in OpenVINO.)
- Convolutions and Gemm have int32 biases on the product of both scales, which ONNX Runtime asks for. Its convolutions
  are integer only if their output is quantized too.
- Codes of 7 bits take a byte each, which needs no unpacking.
- Weights of products in float are looked up among numbers: a cast and a scale would make OpenVINO quantize inputs.

What makes a `QuantizedGraph` ready for this is `denselab.compress.to_onnx`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, assert_never

import numpy as np
import torch
from jaxtyping import Float, Integer
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

from denselab.export.packed_weights import WHOLE_BYTE, byte_table, pack, parts_of

OPSET = 21
"""The first with types of 4 bits."""

HIGHEST_CODE = 255
"""Of uint8."""

_DOMAIN = "denselab"
_MARK = "Mark"
_INT8 = np.iinfo(np.int8)
_NEVER_SATURATES = 64
_INT32_HIGHEST = np.iinfo(np.int32).max
_BYTE, _HALF_BYTE = 8, 4
_WITH_BIAS = 3
_WITH_VALUE = 3


@dataclass(frozen=True)
class ActivationGrid:
    """Codes 0..highest of uint8 in equal steps; zero_point, one of 0..255, is the code of the number 0."""

    scale: float
    zero_point: int
    highest: int


@dataclass(frozen=True, eq=False)
class StoredWeight:
    """A weight as codes 0..2^bits - 1 of steps: scale (codes - zero_point), both [K] along `axis`, or [1].

    integer: whether the other operand is codes too.
    """

    codes: Integer[NDArray[np.integer], "..."]
    bits: int
    scale: Float[NDArray[np.float32], "K"]
    zero_point: Integer[NDArray[np.int32], "K"]
    axis: int
    integer: bool


@dataclass(frozen=True, eq=False)
class TableWeight:
    """A weight as codes of so many bits that stand for the numbers of a table, [K, levels] along `axis`, K or 1."""

    codes: Integer[NDArray[np.integer], "..."]
    bits: int
    table: Float[NDArray[np.float32], "K levels"]
    axis: int


Site = ActivationGrid | StoredWeight | TableWeight


class Mark(nn.Module):
    """For tracing alone: says in the graph that a tensor is the site of that name."""

    def __init__(self, key: str) -> None:
        super().__init__()
        self.key = key

    def forward(self, x: Tensor) -> Tensor:
        """Zeros."""
        return torch.onnx.ops.symbolic(
            f"{_DOMAIN}::{_MARK}", (x,), {"key": self.key}, dtype=x.dtype, shape=x.shape, version=1
        )


def lowered(model: ModelProto, sites: Mapping[str, Site]) -> ModelProto:
    """The model with every mark replaced by what its site is. The model is changed."""
    graph = _Lowering(model, sites)
    for node in model.graph.node:
        graph.take(node)
    for output in model.graph.output:
        if output.name in graph.renamed:
            graph.add("Identity", graph.renamed[output.name], output=output.name)
    del model.graph.node[:]
    model.graph.node.extend(_needed(graph.nodes, {each.name for each in model.graph.output}))
    read = {name for node in model.graph.node for name in node.input} | {each.name for each in model.graph.output}
    kept = [each for each in (*model.graph.initializer, *graph.constants.values()) if each.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    opsets = [each for each in model.opset_import if each.domain != _DOMAIN]
    del model.opset_import[:]
    model.opset_import.extend(opsets)
    return model


def has_remainder(weight: StoredWeight) -> bool:
    """Whether codes minus zero point are out of range, so that only a linear layer or plain convolution takes them."""
    return bool(_remainder(weight).any())


class _Lowering:
    """Nodes and constants of the model that is being written. renamed: what is read in place of an output."""

    def __init__(self, model: ModelProto, sites: Mapping[str, Site]) -> None:
        self.sites = sites
        self.stored = {each.name: each for each in model.graph.initializer}
        self.nodes: list[NodeProto] = []
        self.constants: dict[tuple[Any, ...], TensorProto] = {}
        self.renamed: dict[str, str] = {}
        self.site_of: dict[str, Site] = {}
        self.made: dict[Any, str] = {}
        self.transposed: dict[tuple[int, tuple[int, ...]], StoredWeight] = {}

    def take(self, node: NodeProto) -> None:
        """Write a node of the traced graph."""
        read = [self.renamed.get(name, name) for name in node.input]
        if node.domain == _DOMAIN:
            self.renamed[node.output[0]] = self._site(read[0], self.sites[_attribute(node, "key").decode()])
            return
        match node.op_type, [self.site_of.get(name) for name in read[:2]]:
            case "Transpose", [StoredWeight(integer=True) as weight]:
                self.renamed[node.output[0]] = self._site("", self._transposed(weight, _attribute(node, "perm")))
            case "MatMul", [ActivationGrid(), StoredWeight(integer=True) as weight]:
                self.renamed[node.output[0]] = self._matmul(read, weight)
            case "Gemm" | "Conv", [ActivationGrid() as grid, StoredWeight(integer=True) as weight]:
                self.renamed[node.output[0]] = self._with_bias(node, read, grid, weight)
            case "GatherND", _:  # torch also indexes with int32, ONNX does not
                read[1] = self.add("Cast", read[1], to=TensorProto.INT64)
                self._keep(node, read)
            case _:
                self._keep(node, read)

    def _keep(self, node: NodeProto, read: Sequence[str]) -> None:
        kept = NodeProto()
        kept.CopyFrom(node)
        del kept.input[:]
        kept.input.extend(read)
        self.nodes.append(kept)

    def add(self, op: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        """Append a node of one output, whose name is returned."""
        name = output or f"integers_{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], name, **attributes))
        return name

    def constant(self, values: NDArray[Any]) -> str:
        """The name under which values are stored, the same ones once."""
        return self._stored(numpy_helper.from_array(values))

    def _stored(self, tensor: TensorProto) -> str:
        key = tensor.data_type, tuple(tensor.dims), tensor.raw_data
        if key not in self.constants:
            tensor.name = f"integers_{len(self.constants)}"
            self.constants[key] = tensor
        return self.constants[key].name

    def _site(self, read: str, site: Site) -> str:
        """The numbers of a site, written once for all that read them."""
        if self.site_of.get(read) == site:
            return read  # codes already
        key = (read, site) if isinstance(site, ActivationGrid) else id(site)
        if key not in self.made:
            match site:
                case ActivationGrid():
                    self.made[key] = self._activation(read, site)
                case StoredWeight():
                    self.made[key] = self._integer_weight(site) if site.integer else self._float_weight(site)
                case TableWeight():
                    self.made[key] = self._table_weight(site)
                case _:
                    assert_never(site)
            self.site_of[self.made[key]] = site
        return self.made[key]

    def _activation(self, x: str, grid: ActivationGrid) -> str:
        scale, zero = np.array(grid.scale, np.float32), np.array(grid.zero_point, np.uint8)
        if grid.highest < HIGHEST_CODE:
            ends = (np.array((code - grid.zero_point) * grid.scale, np.float32) for code in (0, grid.highest))
            x = self.add("Clip", x, *map(self.constant, ends))
        parameters = self.constant(scale), self.constant(zero)
        pad = self._pad_with_zeros(x)
        codes = self.add("QuantizeLinear", x if pad is None else pad.input[0], *parameters)
        if pad is not None:
            codes = self.add("Pad", codes, pad.input[1], parameters[1], mode="constant")
        return self.add("DequantizeLinear", codes, *parameters)

    def _pad_with_zeros(self, x: str) -> NodeProto | None:
        """What made a tensor, if it put zeros around another."""
        made_by = next((node for node in reversed(self.nodes) if x in node.output), None)
        if made_by is None or made_by.op_type != "Pad" or len(made_by.input) > _WITH_VALUE:
            return None
        value = made_by.input[2] if len(made_by.input) == _WITH_VALUE else ""
        zero = not value or (value in self.stored and not numpy_helper.to_array(self.stored[value]).any())
        return made_by if zero and _attribute(made_by, "mode") == b"constant" else None

    def _integer_weight(self, weight: StoredWeight) -> str:
        shift = _along(_shift(weight), weight)
        if weight.bits in WHOLE_BYTE:
            codes = self.constant((weight.codes - shift).astype(np.int8))
        else:
            moved = self.add("Sub", self._codes(weight), self.constant(shift))
            codes = self.add("Cast", moved, to=TensorProto.INT8)
        return self._dequantized(codes, weight.scale, np.int8, weight.axis)

    def _float_weight(self, weight: StoredWeight) -> str:
        steps = self.constant(np.arange(2**weight.bits, dtype=np.float32))
        zero, scale = (_along(each.astype(np.float32), weight) for each in (weight.zero_point, weight.scale))
        moved = self.add("Sub", self.add("Gather", steps, self._codes(weight)), self.constant(zero))
        return self.add("Mul", moved, self.constant(scale))

    def _table_weight(self, weight: TableWeight) -> str:
        channels, levels = weight.table.shape
        index = self._codes(weight)
        if channels > 1:
            rows = _along(levels * np.arange(channels, dtype=np.int32), weight)
            index = self.add("Add", index, self.constant(rows))
        return self.add("Gather", self.constant(weight.table.reshape(-1)), index)

    def _codes(self, weight: StoredWeight | TableWeight) -> str:
        """Codes as int32, stored in their bits."""
        codes, bits = weight.codes, weight.bits
        if bits in WHOLE_BYTE:
            return self.add("Cast", self.constant(codes.astype(np.uint8)), to=TensorProto.INT32)
        packed = pack(codes.reshape(-1), bits)
        if bits == _HALF_BYTE:
            stored = TensorProto(dims=codes.shape, data_type=TensorProto.UINT4, raw_data=packed[0].tobytes())
            return self.add("Cast", self._stored(stored), to=TensorProto.INT32)
        above, total = bits, ""
        for part, stored in zip(parts_of(bits), packed, strict=True):
            above -= part
            index = self.add("Cast", self.constant(stored), to=TensorProto.INT32)
            rows = self.add("Gather", self.constant(byte_table(part, above)), index)
            flat = self.add("Reshape", rows, self.constant(np.array([-1])))
            if codes.size % (_BYTE // part):
                flat = self.add("Slice", flat, self.constant(np.array([0])), self.constant(np.array([codes.size])))
            total = self.add("Add", total, flat) if total else flat
        return self.add("Reshape", total, self.constant(np.array(codes.shape)))

    def _dequantized(self, codes: str, scale: Float[NDArray[np.float32], "K"], dtype: Any, axis: int) -> str:
        """Codes around 0 times a scale per channel; ONNX Runtime wants the zero points too."""
        zero = np.zeros(scale.shape, dtype)
        if len(scale) == 1:
            return self.add("DequantizeLinear", codes, *(self.constant(each.reshape(())) for each in (scale, zero)))
        return self.add("DequantizeLinear", codes, self.constant(scale), self.constant(zero), axis=axis)

    def _transposed(self, weight: StoredWeight, order: Sequence[int]) -> StoredWeight:
        """A weight with its dimensions in another order, the same object every time."""
        key = id(weight), tuple(order)
        if key not in self.transposed:
            codes = np.ascontiguousarray(weight.codes.transpose(order))
            self.transposed[key] = replace(weight, codes=codes, axis=tuple(order).index(weight.axis))
        return self.transposed[key]

    def _matmul(self, read: Sequence[str], weight: StoredWeight) -> str:
        return self._plus(self.add("MatMul", *read), self._rest_of_product(read[0], weight))

    def _with_bias(self, node: NodeProto, read: Sequence[str], grid: ActivationGrid, weight: StoredWeight) -> str:
        """A convolution, or a linear layer on rows."""
        settings = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        bias, rest = self._bias(read, grid, weight)
        y = self.add(node.op_type, read[0], read[1], bias, **settings)
        if node.op_type == "Gemm":
            return self._plus(y, self._rest_of_product(read[0], weight), rest)
        beside = [-1, *(1 for _ in weight.codes.shape[2:])]
        factor = _remainder(weight)
        total = ""
        if factor.any():
            ones = self.constant(np.ones((1, *weight.codes.shape[1:]), np.int8))
            kernel = self._dequantized(ones, np.ones(1, np.float32), np.int8, 0)
            total = self.add("Conv", read[0], kernel, **settings)
            total = self.add("Mul", total, self.constant(factor.reshape(beside)))
        return self._plus(y, total, None if rest is None else rest.reshape(beside))

    def _rest_of_product(self, x: str, weight: StoredWeight) -> str:
        """What codes that are out of range leave to add; "" where none is."""
        factor = _remainder(weight)
        if not factor.any():
            return ""
        # A product with ones: the sums that OpenVINO (2026.4) makes of codes overflow.
        inputs = weight.codes.shape[1 - weight.axis]
        ones = self._dequantized(self.constant(np.ones((inputs, 1), np.int8)), np.ones(1, np.float32), np.int8, 0)
        return self.add("Mul", self.add("MatMul", x, ones), self.constant(factor))

    def _plus(self, y: str, more: str, bias: NDArray[np.float32] | None = None) -> str:
        if more:
            y = self.add("Add", y, more)
        return y if bias is None else self.add("Add", y, self.constant(bias))

    def _bias(
        self, read: Sequence[str], grid: ActivationGrid, weight: StoredWeight
    ) -> tuple[str, Float[NDArray[np.float32], "K"] | None]:
        """The bias in int32 steps of both scales; in float what does not fit, as where a weight is all but 0."""
        channels = weight.codes.shape[weight.axis]
        bias = np.zeros(channels, np.float32)
        if len(read) == _WITH_BIAS and read[2]:
            bias = numpy_helper.to_array(self.stored[read[2]]).astype(np.float32)
        scale = np.broadcast_to(np.float32(grid.scale) * weight.scale, channels).copy()
        steps = np.rint(bias.astype(np.float64) / scale)
        rest = None
        if np.abs(steps).max() > _INT32_HIGHEST:
            steps, rest = np.zeros(channels), bias
        elif not steps.any():
            # OpenVINO (2026.4) drops a bias of zeros, and then gives wrong numbers to what reads the sums in float
            # where others read codes of them. One step, some 1e-5 of what is summed, keeps it.
            steps[0] = 1
        return self._dequantized(self.constant(steps.astype(np.int32)), scale, np.int32, 0), rest


def _attribute(node: NodeProto, name: str) -> Any:
    return next(helper.get_attribute_value(each) for each in node.attribute if each.name == name)


def _along(values: NDArray[Any], weight: StoredWeight | TableWeight) -> NDArray[Any]:
    """Numbers per channel, shaped to broadcast to the weight."""
    return values.reshape([-1 if axis == weight.axis else 1 for axis in range(weight.codes.ndim)])


def _shift(weight: StoredWeight) -> Integer[NDArray[np.int32], "K"]:
    """The codes that become 0 of int8: the zero points, but for channels whose codes are too far from them."""
    others = tuple(axis for axis in range(weight.codes.ndim) if axis != weight.axis or len(weight.scale) == 1)
    low, high = (np.atleast_1d(each) for each in (weight.codes.min(axis=others), weight.codes.max(axis=others)))
    zero = weight.zero_point
    least, most = (_INT8.min, _INT8.max) if weight.bits == _BYTE else (-_NEVER_SATURATES, _NEVER_SATURATES)
    fits = (low - zero >= least) & (high - zero <= most)
    return np.where(fits, zero, -least).astype(np.int32)


def _remainder(weight: StoredWeight) -> Float[NDArray[np.float32], "K"]:
    """What an output channel takes of the sum of its inputs beside the product with int8."""
    return (weight.scale * (_shift(weight) - weight.zero_point)).astype(np.float32)


def _needed(nodes: Sequence[NodeProto], outputs: set[str]) -> list[NodeProto]:
    """The nodes that lead to outputs, in their order."""
    wanted = set(outputs)
    kept: list[NodeProto] = []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            kept.append(node)
    return kept[::-1]
