"""Which LayerNorms can be moved and scaled per channel, because every layer that reads them can take it back.

The scale reparameterization of RepQ-ViT (see `quantizers.reparameterize`) on a captured graph. Which channel of a norm
a layer reads at which input is measured, not guessed: numbered channels are sent through the reshapes, permutations
and slices between them, so that windows, merged patches and maps of [B, C, H, W] need no rules of their own. What
reads a norm in another way (a residual, a feature tap, padding with zeros, a padded convolution, a weight that several
layers share) gets the old numbers, computed back.
"""

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, fx

from denselab.compress.edit import GraphEdit, argument, bias_name, float_dtype, is_shared, is_stored, packet
from denselab.compress.graph import Graph
from denselab.compress.quantizers import ChannelFold, folded_norm, folded_reader
from denselab.compress.sites import Place, QuantSite

aten = torch.ops.aten

_NORM = aten.layer_norm.default
_WEIGHT, _BIAS = 1, 2
_CONVOLUTIONS = {aten.conv1d, aten.conv2d, aten.conv3d}
# The same numbers in another order, or some of them; the tensor is the first argument.
_MOVES = {
    *(aten.view, aten._unsafe_view, aten.reshape, aten.flatten, aten.unflatten, aten.squeeze, aten.unsqueeze),
    *(aten.permute, aten.transpose, aten.t, aten.movedim, aten.contiguous, aten.clone, aten.alias, aten.detach),
    *(aten.expand, aten.slice, aten.select, aten.narrow, aten.index, aten.index_select, aten.dropout),
    *(aten.split, aten.split_with_sizes, aten.chunk, aten.unbind, aten.roll, aten.flip, aten.unfold),
}


@dataclass(frozen=True, eq=False)
class NormReader:
    """A layer that reads a norm. site: its input. channels: which channel of the norm each of its inputs is."""

    site: QuantSite
    node: fx.Node
    channels: Int[Tensor, "inputs"]

    def per_input(self, fold: ChannelFold) -> ChannelFold:
        """A fold of the norm's channels as one of this layer's inputs."""
        return ChannelFold(fold.ratio[self.channels], fold.offset[self.channels], fold.scale, fold.zero_point)

    def rows_of_norm(self, rows: Float[Tensor, "rows inputs"]) -> Float[Tensor, "more_rows C"]:
        """Values per input as values per channel of the norm: every channel is read equally often."""
        times = int((self.channels == 0).sum())
        order = self.channels.argsort(stable=True).view(-1, times)
        return rows[:, order].transpose(1, 2).flatten(0, 1)


@dataclass(frozen=True, eq=False)
class FoldableNorm:
    """A LayerNorm over channels, the layers that can take back a change of it, and who needs the old numbers."""

    node: fx.Node
    readers: tuple[NormReader, ...]
    others: tuple[fx.Node, ...]


def foldable_norms(graph: Graph) -> tuple[FoldableNorm, ...]:
    """The LayerNorms that at least one linear layer or convolution reads and can take back, in order of execution."""
    run = _ChannelsRun(graph)
    with torch.no_grad():
        run.run(*(torch.zeros(shape, dtype=float_dtype(graph)) for shape in graph.example_shapes))
    readers = {reader.node: (norm, reader) for norm, reader in _readers(graph, run)}
    found: list[FoldableNorm] = []
    for norm in graph.module.graph.find_nodes(op="call_function", target=_NORM):
        taken_back: list[NormReader] = []
        others: list[fx.Node] = []
        for user in norm.users:
            behind = list(_behind(norm, user, run.norm_of))
            if all(each in readers and readers[each][0] is norm for each in behind):
                taken_back += (readers[each][1] for each in behind)
            else:
                others.append(user)
        if taken_back:
            found.append(FoldableNorm(norm, tuple(taken_back), tuple(others)))
    return tuple(found)


def fold_layer_norms(graph: Graph, folds: Sequence[tuple[FoldableNorm, ChannelFold]]) -> Graph:
    """The same network with each fold applied to its norm and taken back by the readers; sites and hash stay.

    folds: of norms of this graph, per channel of the norm. Raises InputError where the answer changes.
    """
    edit = GraphEdit(graph)
    for norm, fold in folds:
        exact = ChannelFold(**{each.name: getattr(fold, each.name).double() for each in fields(fold)})
        node = edit.nodes[norm.node]
        _change_norm(edit, node, exact)
        for reader in norm.readers:
            _change_reader(edit, edit.nodes[reader.node], reader.per_input(exact))
        _give_back(edit, node, [edit.nodes[user] for user in norm.others], exact)
    return edit.finish(same_model=True)


def _change_norm(edit: GraphEdit, node: fx.Node, fold: ChannelFold) -> None:
    weight, bias = (None if each is None else edit.stored(each).double() for each in _affine_part(node))
    new_weight, new_bias = folded_norm(fold, weight, bias)
    dtype = float_dtype(edit.source)
    edit.set_parameter(node, 2, new_weight.to(dtype), f"{node.name}_weight")
    edit.set_parameter(node, 3, new_bias.to(dtype), f"{node.name}_bias")


def _change_reader(edit: GraphEdit, node: fx.Node, fold: ChannelFold) -> None:
    weight, bias = argument(node, _WEIGHT), argument(node, _BIAS)
    old_bias = None if bias is None else edit.stored(bias).double()
    new_weight, new_bias = folded_reader(fold, edit.stored(weight).double(), old_bias)
    dtype = float_dtype(edit.source)
    edit.set_parameter(node, _WEIGHT, new_weight.to(dtype), str(weight.target))
    edit.set_parameter(node, _BIAS, new_bias.to(dtype), bias_name(weight))


def _give_back(edit: GraphEdit, norm: fx.Node, users: Sequence[fx.Node], fold: ChannelFold) -> None:
    """(x' + offset) ratio for those that want x."""
    if not users:
        return
    dtype = float_dtype(edit.source)
    offset = edit.parameter(norm, fold.offset.to(dtype), f"{norm.name}_offset")
    ratio = edit.parameter(norm, fold.ratio.to(dtype), f"{norm.name}_ratio")
    with edit.graph.inserting_after(norm):
        moved = edit.graph.call_function(aten.add.Tensor, (norm, offset))
    with edit.graph.inserting_after(moved):
        undone = edit.graph.call_function(aten.mul.Tensor, (moved, ratio))
    for user in users:
        user.replace_input_with(norm, undone)


class _ChannelsRun(fx.Interpreter):
    """One run that follows the channels of every LayerNorm as far as they are only moved.

    norm_of: whose channels a node holds. channels: their numbers, in the place of its values.
    """

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph.module)
        self.norm_of: dict[fx.Node, fx.Node] = {}
        self.channels: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.target is _NORM and _can_change(n):
            self.norm_of[n] = n
            self.channels[n] = torch.arange(value.shape[-1]).expand(value.shape)
        elif n.op == "call_function" and n.args and n.args[0] in self.norm_of and _only_moves(n):
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            before = n.args[0]
            assert isinstance(before, fx.Node)
            self.norm_of[n] = self.norm_of[before]
            target: Any = n.target
            self.channels[n] = target(self.channels[before], *args[1:], **kwargs)
        return value


def _can_change(norm: fx.Node) -> bool:
    """Whether a LayerNorm has one weight per channel, or none."""
    return len(argument(norm, 1)) == 1 and all(each is None or is_stored(each) for each in _affine_part(norm))


def _affine_part(norm: fx.Node) -> tuple[Any, Any]:
    return argument(norm, 2), argument(norm, 3)


def _only_moves(node: fx.Node) -> bool:
    if packet(node) in (aten.pad, aten.constant_pad_nd):
        return not any(each is not None and each != 0 for each in argument(node, 1))  # windows that fit
    return packet(node) in _MOVES or node.target is operator.getitem


def _behind(before: fx.Node, node: fx.Node, norm_of: dict[fx.Node, fx.Node]) -> Iterator[fx.Node]:
    """Those that a node's channels reach unchanged, and that do something else with them."""
    if node not in norm_of or norm_of[node] is not norm_of[before] or node.target is _NORM:
        yield node
        return
    for user in node.users:
        yield from _behind(node, user, norm_of)


def _readers(graph: Graph, run: _ChannelsRun) -> Iterator[tuple[fx.Node, NormReader]]:
    """Layers with a norm before them whose weights and biases are their own to change."""
    for site in graph.sites:
        if site.is_weight:
            continue
        for place in graph.found.places[site.key]:
            tensor = place.node.args[place.argument]
            if not isinstance(tensor, fx.Node) or tensor not in run.norm_of or not _can_take_back(place):
                continue
            channels = _per_input(run.channels[tensor], site.channel_axis)
            if channels is not None:
                yield run.norm_of[tensor], NormReader(site, place.node, channels)


def _can_take_back(place: Place) -> bool:
    node = place.node
    if place.argument != 0 or packet(node) not in _CONVOLUTIONS | {aten.linear}:
        return False
    if packet(node) in _CONVOLUTIONS:
        padding, groups = argument(node, 4, [0]), argument(node, 6, 1)
        if groups != 1 or isinstance(padding, str) or any(padding):
            return False
    weight, bias = argument(node, _WEIGHT), argument(node, _BIAS)
    return is_stored(weight) and not is_shared(weight) and (bias is None or is_stored(bias))


def _per_input(channels: Tensor, axis: int | None) -> Int[Tensor, "inputs"] | None:
    """The channel of every input of a layer; None if it varies, or if not all are read equally often."""
    if axis is None:
        return None
    rows = channels.movedim(axis, -1).flatten(0, -2)
    if not (rows == rows[0]).all():
        return None
    counts = rows[0].bincount()
    return rows[0].clone() if (counts == counts[0]).all() else None
