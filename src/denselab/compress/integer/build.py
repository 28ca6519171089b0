"""From a captured network and calibrated scales to an integer program, operation by operation.

I-ViT (Li & Gu, ICCV 2023, arXiv:2207.01405; zkkli/I-ViT@380ba99 models/vit_quant.py) writes its networks by hand; here
they are read from the operations of the graph. A value is 8 bits where a product reads it, and otherwise 16: between a
layer and what only moves or joins its numbers, in residual sums, and before a norm, a softmax and a GELU. Where all
that read it want the same 8 bits, moves and sums in between are done on those.

Weights are symmetric per output channel, by their greatest magnitude. Constants in front of a value (the scale of an
attention, a LayerScale) become part of its scale. Biases are int32 at the scale of the sums.

Deviations: query, key and value have a scale each (the code quantizes their joint layer once), and the input of GELU
and the logits of softmax are not cut to 8 bits, which costs accuracy where nothing is trained afterwards. A LayerNorm's
epsilon is ignored, as in the code.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from denselab.compress.edit import packet
from denselab.compress.graph import Graph
from denselab.compress.integer.build_functions import (
    lower_adaptive_mean,
    lower_add,
    lower_gelu,
    lower_layer_norm,
    lower_mean,
    lower_relu,
    lower_scaled,
    lower_softmax,
)
from denselab.compress.integer.build_moves import (
    lower_cat,
    lower_expand,
    lower_max_pool,
    lower_mean_pool,
    lower_pad,
    lower_permute,
    lower_reshape,
    lower_result,
    lower_roll,
    lower_same,
    lower_select,
    lower_slice,
)
from denselab.compress.integer.build_products import lower_conv, lower_linear, lower_matmul
from denselab.compress.integer.builder import (
    FACTORS,
    PADS,
    PARTS,
    PERMUTATIONS,
    RESHAPES,
    SAME,
    SUM_BITS,
    Builder,
    Calibrated,
    Value,
)
from denselab.compress.integer.program import IMAGES, Code, IntegerProgram, Step
from denselab.errors import InputError

aten = torch.ops.aten


_Lower = Callable[[Builder, fx.Node], Value]
_LOWERED: dict[Any, _Lower] = {
    aten.linear: lower_linear,
    **dict.fromkeys((aten.conv1d, aten.conv2d, aten.conv3d), lower_conv),
    **dict.fromkeys((aten.matmul, aten.mm, aten.bmm), lower_matmul),
    **dict.fromkeys((aten.softmax, aten._softmax, aten._safe_softmax), lower_softmax),
    aten.gelu: lower_gelu,
    aten.layer_norm: lower_layer_norm,
    aten.relu: lower_relu,
    **dict.fromkeys((aten.add, aten.sub), lower_add),
    **dict.fromkeys(FACTORS, lower_scaled),
    aten.mean: lower_mean,
    aten.adaptive_avg_pool2d: lower_adaptive_mean,
    aten.avg_pool2d: lower_mean_pool,
    **dict.fromkeys(SAME, lower_same),
    **dict.fromkeys(RESHAPES, lower_reshape),
    **dict.fromkeys(PERMUTATIONS, lower_permute),
    aten.slice: lower_slice,
    aten.select: lower_select,
    aten.roll: lower_roll,
    aten.expand: lower_expand,
    aten.cat: lower_cat,
    **dict.fromkeys(PADS, lower_pad),
    aten.max_pool2d: lower_max_pool,
}


def build_program(graph: Graph, calibrated: Calibrated) -> IntegerProgram:
    """The program of a network at the size it was captured at.

    Raises InputError for a network with several inputs or outputs, and for an operation that has no integer form,
    naming it and its module.
    """
    if len(graph.example_shapes) != 1:
        raise InputError(f"model: wanted one input, an image, got {len(graph.example_shapes)}; I-ViT takes no other")
    builder = Builder(graph, calibrated)
    outputs = graph.module.graph.output_node().all_input_nodes
    if len(outputs) != 1 or outputs[0] not in builder.seen.moving:
        raise InputError(f"model: wanted one output, the logits of a classifier, got {len(outputs)}; return one")
    image_code = _lower_all(builder)
    logits = builder.values[outputs[0]]
    logit_scale = float(np.abs(logits.scale).max())
    logits = builder.to(logits, Code(logit_scale, SUM_BITS))
    images, *image_shape = graph.example_shapes[0]
    return IntegerProgram(
        image_shape=tuple(image_shape),
        images=None if builder.free else images,
        image_code=image_code,
        steps=_needed(builder.steps, logits.name),
        logit_shape=builder.target(outputs[0], of=builder.count),
        logit_scale=logit_scale,
    )


def _lower_all(builder: Builder) -> Code:
    """Steps for all that is computed from the image, whose code is returned."""
    nodes = builder.graph.module.graph.nodes
    (image,) = (node for node in nodes if node.op == "placeholder")
    code = builder.code_of(image)
    builder.values[image] = Value(IMAGES, np.array(code.scale), code.bits)
    for node in nodes:
        if node in builder.seen.moving and node.op == "call_function" and packet(node) not in PARTS:
            lower = lower_result if node.target is operator.getitem else _LOWERED.get(packet(node))
            if lower is None:
                raise builder.refused(node, "it has no integer form")
            builder.values[node] = lower(builder, node)
    return code


def _needed(steps: Sequence[Step], output: str) -> tuple[Step, ...]:
    """The steps that lead to an output, which is the last."""
    needed, kept = {output}, list[Step]()
    for step in reversed(steps):
        if step.output in needed:
            needed.update(step.inputs)
            kept.append(step)
    return tuple(reversed(kept))
