"""How what moves numbers about, and picks the greatest of them, becomes steps."""

import math
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
from torch import fx

from denselab.compress.edit import argument, packet
from denselab.compress.integer.builder import OPERAND_BITS, PARTS, SUM_BITS, Builder, Value, as_node, growing, pair
from denselab.compress.integer.program import Code, Concat, Conv, Expand, Maximum, Pad, Permute, Reshape, Slice

aten = torch.ops.aten


def lower_same(builder: Builder, node: fx.Node) -> Value:
    """No step."""
    return builder.values[as_node(node.args[0])]


def lower_reshape(builder: Builder, node: fx.Node) -> Value:
    """Views, and axes of length one that come and go."""
    return _reshaped(builder, node, builder.moved(as_node(node.args[0])))


def _reshaped(builder: Builder, node: fx.Node, x: Value) -> Value:
    return builder.emit(node, Reshape(builder.target(node)), [x], x.scale, x.bits)


def lower_permute(builder: Builder, node: fx.Node) -> Value:
    """Axes in another order."""
    x = builder.moved(as_node(node.args[0]))
    # Lengths that are all different say where each axis went.
    lengths = torch.empty(tuple(range(1, len(builder.shape(node)) + 1)), device="meta")
    moved = cast("Any", node.target)(lengths, *builder.size(node.args[1:]))
    order = tuple(length - 1 for length in moved.shape)
    return builder.emit(node, Permute(order), [x], x.scale, x.bits)


def lower_slice(builder: Builder, node: fx.Node) -> Value:
    """Part of an axis."""
    source, axis, start, stop, step = (
        argument(node, number, default) for number, default in enumerate((None, 0, None, None, 1))
    )
    axis %= len(builder.shape(node))
    taken = range(*slice(*builder.size((start, stop, step))).indices(builder.shape(source)[axis]))
    return _part(builder, node, source, axis, taken)


def lower_select(builder: Builder, node: fx.Node) -> Value:
    """One place of an axis, which goes."""
    source, axis, index = argument(node, 0), argument(node, 1), builder.size(argument(node, 2))
    return _one_of(builder, node, source, axis, index)


def _one_of(builder: Builder, node: fx.Node, source: fx.Node, axis: int, index: int) -> Value:
    axis %= len(builder.shape(source))
    index %= builder.shape(source)[axis]
    return _reshaped(builder, node, _part(builder, node, source, axis, range(index, index + 1)))


def _part(builder: Builder, node: fx.Node, source: fx.Node, axis: int, taken: range) -> Value:
    length = builder.shape(source)[axis]
    if taken == range(length):
        return builder.values[source]
    if axis in growing(builder.target(source)) or not len(taken):
        raise builder.refused(node, "it takes some images, or nothing")
    x = builder.moved(source)
    part = Slice(axis, taken.start, taken.stop, taken.step)
    return builder.emit(node, part, [x], x.scale, x.bits)


def lower_result(builder: Builder, node: fx.Node) -> Value:
    """One of the results of an operation that takes a tensor apart."""
    parts, index = as_node(node.args[0]), cast("int", node.args[1])
    if packet(parts) not in PARTS:
        raise builder.refused(parts, "it has no integer form")
    source = as_node(parts.args[0])
    if packet(parts) is aten.unbind:
        return _one_of(builder, node, source, argument(parts, 1, 0), index)
    axis = argument(parts, 2, 0) % len(builder.shape(source))
    lengths = [each.shape[axis] for each in parts.meta["val"]]
    start = sum(lengths[:index])
    return _part(builder, node, source, axis, range(start, start + lengths[index]))


def lower_roll(builder: Builder, node: fx.Node) -> Value:
    """Two parts of every axis in another order."""
    x = builder.moved(as_node(node.args[0]))
    shifts, axes = builder.size(argument(node, 1)), builder.size(argument(node, 2, ()))
    if not axes:
        raise builder.refused(node, "wanted the axes to roll")
    for shift, axis in zip(shifts, axes, strict=True):
        axis %= len(builder.shape(node))
        length = builder.shape(node)[axis]
        cut = -shift % length
        if axis in growing(builder.target(node)):
            raise builder.refused(node, "it rolls images")
        if cut:
            ends = (Slice(axis, cut, length, 1), Slice(axis, 0, cut, 1))
            parts = [builder.emit(node, each, [x], x.scale, x.bits) for each in ends]
            x = builder.emit(node, Concat(axis), parts, x.scale, x.bits)
    return x


def lower_expand(builder: Builder, node: fx.Node) -> Value:
    """Repeats along axes of length one."""
    source = as_node(node.args[0])
    if builder.shape(source) == builder.shape(node):
        return builder.values[source]
    x = builder.moved(source)
    return builder.emit(node, Expand(builder.target(node, of=builder.count)), [x], x.scale, x.bits)


def lower_cat(builder: Builder, node: fx.Node) -> Value:
    """Joins values in one code, and stored ones: a class token for every image."""
    sources, code = cast("list[fx.Node]", node.args[0]), builder.code_of(node)
    axis = argument(node, 1, 0) % len(builder.shape(node))
    if axis in growing(builder.target(node)):
        raise builder.refused(node, "it joins images")
    parts = [_joinable(builder, node, each, code) for each in sources]
    return builder.emit(node, Concat(axis), parts, code.scale, code.bits)


def _joinable(builder: Builder, node: fx.Node, source: fx.Node, code: Code) -> Value:
    if source in builder.seen.moving:
        return builder.to(builder.values[source], code)
    constant = builder.constant(node, builder.stored(source), code)
    shape = builder.target(source, of=builder.count)
    return builder.emit(node, Expand(shape), [constant], code.scale, code.bits) if growing(shape) else constant


def lower_pad(builder: Builder, node: fx.Node) -> Value:
    """Zeros around a map."""
    source, widths = as_node(node.args[0]), list(builder.size(node.args[1]))
    mode, value = (
        (argument(node, 2, "constant"), argument(node, 3))
        if packet(node) is aten.pad
        else (
            "constant",
            argument(node, 2),
        )
    )
    if not any(widths):
        return builder.values[source]
    if mode != "constant" or value or min(widths) < 0:
        raise builder.refused(node, "wanted zeros around the map")
    x = builder.moved(source)
    pairs = [(widths[number], widths[number + 1]) for number in range(0, len(widths), 2)]
    pairs += [(0, 0)] * (len(builder.shape(node)) - len(pairs))
    return builder.emit(node, Pad(tuple(reversed(pairs)), 0), [x], x.scale, x.bits)


def lower_mean_pool(builder: Builder, node: fx.Node) -> Value:
    """A convolution by ones, which wants 8 bits."""
    source = as_node(node.args[0])
    kernel = pair(builder.size(argument(node, 1)))
    stride, padding = pair(builder.size(argument(node, 2)) or kernel), pair(builder.size(argument(node, 3, 0)))
    ceil_mode, with_padding, divisor = (
        argument(node, number, default) for number, default in ((4, False), (5, True), (6, None))
    )
    if ceil_mode and any(length % step for length, step in zip(builder.shape(source)[-2:], stride, strict=True)):
        raise builder.refused(node, "wanted windows that fit the map")
    if divisor is not None or (any(padding) and not with_padding):
        raise builder.refused(node, "wanted means of whole windows")
    most = builder.calibrated.magnitudes[source.name]
    x = builder.to(builder.values[source], Code(most / (2 ** (OPERAND_BITS - 1) - 1) or 1.0, OPERAND_BITS))
    channels = builder.shape(source)[1]
    ones = Conv(
        np.ones((channels, 1, *kernel), np.int8), np.zeros(channels, np.int32), stride, padding, (1, 1), channels
    )
    return builder.emit(node, ones, [x], x.scale / math.prod(kernel), SUM_BITS)


def lower_max_pool(builder: Builder, node: fx.Node) -> Value:
    """The greatest of shifted slices, along each axis."""
    kernel = pair(builder.size(argument(node, 1)))
    stride = pair(builder.size(argument(node, 2)) or kernel)
    padding, dilation = (pair(builder.size(argument(node, number, default))) for number, default in ((3, 0), (4, 1)))
    if dilation != (1, 1) or argument(node, 5, False):
        raise builder.refused(node, "wanted pooling without dilation and ceil_mode")
    x = builder.moved(as_node(node.args[0]))
    (down, right), (height, width) = padding, builder.shape(node)[-2:]
    around = ((0, 0),) * (len(builder.shape(node)) - 2) + ((down, down), (right, right))
    if any(padding):
        lowest = Code(float(x.scale), x.bits).least
        x = builder.emit(node, Pad(around, lowest), [x], x.scale, x.bits)
    rows = _greatest(builder, node, x, len(around) - 2, kernel[0], stride[0], height)
    return _greatest(builder, node, rows, len(around) - 1, kernel[1], stride[1], width)


def _greatest(builder: Builder, node: fx.Node, x: Value, axis: int, kernel: int, stride: int, length: int) -> Value:
    """The greatest in every window along one axis."""
    parts = _windows(axis, kernel, stride, length)
    best = builder.emit(node, next(parts), [x], x.scale, x.bits)
    for part in parts:
        other = builder.emit(node, part, [x], x.scale, x.bits)
        best = builder.emit(node, Maximum(), [best, other], x.scale, x.bits)
    return best


def _windows(axis: int, kernel: int, stride: int, length: int) -> Iterator[Slice]:
    for offset in range(kernel):
        yield Slice(axis, offset, offset + (length - 1) * stride + 1, stride)
