"""Layer-wise relevance propagation (LRP) for any captured graph: gradient times input behind a modified backward pass.

LRP is patented for commercial use in some places (the authors of AttnLRP say: free for personal and scientific
purposes). Have that checked before you ship it. Nothing needs this file: every other `Relevance` does without, and
`denselab explain` imports it only to run it (`--method gradient` does not).

Relevance R of a value x is x * g, with g what the backward pass brings (Achtibat et al.: AttnLRP, ICML 2024,
section 3; rachtibat/LRP-eXplains-Transformers@f043441 lxt/efficient). Rules, each a change of that backward pass:

    linear, convolution    epsilon rule with epsilon 0 (Bach et al., PLOS ONE 2015, eq. 58): the plain gradient;
                           or the gamma rule (Montavon et al. 2019, section 10.2) in its form for inputs of any sign
                           (Andeol et al. 2021; zennit 0.5.1 `Gamma`)
    normalisation          deviation held constant; so are all denominators and norms of vectors
    one-element functions  R passes on (eq. 9): g = g (f(x) - f(0)) / x
    product of two         each operand gets half of R (eq. 7): attention passes a quarter to q and to k, half to v
                           and to the attention map; of x f(gate), x f(0) goes to x and the rest is shared
    softmax                plain gradient times input
    CP-LRP                 (Ali et al., ICML 2022) the attention map is held constant, so q and k get nothing

Sums, reshapes, pooling and resampling are (piecewise) linear and keep their gradient. Where to sample an image
(deformable attention) is held constant, as weights of attention in CP-LRP are. What f(0), biases and position
embeddings add absorbs relevance; for functions with f(0) = 0 ours are the published rules, for others (sigmoid, exp)
f(x) / x would be without bound around 0. Weights, and activations that no relevance passes through, have w * g too:
the sum of the messages that pass by.

What reaches the image and what constants absorb add up to the start: exactly with CP-LRP and in networks without
softmax. A softmax does not conserve: of near-equal logits it gives nearly a constant, which absorbs most of the half
that AttnLRP sends to the map, so that relevance fades from block to block.
"""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, fx

from denselab.compress.edit import GraphEdit
from denselab.compress.graph import Graph
from denselab.compress.relevance.scores import (
    Batches,
    Score,
    Start,
    gradient_times_activation,
)
from denselab.compress.sites import Operand, Place, module_of
from denselab.errors import InputError

aten = torch.ops.aten


class Attention(Enum):
    """Whether relevance passes through the attention map to q and k."""

    ATTN_LRP = "through q, k and v"
    CP_LRP = "through v alone"


@dataclass(frozen=True)
class LrpRules:
    """What can be chosen. gamma: of convolutions and linear layers, from 0 up; None: epsilon rule with epsilon 0."""

    attention: Attention = Attention.ATTN_LRP
    conv_gamma: float | None = None
    linear_gamma: float | None = None

    def __post_init__(self) -> None:
        for name, gamma in (("conv_gamma", self.conv_gamma), ("linear_gamma", self.linear_gamma)):
            if gamma is not None and not (math.isfinite(gamma) and gamma >= 0):
                raise InputError(f"{name}: wanted a finite number from 0 up, or None, got {gamma}")


def lrp(graph: Graph, batches: Batches, start: Start, rules: LrpRules = LrpRules()) -> dict[str, Score]:
    """Relevance of every site; a `Relevance`. Raises InputError as one, and as `lrp_graph`."""
    return gradient_times_activation(lrp_graph(graph, rules), batches, start)


def lrp_graph(graph: Graph, rules: LrpRules = LrpRules()) -> Graph:
    """The same graph, of which gradient times input is relevance; its results are the same up to rounding.

    Raises InputError, naming operator and module, for an operation that no rule is known for and that is not linear in
    what depends on the image.
    """
    edit = GraphEdit(graph)
    held = _logits_of_attention(graph) if rules.attention is Attention.CP_LRP else set[fx.Node]()
    rewriter = _Rewriter(rules, held)
    for node in graph.module.graph.nodes:
        rewriter.rewrite(node, edit.nodes[node])
    places = {
        key: tuple(Place(edit.nodes[place.node], place.argument) for place in found)
        for key, found in graph.found.places.items()
    }
    return replace(graph, module=fx.GraphModule(graph.module, edit.graph), found=replace(graph.found, places=places))


class _Rewriter:
    """Gives each node of a copy its rule. It keeps which nodes carry relevance to the image."""

    def __init__(self, rules: LrpRules, held: set[fx.Node]) -> None:
        self.rules = rules
        self.held = held
        self.carrying: set[fx.Node] = set()

    def rewrite(self, node: fx.Node, copy: fx.Node) -> None:
        if not _is_continuous(node):
            return
        if node.op == "placeholder":
            self.carrying.add(node)
        if node.op != "call_function" or not self.carrying.intersection(node.all_input_nodes):
            return
        packet = getattr(node.target, "overloadpacket", node.target)
        if packet in _CONSTANTS:
            return
        if node in self.held or self._is_held(node, packet):
            _give_rule(copy, _held)
            return
        self._give(node, copy, packet)
        self.carrying.add(node)

    def _carries(self, node: fx.Node, argument: int) -> bool:
        return len(node.args) > argument and node.args[argument] in self.carrying

    def _is_held(self, node: fx.Node, packet: Any) -> bool:
        """Scales, and what does not depend on the image itself but is divided by what does."""
        return (
            packet in _SCALES
            or (packet is aten.pow and _exponent(node) <= 0)
            or (packet is aten.div and not self._carries(node, 0))
        )

    def _give(self, node: fx.Node, copy: fx.Node, packet: Any) -> None:
        if packet in _PRODUCTS and all(self._carries(node, each) for each in _PRODUCTS[packet]):
            at_zero = tuple(_at_zero(each) for each in node.args) if packet is aten.mul else ()
            if any(at_zero):
                _give_rule(copy, _gated, at_zero=at_zero)
            else:
                _give_rule(copy, _shared, at=_PRODUCTS[packet])
        elif packet in _GAMMA_LAYERS and self._carries(node, 0) and self._gamma(packet) is not None:
            _give_rule(copy, _by_gamma, gamma=self._gamma(packet))
        elif packet in _PRODUCTS or packet in _LINEAR or packet in _TAYLOR or _is_batch_norm_of_constants(node, packet):
            pass
        elif packet in _NORMS:
            _give_rule(copy, _NORMS[packet])
        elif packet in (aten.div, aten.grid_sampler) and "rounding_mode" not in node.kwargs:
            if self._carries(node, 1):
                _give_rule(copy, _second_held)
        elif packet in _POINTWISE and self._carries(node, 0):
            if any(each in self.carrying for each in node.all_input_nodes[1:]):
                raise _no_rule(node)
            _give_rule(copy, _identity)
        else:
            raise _no_rule(node)

    def _gamma(self, packet: Any) -> float | None:
        return self.rules.linear_gamma if packet is aten.linear else self.rules.conv_gamma


def _give_rule(node: fx.Node, rule: Any, **options: Any) -> None:
    """Have a node run a rule in place of its operation, with the same arguments at the same places."""
    node.kwargs = {**node.kwargs, **options, "op": cast("Any", node.target)}
    node.target = rule


def _no_rule(node: fx.Node) -> InputError:
    return InputError(
        f"model: relevance propagation has no rule for {node.target} in the module {module_of(node)!r}, which is not "
        "linear in what depends on the image; take another relevance (gradient x activation, Fisher, KL sensitivity)"
    )


def _is_continuous(node: fx.Node) -> bool:
    """Whether a node makes numbers that a gradient can pass through: not integers, truth values or sizes."""
    value = node.meta.get("val")
    parts = cast("Sequence[Any]", value) if isinstance(value, list | tuple) else (value,)
    return any(isinstance(each, Tensor) and (each.is_floating_point() or each.is_complex()) for each in parts)


def _logits_of_attention(graph: Graph) -> set[fx.Node]:
    queries = (site.key for site in graph.sites if site.operand is Operand.QUERY)
    return {place.node for key in queries for place in graph.found.places[key]}


def _exponent(node: fx.Node) -> float:
    """Of a power; nan where it is no number."""
    exponent = node.args[1]
    return exponent if isinstance(exponent, int | float) else math.nan


def _shared(*args: Any, op: Any, at: Sequence[int], **options: Any) -> Tensor:
    """A product whose operands get half of the relevance each."""
    return op(*(_half(each) if place in at else each for place, each in enumerate(args)), **options)


def _gated(first: Tensor, second: Tensor, op: Any, at_zero: tuple[float, float]) -> Tensor:
    """A product of which each operand gets half, after what it gets alone if the other is a gate that is never shut."""
    alone = at_zero[1] * (first - first.detach()) + at_zero[0] * (second - second.detach())
    return op(_half(first), _half(second)) + alone / 2


def _at_zero(node: Any) -> float:
    """What the function that made a gate gives at 0; 0 for anything else."""
    while isinstance(node, fx.Node) and getattr(node.target, "overloadpacket", None) in _SPREADS:
        node = node.args[0]
    return _GATES.get(getattr(node.target, "overloadpacket", None), 0.0) if isinstance(node, fx.Node) else 0.0


def _half(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The same, with half the gradient."""
    view = x.view_as(x)
    if view.requires_grad:
        view.register_hook(_halved)
    return view


def _halved(gradient: Tensor) -> Tensor:
    return gradient / 2


def _held(*args: Any, op: Any, **options: Any) -> Tensor:
    """A result held constant."""
    return op(*args, **options).detach()


def _second_held(first: Tensor, second: Tensor, *args: Any, op: Any, **options: Any) -> Tensor:
    """An operation whose second operand is held constant: a denominator, places to sample at."""
    return op(first, second.detach(), *args, **options)


_NEAR_ZERO = 1e-3


def _identity(x: Tensor, *args: Any, op: Any, **options: Any) -> Tensor:
    """A function of one element whose slope is that of the line from (0, f(0)) to (x, f(x)); 0 at x = 0 if f(0) = 0."""
    fixed = x.detach()
    value, at_zero = op(fixed, *args, **options), op(torch.zeros_like(fixed), *args, **options)
    if at_zero.any():
        # Close to zero the difference is lost in rounding; the line to a point beside it has nearly the same slope.
        beside = torch.where(fixed.abs() < _NEAR_ZERO, torch.full_like(fixed, _NEAR_ZERO).copysign(fixed), fixed)
        slope = (op(beside, *args, **options) - at_zero) / beside
    else:
        slope = value / torch.where(fixed == 0, 1, fixed)
    return value.detach() + slope.detach() * (x - fixed)


def _normalised(x: Tensor, dims: tuple[int, ...], eps: float, centred: bool = True) -> Tensor:
    """x less its mean, by its deviation, which is held constant."""
    shifted = x - x.mean(dims, keepdim=True) if centred else x
    return shifted / (shifted.detach().square().mean(dims, keepdim=True) + eps).sqrt()


def _scaled(x: Tensor, weight: Tensor | None, bias: Tensor | None, axis: int | None) -> Tensor:
    """x * weight + bias, along one axis, or along the last ones."""
    shape = [-1 if each == axis else 1 for each in range(x.ndim)]
    weight, bias = (each if each is None or axis is None else each.view(shape) for each in (weight, bias))
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _layer_norm(
    x: Tensor,
    shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
    op: Any,
) -> Tensor:
    return _scaled(_normalised(x, tuple(range(-len(shape), 0)), eps), weight, bias, axis=None)


def _rms_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None, *, op: Any
) -> Tensor:
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    return _scaled(_normalised(x, tuple(range(-len(shape), 0)), eps, centred=False), weight, None, axis=None)


def _group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
    op: Any,
) -> Tensor:
    normalised = _normalised(x.reshape(len(x), groups, -1), (2,), eps).view(x.shape)
    return _scaled(normalised, weight, bias, axis=1)


def _instance_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, *args: Any, op: Any) -> Tensor:
    return _group_norm(x, x.shape[1], weight, bias, args[4], op=op)


def _by_gamma(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, op: Any, gamma: float, **options: Any
) -> Tensor:
    """A linear layer or convolution that favours what agrees with the sign of its output, by gamma.

    z > 0: R goes to x+ (w + gamma w+) and x- (w + gamma w-), in proportion; z < 0: to x+ (w + gamma w-) and
    x- (w + gamma w+); the bias is favoured as inputs above 0 are and absorbs its part.
    """

    def sum_of(of_positive: Tensor, of_negative: Tensor, favoured_bias: Tensor | None) -> Tensor:
        return op(positive, of_positive, favoured_bias, *args, **options) + op(
            negative, of_negative, None, *args, **options
        )

    def up(parameter: Tensor) -> Tensor:
        return parameter + gamma * parameter.clamp(min=0)

    def down(parameter: Tensor) -> Tensor:
        return parameter + gamma * parameter.clamp(max=0)

    positive, negative = torch.where(x > 0, x, 0), torch.where(x > 0, 0, x)
    z = op(x, weight, bias, *args, **options).detach()
    agreeing = sum_of(up(weight), down(weight), None if bias is None else up(bias))
    opposing = sum_of(down(weight), up(weight), None if bias is None else down(bias))
    # z stays the result; what has the gradient is added to an exact 0.
    stand_in = torch.where(z > 0, agreeing * _ratio(z, agreeing), opposing * _ratio(z, opposing) * (z < 0))
    return z + (stand_in - stand_in.detach())


def _ratio(z: Tensor, part: Tensor) -> Tensor:
    """z / part, kept finite as zennit does."""
    fixed = part.detach()
    return z / (fixed + torch.where(fixed < 0, -1e-6, 1e-6))


def _is_batch_norm_of_constants(node: fx.Node, packet: Any) -> bool:
    """Whether a batch or instance norm takes its statistics from training, and so is linear."""
    return packet in (aten.batch_norm, aten.instance_norm) and node.args[5] is False


_CONVOLUTIONS = {
    *(aten.conv1d, aten.conv2d, aten.conv3d, aten.convolution),
    *(aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d),
}
_GAMMA_LAYERS = {aten.linear, *_CONVOLUTIONS}
_PRODUCTS: dict[Any, tuple[int, int]] = {
    **dict.fromkeys((*_GAMMA_LAYERS, aten.mul, aten.matmul, aten.mm, aten.bmm, aten.mv, aten.dot), (0, 1)),
    **dict.fromkeys((aten.addmm, aten.baddbmm, aten.addbmm), (1, 2)),
}
"""Operations linear in each of two operands, and where these stand."""

_GATES: dict[Any, float] = {aten.sigmoid: 0.5, aten.hardsigmoid: 0.5, aten.exp: 1.0, aten.softplus: math.log(2)}
_SPREADS = {
    *(aten.view, aten.reshape, aten.unsqueeze, aten.squeeze, aten.expand, aten.permute, aten.transpose, aten.clone),
    *(aten.alias, aten._to_copy, aten.upsample_nearest2d, aten.upsample_bilinear2d, aten.dropout),
}
"""What leaves a constant as it is."""

_NORMS = {
    aten.layer_norm: _layer_norm,
    aten.rms_norm: _rms_norm,
    aten.group_norm: _group_norm,
    aten.instance_norm: _instance_norm,
}

_SCALES = {aten.rsqrt, aten.reciprocal, aten.linalg_vector_norm, aten.norm, aten.std, aten.var}
"""What data are divided by; held constant."""

_CONSTANTS = {
    *(aten.detach, aten.zeros_like, aten.ones_like, aten.full_like, aten.new_zeros, aten.new_ones, aten.new_full),
}
"""What depends on the image in its shape alone, or is meant to be held constant."""

_TAYLOR = {aten.softmax, aten._softmax, aten._safe_softmax, aten.log_softmax, aten._log_softmax}

_POINTWISE = {
    *(aten.relu, aten.relu6, aten.leaky_relu, aten.prelu, aten._prelu_kernel, aten.elu, aten.selu, aten.celu),
    *(aten.gelu, aten.silu, aten.mish, aten.softplus, aten.sigmoid, aten.hardsigmoid, aten.hardswish, aten.hardtanh),
    *(aten.tanh, aten.log_sigmoid, aten.clamp, aten.clamp_min, aten.clamp_max, aten.exp, aten.expm1, aten.log1p),
    *(aten.pow, aten.sqrt, aten.square, aten.sin, aten.erf, aten.atan, aten.threshold),
}
"""Functions of one element that are finite at 0."""

_LINEAR = {
    # Sums and means.
    *(aten.add, aten.sub, aten.rsub, aten.neg, aten.sum, aten.mean, aten.cumsum, aten.cat, aten.stack, aten.hstack),
    *(aten.avg_pool1d, aten.avg_pool2d, aten.avg_pool3d, aten.adaptive_avg_pool1d, aten.adaptive_avg_pool2d),
    *(aten.upsample_nearest2d, aten.upsample_bilinear2d, aten.upsample_bicubic2d, aten._upsample_bilinear2d_aa),
    *(aten._upsample_nearest_exact2d, aten._upsample_bicubic2d_aa, aten._native_batch_norm_legit_no_training),
    # The largest, the smallest: linear up to the choice.
    *(aten.amax, aten.amin, aten.max, aten.min, aten.maximum, aten.minimum, aten.abs, aten.topk, aten.sort),
    *(aten.max_pool1d, aten.max_pool2d, aten.max_pool2d_with_indices, aten.max_pool3d, aten.adaptive_max_pool2d),
    *(aten.where, aten.masked_fill, aten.masked_select),
    # The same values, some of them, or some more.
    *(aten.view, aten._unsafe_view, aten.reshape, aten.flatten, aten.unflatten, aten.squeeze, aten.unsqueeze),
    *(aten.permute, aten.transpose, aten.t, aten.mT, aten.movedim, aten.swapaxes, aten.contiguous, aten.clone),
    *(aten.expand, aten.expand_as, aten.repeat, aten.repeat_interleave, aten.slice, aten.select, aten.narrow),
    *(aten.index, aten.index_select, aten.gather, aten.take_along_dim, aten.split, aten.split_with_sizes),
    *(aten.chunk, aten.unbind, aten.roll, aten.flip, aten.pixel_shuffle, aten.pixel_unshuffle, aten.channel_shuffle),
    *(aten.unfold, aten.im2col, aten.col2im, aten.pad, aten.constant_pad_nd, aten.reflection_pad2d),
    *(aten.replication_pad2d, aten.alias, aten._to_copy, aten.to, aten.type_as, aten.dropout, aten.diagonal),
    *(aten.index_put, aten.scatter, aten.scatter_add, aten.index_add, aten.slice_scatter, aten.select_scatter),
    operator.getitem,
}
"""Linear, piecewise linear and homogeneous, or copies: the gradient is the rule."""
