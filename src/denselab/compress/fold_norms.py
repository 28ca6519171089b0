"""Batch norms of a trained network become part of the layer before them.

In evaluation mode a batch norm is y = (x - mean) / sqrt(variance + eps) * weight + bias per channel, which a linear
layer or convolution before it can do itself: with k = weight / sqrt(variance + eps), its weight becomes k W and its
bias k (b - mean) + bias (Jacob et al.: Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-
Only Inference, CVPR 2018, arXiv:1712.05877, section 3.2). Exact whatever the padding. Sites read what then really runs.
"""

import operator
from typing import Any

import torch
from torch import fx

from denselab.compress.edit import GraphEdit, argument, bias_name, is_shared, is_stored, packet
from denselab.compress.graph import Graph

aten = torch.ops.aten

_LAYERS = {aten.linear, aten.conv1d, aten.conv2d, aten.conv3d}
_TRANSPOSED = {aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d}
_RESHAPES = {aten.view, aten._unsafe_view, aten.reshape, aten.flatten}


def fold_norms(graph: Graph) -> Graph:
    """The same network without the batch norms that alone follow a linear layer or convolution; the model is untouched.

    Left as they are: norms of anything else, of layers that others read too or whose weight is shared or computed, and
    of transposed convolutions in groups. To be done right after the capture: saved files belong to the folded network.
    Raises InputError where folding changes the answer (see `GraphEdit.finish`).
    """
    edit = GraphEdit(graph)
    for norm in edit.graph.find_nodes(op="call_function", target=aten._native_batch_norm_legit_no_training.default):
        layer = _layer_before(norm)
        if layer is not None:
            _fold(edit, norm, layer)
    return edit.finish(same_model=False)


def _layer_before(norm: fx.Node) -> fx.Node | None:
    """The layer whose output alone a norm reads, if it can take the norm over."""
    if not all(each is None or is_stored(each) for each in norm.args[1:5]):
        return None
    if any(user.target is not operator.getitem or user.args[1] != 0 for user in norm.users):
        return None
    read: Any = norm.args[0]
    channels, layer = _shape(read)[1], read
    while packet(layer) in _RESHAPES and _keeps_features(layer, channels):
        layer = layer.args[0]  # rows of features, as BatchNorm1d wants them
    if packet(layer) not in _LAYERS | _TRANSPOSED or len(layer.users) != 1:
        return None
    if packet(layer) is aten.linear and _shape(read)[1:] != [channels]:
        return None
    if packet(layer) is not aten.linear and layer is not read:
        return None
    if packet(layer) in _TRANSPOSED and argument(layer, 6, 1) != 1:
        return None
    weight, bias = layer.args[1], argument(layer, 2)
    own = is_stored(weight) and not is_shared(weight) and (bias is None or is_stored(bias))
    return layer if own else None


def _fold(edit: GraphEdit, norm: fx.Node, layer: fx.Node) -> None:
    weight_node, bias = argument(layer, 1), argument(layer, 2)
    weight = edit.stored(weight_node).double()
    gain, shift, mean, variance = (
        torch.tensor(default).double()
        if argument(norm, number) is None
        else edit.stored(argument(norm, number)).double()
        for number, default in ((1, 1.0), (2, 0.0), (3, 0.0), (4, 1.0))
    )
    factor = gain / (variance + argument(norm, 6)).sqrt()
    new_bias = factor * ((0 if bias is None else edit.stored(bias).double()) - mean) + shift
    axis = 1 if packet(layer) in _TRANSPOSED else 0
    new_weight = weight * factor.view([-1 if dim == axis else 1 for dim in range(weight.ndim)])
    dtype = edit.stored(weight_node).dtype
    edit.set_parameter(layer, 1, new_weight.to(dtype), str(weight_node.target))
    edit.set_parameter(layer, 2, new_bias.to(dtype), bias_name(weight_node))
    read: Any = norm.args[0]
    for user in list(norm.users):
        user.replace_all_uses_with(read)


def _keeps_features(reshape: fx.Node, channels: int) -> bool:
    """Whether a reshape of which nothing else is read leaves the last dimension, of features, alone."""
    return len(reshape.users) == 1 and _shape(reshape)[-1] == _shape(argument(reshape, 0))[-1] == channels


def _shape(node: fx.Node) -> list[Any]:
    return list(node.meta["val"].shape)
