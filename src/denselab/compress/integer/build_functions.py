"""How softmax, GELU, norms, sums, constant factors and means become steps.

A constant factor (the scale of an attention, a LayerScale) is no step: it becomes part of the scale.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import fx

from denselab.compress.edit import argument, packet
from denselab.compress.integer.builder import BETWEEN_BITS, SUM_BITS, Builder, Value, as_node, growing
from denselab.compress.integer.layer_norm import layer_norm_for
from denselab.compress.integer.program import Add, Code, Relu, Sum
from denselab.compress.integer.requantize import dyadic_for
from denselab.compress.integer.shiftgelu import shiftgelu_for
from denselab.compress.integer.shiftmax import shiftmax_for

aten = torch.ops.aten

_SOFTMAX_BITS = 16
_SIGMOID_BITS = 8
_FINEST_EXPONENT = 2.0**-20
_ZERO_FACTOR = 2.0**-200
_MOST_AVERAGED = 2**15


def lower_softmax(builder: Builder, node: fx.Node) -> Value:
    """Over the last axis, to 16 bits; its input is not requantized where one scale holds for all."""
    x = builder.values[as_node(node.args[0])]
    if argument(node, 1) not in (-1, len(builder.shape(node)) - 1):
        raise builder.refused(node, "wanted a softmax over the last axis")
    x = _exponent(builder, node, as_is=x.is_plain)
    constants = shiftmax_for(float(x.scale), _SOFTMAX_BITS)
    return builder.emit(node, constants, [x], constants.output_scale, _SOFTMAX_BITS)


def lower_gelu(builder: Builder, node: fx.Node) -> Value:
    """Of 16 bits, with a sigmoid of 8; both the exact GELU and its tanh form."""
    x = _exponent(builder, node, as_is=False)
    constants = shiftgelu_for(float(x.scale), _SIGMOID_BITS)
    return builder.emit(node, constants, [x], constants.output_scale, SUM_BITS)


def _exponent(builder: Builder, node: fx.Node, as_is: bool) -> Value:
    """The input of an exponential: int32 sums as they are, else 16 bits; never at a scale too fine for it."""
    source = as_node(node.args[0])
    value = builder.values[source]
    if value.scale.max() >= _FINEST_EXPONENT and (as_is or (value.is_plain and value.bits <= BETWEEN_BITS)):
        return value
    return builder.to(value, builder.own_code(source, _FINEST_EXPONENT))


def lower_layer_norm(builder: Builder, node: fx.Node) -> Value:
    """Of 16 bits, over the last axis."""
    channels = builder.size(node.args[1])
    if len(channels) != 1:
        raise builder.refused(node, f"wanted a norm over the last axis, got one over {len(channels)}")
    weight, bias = (
        np.full(channels, default) if argument(node, number) is None else builder.stored(argument(node, number))
        for number, default in ((2, 1.0), (3, 0.0))
    )
    constants = layer_norm_for(weight, bias)
    return builder.emit(node, constants, [builder.plain(as_node(node.args[0]))], constants.output_scale, SUM_BITS)


def lower_relu(builder: Builder, node: fx.Node) -> Value:
    """At the scale of its input."""
    x = builder.values[as_node(node.args[0])]
    if not (x.scale > 0).all():
        x = builder.plain(as_node(node.args[0]))
    return builder.emit(node, Relu(), [x], x.scale, x.bits)


def lower_add(builder: Builder, node: fx.Node) -> Value:
    """A residual sum, a position embedding, a bias of attention logits; differences too."""
    factor = float(builder.size(node.kwargs.get("alpha", 1))) * (-1 if packet(node) is aten.sub else 1)
    x, y = (_addend(builder, node, each) for each in node.args[:2])
    code = builder.code_of(node)
    add = Add(dyadic_for(x.scale, code.scale), dyadic_for(factor * y.scale, code.scale), code.bits)
    return builder.emit(node, add, [x, y], code.scale, code.bits)


def _addend(builder: Builder, node: fx.Node, value: Any) -> Value:
    """A value as it is, or a stored one in 16 bits of its own."""
    if isinstance(value, fx.Node) and value in builder.seen.moving:
        return builder.values[value]
    stored = builder.stored(value)
    scale = np.abs(stored).max() / (2 ** (BETWEEN_BITS - 1) - 1)
    return builder.constant(node, stored, Code(float(scale) or 1.0, BETWEEN_BITS))


def lower_scaled(builder: Builder, node: fx.Node) -> Value:
    """No step: a constant factor, or one per channel, becomes part of the scale."""
    factor = builder.factor(node)
    if factor is None:
        raise builder.refused(node, "wanted a constant factor, got two values that depend on the image")
    source = next(as_node(each) for each in node.args[:2] if each in builder.seen.moving)
    x = builder.values[source]
    if builder.shape(source) != builder.shape(node) or (factor.ndim and x.bits < SUM_BITS and not x.is_plain):
        raise builder.refused(node, "wanted a factor that broadcasts to the value")
    return Value(x.name, x.scale * np.where(factor == 0, _ZERO_FACTOR, factor), x.bits)


def lower_mean(builder: Builder, node: fx.Node) -> Value:
    """A sum over some axes, at a smaller scale."""
    source = as_node(node.args[0])
    shape = builder.shape(source)
    axes = tuple(sorted(axis % len(shape) for axis in builder.size(argument(node, 1)) or range(len(shape))))
    return _averaged(builder, node, axes, bool(argument(node, 2, False)))


def lower_adaptive_mean(builder: Builder, node: fx.Node) -> Value:
    """Of a whole map."""
    dimensions = len(builder.shape(node))
    if builder.shape(node)[-2:] != (1, 1):
        raise builder.refused(node, "wanted the mean of the whole map")
    return _averaged(builder, node, (dimensions - 2, dimensions - 1), keep=True)


def _averaged(builder: Builder, node: fx.Node, axes: tuple[int, ...], keep: bool) -> Value:
    source = as_node(node.args[0])
    shape = builder.shape(source)
    count = math.prod(shape[axis] for axis in axes)
    if set(axes) & set(growing(builder.target(source))) or count > _MOST_AVERAGED:
        raise builder.refused(node, f"wanted a mean of at most {_MOST_AVERAGED} numbers of one image")
    x = builder.plain(source)
    return builder.emit(node, Sum(axes, keep), [x], x.scale / count, SUM_BITS)
