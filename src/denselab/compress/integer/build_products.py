"""How layers and products of activations become steps: codes of weights and biases, int32 sums.

Weights are symmetric per output channel, by their greatest magnitude; biases are int32 at the scale of the sums.
"""

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from denselab.compress.edit import argument
from denselab.compress.integer.builder import OPERAND_BITS, SUM_BITS, Builder, Value, as_node, pair
from denselab.compress.integer.program import MOST_SUMMED, Conv, Linear, MatMul

aten = torch.ops.aten

_MOST_BIAS = 2**30


def lower_linear(builder: Builder, node: fx.Node) -> Value:
    """A layer with a stored weight."""
    weight, bias = builder.stored(node.args[1]), argument(node, 2)
    return _linear_of(builder, node, 0, weight, bias)


def _linear_of(builder: Builder, node: fx.Node, number: int, weight: NDArray[np.float64], bias: Any) -> Value:
    x = builder.operand(node, number)
    _check_length(builder, node, weight.shape[1])
    codes, bias_codes, scale = _layer_codes(x, weight, None if bias is None else builder.stored(bias))
    return builder.emit(node, Linear(codes, bias_codes), [x], scale, SUM_BITS)


def lower_conv(builder: Builder, node: fx.Node) -> Value:
    """A 2D convolution with a stored weight."""
    if node.target is not aten.conv2d.default or node.args[1] in builder.seen.moving:
        raise builder.refused(node, "wanted a 2D convolution with stored weights and padding in numbers")
    x, weight = builder.operand(node, 0), builder.stored(node.args[1])
    _check_length(builder, node, math.prod(weight.shape[1:]))
    stride, padding, dilation = (
        pair(builder.size(argument(node, number, default))) for number, default in ((3, 1), (4, 0), (5, 1))
    )
    bias = argument(node, 2)
    codes, bias_codes, scale = _layer_codes(x, weight, None if bias is None else builder.stored(bias))
    conv = Conv(codes, bias_codes, stride, padding, dilation, argument(node, 6, 1))
    return builder.emit(node, conv, [x], scale[:, None, None], SUM_BITS)


def _layer_codes(
    x: Value, weight: NDArray[np.float64], bias: NDArray[np.float64] | None
) -> tuple[NDArray[np.int8], NDArray[np.int32], NDArray[np.float64]]:
    """Codes of a layer's weight and bias, and the scales [out] of its sums.

    A channel whose weights are so small that its bias would not fit has a larger scale.
    """
    most = np.abs(weight.reshape(len(weight), -1)).max(axis=1)
    offsets = np.zeros(len(weight)) if bias is None else bias
    scales = np.maximum(most / (2 ** (OPERAND_BITS - 1) - 1), np.abs(offsets) / (_MOST_BIAS * x.scale))
    scales = np.where(scales > 0, scales, 1.0)
    codes = np.rint(weight / scales.reshape(-1, *(1,) * (weight.ndim - 1))).astype(np.int8)
    sums = scales * float(x.scale)
    return codes, np.rint(offsets / sums).astype(np.int32), sums


def lower_matmul(builder: Builder, node: fx.Node) -> Value:
    """The product of two activations, or a layer written as a product."""
    left, right = (as_node(each) for each in node.args[:2])
    if right not in builder.seen.moving and len(builder.shape(right)) == 2:
        return _linear_of(builder, node, 0, builder.stored(right).T, None)
    if not {left, right} <= builder.seen.moving:
        raise builder.refused(node, "wanted a product of two activations, or of one and a stored matrix on its right")
    _check_length(builder, node, builder.shape(left)[-1])
    x, y = builder.operand(node, 0), builder.operand(node, 1)
    return builder.emit(node, MatMul(), [x, y], x.scale * y.scale, SUM_BITS)


def _check_length(builder: Builder, node: fx.Node, length: int) -> None:
    if length > MOST_SUMMED - 1:
        raise builder.refused(node, f"sums of {length} products of 8 bits overflow int32")
