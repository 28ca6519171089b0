"""Finding the sites of a network: a walk over the operations of a captured graph, never by the names of modules.

Not sites: products that do not depend on the image (computed once, when the model is saved), and products with a
matrix that comes from sizes alone (resampling).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from enum import Enum
from itertools import count
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from denselab.compress.sites import (
    FoundSites,
    Op,
    Operand,
    Place,
    Product,
    QuantSite,
    Source,
    module_of,
    site_key,
)

aten = torch.ops.aten


class _Of(Enum):
    """What a value is computed from: sizes alone, stored tensors, or the image (and whatever else)."""

    SIZES = 0
    STORED = 1
    IMAGE = 2


_Depends = Mapping[fx.Node, _Of]

_PRODUCTS: dict[Any, tuple[Op, tuple[int, int]]] = {
    aten.linear: (Op.LINEAR, (0, 1)),
    **dict.fromkeys((aten.conv1d, aten.conv2d, aten.conv3d), (Op.CONV, (0, 1))),
    **dict.fromkeys((aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d), (Op.CONV_TRANSPOSE, (0, 1))),
    **dict.fromkeys((aten.matmul, aten.mm, aten.bmm), (Op.MATMUL, (0, 1))),
    **dict.fromkeys((aten.addmm, aten.baddbmm, aten.addbmm), (Op.MATMUL, (1, 2))),
}
"""Operations with two operands worth quantizing, and at which arguments they stand."""

# Same values in another order, or some of them.
_LAYOUT = {
    *(aten.view, aten._unsafe_view, aten.reshape, aten.flatten, aten.unflatten, aten.squeeze, aten.unsqueeze),
    *(aten.permute, aten.transpose, aten.t, aten.mT, aten.movedim, aten.swapaxes, aten.contiguous, aten.clone),
    *(aten.expand, aten.repeat, aten.slice, aten.select, aten.narrow, aten.index, aten.index_select, aten.gather),
    *(aten.split, aten.split_with_sizes, aten.chunk, aten.unbind, aten.roll, aten.flip, aten.pixel_shuffle),
    *(aten.pixel_unshuffle, aten.unfold, aten.im2col, aten.alias, aten.detach, aten.dropout, aten._to_copy, aten.to),
    *(aten.embedding, aten.channel_shuffle, aten.adaptive_max_pool2d, aten.max_pool2d, aten.max_pool2d_with_indices),
}
# Weighted means, zeros beside, and rounding: they keep a sign and an upper bound.
_AVERAGES = {
    *(aten.avg_pool2d, aten.adaptive_avg_pool2d, aten.mean, aten.constant_pad_nd, aten.pad),
    *(aten.upsample_nearest2d, aten.upsample_bilinear2d, aten._upsample_bilinear2d_aa),
    aten.fake_quantize_per_tensor_affine,
}
_JOINS = {aten.cat, aten.stack}
_SCALES = {aten.mul, aten.div, aten.sub, aten.add}
_MASKS = {aten.masked_fill, aten.clamp, aten.clamp_min, aten.clamp_max}
_NORMS = {
    *(aten.layer_norm, aten.batch_norm, aten.group_norm, aten.instance_norm, aten.rms_norm, aten.native_layer_norm),
    *(aten.native_group_norm, aten._native_batch_norm_legit_no_training, aten._fused_rms_norm),
}
_RELUS = {aten.relu, aten.relu6}
_ACTIVATIONS = {
    *(aten.hardtanh, aten.hardswish, aten.hardsigmoid, aten.silu, aten.mish, aten.elu, aten.selu, aten.celu),
    *(aten.leaky_relu, aten.prelu, aten._prelu_kernel, aten.softplus, aten.tanh, aten.sigmoid, aten.log_sigmoid),
}
_SOFTMAXES = {aten.softmax, aten._softmax, aten._safe_softmax}
_KINDS = {
    Source.NORM: _NORMS,
    Source.GELU: {aten.gelu},
    Source.RELU: _RELUS,
    Source.ACTIVATION: _ACTIVATIONS,
    Source.SOFTMAX: _SOFTMAXES,
}


def find_sites(graph: fx.Graph, shapes: Mapping[fx.Node, tuple[int, ...]], images: int) -> FoundSites:
    """The sites of a graph that runs on image tensors alone.

    shapes: of every tensor of the graph at an example of that many images.
    """
    depends = _dependences(graph)
    roles = _attention_roles(graph, depends)
    sites: dict[str, QuantSite] = {}
    places: dict[str, list[Place]] = {}
    products: list[Product] = []
    weights: dict[str, str] = {}
    readers: dict[fx.Node, str] = {}
    for node in graph.nodes:
        found = _operands(node, depends, roles)
        if found is None:
            continue
        op, arguments, operands = found
        module = module_of(node)
        call = next(n for n in count() if not any(site_key(module, op, each, n) in sites for each in operands))
        macs = _macs(node, op, arguments, shapes) // images
        keys: list[str] = []
        for side, (argument, operand) in enumerate(zip(arguments, operands, strict=True)):
            tensor = node.args[argument]
            assert isinstance(tensor, fx.Node)
            key = site_key(module, op, operand, call)
            if operand is Operand.WEIGHT:
                key = weights.setdefault(_expression(tensor), key)
            if key in sites:
                sites[key] = replace(sites[key], macs=sites[key].macs + macs)
            else:
                shape = shapes[tensor]
                sites[key] = QuantSite(
                    module=module,
                    op=op,
                    operand=operand,
                    call=call,
                    made_by=_source(tensor, depends),
                    shape=shape,
                    channel_axis=_channel_axis(op, operand, side, len(shape)),
                    elements=math.prod(shape) // (1 if depends[tensor] is not _Of.IMAGE else images),
                    macs=macs,
                    tensor=readers.setdefault(tensor, key),
                )
            places.setdefault(key, []).append(Place(node, argument))
            keys.append(key)
        products.append(Product(keys[0], keys[1], macs))
    return FoundSites(tuple(sites.values()), tuple(products), {key: tuple(each) for key, each in places.items()})


def _packet(node: fx.Node) -> Any:
    return getattr(node.target, "overloadpacket", node.target)


def _is_layout(node: fx.Node) -> bool:
    """Also the choice of one of several results of an operation."""
    return node.op == "call_function" and (
        _packet(node) in _LAYOUT or getattr(node.target, "__name__", "") == "getitem"
    )


def _tensors(node: fx.Node) -> list[fx.Node]:
    """The arguments that hold tensors, not sizes."""
    return [each for each in node.all_input_nodes if each.op != "call_function" or not _is_size(each)]


def _is_size(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, int | float | bool | torch.SymInt | torch.SymFloat | torch.SymBool)


def _dependences(graph: fx.Graph) -> dict[fx.Node, _Of]:
    found: dict[fx.Node, _Of] = {}
    for node in graph.nodes:
        match node.op:
            case "placeholder":
                found[node] = _Of.IMAGE
            case "get_attr":
                found[node] = _Of.STORED
            case _ if _is_size(node):
                found[node] = _Of.SIZES
            case _:
                found[node] = max(
                    (found[each] for each in node.all_input_nodes), key=lambda of: of.value, default=_Of.SIZES
                )
    return found


def _stored_as_is(node: fx.Node) -> bool:
    """Whether a value is a parameter or buffer, or a part of one."""
    while _is_layout(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node.op == "get_attr"


def _expression(node: fx.Node) -> str:
    """How a stored value is computed, in words that are the same wherever it is computed again."""
    if node.op != "call_function":
        return str(node.target)
    return f"{node.target}{map_arg((node.args, node.kwargs), _expression)}"


def _operands(
    node: fx.Node, depends: _Depends, roles: Mapping[Place, Operand]
) -> tuple[Op, tuple[int, int], tuple[Operand, Operand]] | None:
    if node.op != "call_function" or _packet(node) not in _PRODUCTS or depends[node] is not _Of.IMAGE:
        return None
    op, arguments = _PRODUCTS[_packet(node)]
    left, right = (node.args[argument] for argument in arguments)
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    if _Of.SIZES in (depends[left], depends[right]):
        return None
    if op is not Op.MATMUL:
        return op, arguments, (Operand.INPUT, Operand.RIGHT if depends[right] is _Of.IMAGE else Operand.WEIGHT)
    if _stored_as_is(right):
        return op, arguments, (Operand.INPUT, Operand.WEIGHT)
    if _stored_as_is(left):
        return op, arguments, (Operand.WEIGHT, Operand.INPUT)
    first, second = (Place(node, argument) for argument in arguments)
    return op, arguments, (roles.get(first, Operand.LEFT), roles.get(second, Operand.RIGHT))


def _attention_roles(graph: fx.Graph, depends: _Depends) -> dict[Place, Operand]:
    """Query, key, attention map, value: the products before and after every softmax that leads to a product.

    A softmax without one is the end of a classifier. Between them may stand reshapes, and before the softmax scales,
    biases, masks and norms of the logits.
    """
    roles: dict[Place, Operand] = {}
    for softmax in graph.nodes:
        if softmax.op != "call_function" or _packet(softmax) not in _SOFTMAXES or depends[softmax] is not _Of.IMAGE:
            continue
        reached = list(_products_after(softmax))
        for place in reached:
            first, second = _PRODUCTS[_packet(place.node)][1]
            roles[place] = Operand.ATTENTION
            roles[Place(place.node, second if place.argument == first else first)] = Operand.VALUE
        for product in _products_before(softmax) if reached else ():
            first, second = _PRODUCTS[_packet(product)][1]
            roles.setdefault(Place(product, first), Operand.QUERY)
            roles.setdefault(Place(product, second), Operand.KEY)
    return roles


def _products_after(node: fx.Node) -> Iterator[Place]:
    for user in node.users:
        if user.op == "call_function" and _PRODUCTS.get(_packet(user), (None,))[0] is Op.MATMUL:
            yield from (
                Place(user, argument) for argument in _PRODUCTS[_packet(user)][1] if user.args[argument] is node
            )
        elif _is_layout(user):
            yield from _products_after(user)


def _products_before(node: fx.Node) -> Iterator[fx.Node]:
    if node.op != "call_function":
        return
    packet = _packet(node)
    if _PRODUCTS.get(packet, (None,))[0] is Op.MATMUL:
        yield node
    elif packet is aten.where:
        for each in node.args[1:]:
            if isinstance(each, fx.Node):
                yield from _products_before(each)
    elif packet in _SCALES | _JOINS:
        for each in _tensors(node):
            yield from _products_before(each)
    elif packet in _MASKS | _NORMS | _SOFTMAXES or _is_layout(node):
        yield from _products_before(node.all_input_nodes[0])


def _source(node: fx.Node, depends: _Depends) -> Source:
    """Walk back to what made the values."""
    if depends[node] is not _Of.IMAGE:
        return Source.PARAMETER
    if node.op == "placeholder":
        return Source.IMAGE
    packet = _packet(node)
    if packet in _JOINS:
        joined = {_source(each, depends) for each in _tensors(node)}
        return joined.pop() if len(joined) == 1 else Source.OTHER
    if packet is aten.constant_pad_nd and len(node.args) > 2 and node.args[2] != 0:
        return Source.OTHER
    if packet in _AVERAGES or _is_layout(node):
        return _source(node.all_input_nodes[0], depends)
    if packet in _SCALES:
        return _source_of_scaled(node, depends)
    if packet is aten.hardtanh and len(node.args) > 1 and node.args[1] == 0:
        return Source.RELU
    for kind, packets in _KINDS.items():
        if packet in packets:
            return kind
    return Source.OTHER


def _source_of_scaled(node: fx.Node, depends: _Depends) -> Source:
    """A sum of two, or one that constants move and scale: an image and a norm stay what they are."""
    moving = [each for each in _tensors(node) if depends[each] is _Of.IMAGE]
    if len(moving) == 2:
        return Source.SUM if _packet(node) in (aten.add, aten.sub) else Source.OTHER
    source = _source(moving[0], depends)
    return source if source in (Source.IMAGE, Source.NORM) else Source.OTHER


def _macs(node: fx.Node, op: Op, arguments: Sequence[int], shapes: Mapping[fx.Node, tuple[int, ...]]) -> int:
    """Multiplications of one operation at the example."""
    left, right = (node.args[argument] for argument in arguments)
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    match op:
        case Op.LINEAR | Op.MATMUL:
            return math.prod(shapes[node]) * shapes[left][-1]
        case Op.CONV:
            return math.prod(shapes[node]) * math.prod(shapes[right][1:])
        case Op.CONV_TRANSPOSE:
            return math.prod(shapes[left]) * math.prod(shapes[right][1:])


def _channel_axis(op: Op, operand: Operand, side: int, dimensions: int) -> int | None:
    """side: 0 for the left operand of a product, 1 for the right."""
    summed_over = dimensions - 1 if side == 0 or dimensions == 1 else dimensions - 2
    other = max(dimensions - 2, 0) if side == 0 else dimensions - 1
    match op, operand:
        case _, Operand.ATTENTION:
            return None
        case Op.MATMUL, Operand.WEIGHT | Operand.VALUE:
            return other
        case Op.MATMUL, _:
            return summed_over
        case Op.CONV_TRANSPOSE, Operand.WEIGHT | Operand.RIGHT:
            return 1
        case _, Operand.WEIGHT | Operand.RIGHT:
            return 0
        case Op.LINEAR, _:
            return dimensions - 1
        case _:
            return 1
