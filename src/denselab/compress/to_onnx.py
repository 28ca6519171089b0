"""A quantized network as ONNX with real integers: stored codes, and integer kernels wherever an engine has them.

Uniform quantizers per tensor become codes of activations, those per tensor and per channel codes of weights; products
of the two run in integers (`export.integers`). For other grids, and for activations with a scale per channel or head,
no engine has kernels: there the same numbers are computed in float, and weights are looked up among their numbers.
"""

import hashlib
import itertools
import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from onnx import ModelProto
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from denselab.compress.edit import GraphEdit, argument, float_dtype, packet
from denselab.compress.graph import Graph
from denselab.compress.quantizers import Quantizer, Ternary, Uniform, code_bits, parameter_shape, quantized
from denselab.compress.simulate import QuantizedGraph
from denselab.compress.sites import Op, Place, QuantSite
from denselab.compress.traces import Traces
from denselab.errors import InputError
from denselab.export.graph import ArtifactGraph, to_onnx, trace
from denselab.export.integers import (
    HIGHEST_CODE,
    OPSET,
    ActivationGrid,
    Mark,
    Site,
    StoredWeight,
    TableWeight,
    has_remainder,
    lowered,
)
from denselab.model import DensePredictor, JointPredictor, Model
from denselab.runtime.artifact import Compression
from denselab.tasks.task import Task
from denselab.types import HeadSpec

aten = torch.ops.aten

_CONVOLUTIONS = {aten.conv1d, aten.conv2d, aten.conv3d}
_BATCH_NORM = aten._native_batch_norm_legit_no_training
_FUSED = {aten.relu, aten.relu6, aten.hardtanh, aten.gelu, aten.silu, aten.hardswish}
_MATRIX = 2


def quantized_to_onnx(
    quantized: QuantizedGraph,
    outputs: Sequence[str] | None = None,
    traces: Traces | None = None,
) -> ModelProto:
    """A captured model (a classifier) as ONNX: input `pixels` float32 [B, 3, H, W], outputs as the model's.

    Sizes are free as the capture left them (`Graph.free`). outputs: their names; default `output`, or `output_0`,
    `output_1`, ... traces: where networks like this one were traced before.
    Raises InputError for a network that is not float32, and for one that torch cannot trace.
    """
    network, sites = _marked(quantized)
    example = tuple(torch.zeros(shape) for shape in quantized.graph.example_shapes)
    output: Any = quantized.graph.module.graph.output_node().args
    count = len(pytree.tree_leaves(output))
    names = list(outputs or (["output"] if count == 1 else [f"output_{number}" for number in range(count)]))
    inputs = ["pixels", *(f"input_{number}" for number in range(1, len(example)))]
    free = tuple(
        {axis.value: torch.export.Dim.DYNAMIC for axis in quantized.graph.free if axis.value < each.ndim}
        for each in example
    )
    traced = _traced(traces, network, network, lambda: trace(network, example, free, inputs, names, OPSET))
    return lowered(traced, sites)


def compressed_artifact_model(
    model: Model,
    tasks: tuple[Task, ...],
    quantized: QuantizedGraph,
    network_hw: tuple[int, int] | None = None,
    traces: Traces | None = None,
) -> ModelProto:
    """A dense model whose network is the quantized graph, as the ONNX of an artifact: uint8 photo to answers.

    Give it to `export_artifact(with_network(model, quantized.as_module()), ..., ready=...)`, which compares it with the
    simulation. network_hw: see ArtifactGraph; needed where the capture left height and width not free. traces: see
    `quantized_to_onnx`.
    Raises InputError as `quantized_to_onnx` and `export.graph.to_onnx`.
    """
    network, sites = _marked(quantized)
    whole = ArtifactGraph(with_network(model, network), tasks, network_hw)
    return lowered(_traced(traces, whole, network, lambda: to_onnx(whole, OPSET)), sites)


def with_network(model: Model, network: nn.Module) -> Model:
    """A model of the same specs whose forward is another module's, such as `QuantizedGraph.as_module()`."""
    return _OtherJoint(model, network) if isinstance(model, JointPredictor) else _OtherDense(model, network)


def compression_of(quantized: QuantizedGraph, plan_json: bytes) -> Compression:
    """What the artifact's metadata says about a plan. plan_json: contents of the saved plan, which is hashed."""
    sites = quantized.graph.found.by_key

    def mean_bits(weights: bool) -> float | None:
        planned = [(sites[key], spec.bits) for key, spec in quantized.plan.specs.items()]
        counted = {site.tensor: (site.elements, bits) for site, bits in planned if site.is_weight is weights}
        total = sum(elements for elements, _ in counted.values())
        return sum(elements * bits for elements, bits in counted.values()) / total if total else None

    return Compression(
        quantized.plan.method,
        hashlib.sha256(plan_json).hexdigest(),
        mean_bits(True),
        mean_bits(False),
        len(simulated_sites(quantized)),
    )


def simulated_sites(quantized: QuantizedGraph) -> tuple[str, ...]:
    """Keys of the activations that no engine has kernels for as they are quantized: they are computed in float."""
    sites, float_only = quantized.graph.found.by_key, _behind_normed_products(quantized.graph)
    return tuple(
        key
        for key, each in quantized.quantizers.items()
        if not sites[key].is_weight and (key in float_only or activation_grid(each) is None)
    )


def activation_grid(quantizer: Quantizer) -> ActivationGrid | None:
    """The grid of an activation on uint8, if it has one."""
    if not isinstance(quantizer, Uniform) or parameter_shape(quantizer).numel() != 1:
        return None
    zero = -quantizer.lowest if quantizer.zero_point is None else int(quantizer.zero_point)
    if not 0 <= zero <= HIGHEST_CODE:
        return None
    return ActivationGrid(float(quantizer.scale), zero, quantizer.levels - 1)


def _marked(quantized: QuantizedGraph) -> tuple[fx.GraphModule, dict[str, Site]]:
    """The network with marks at sites that are stored or run as codes, and simulated quantizers at the others."""
    graph = quantized.graph
    if float_dtype(graph) is not torch.float32:
        raise InputError(f"model: wanted a network captured in float32 to export, got {float_dtype(graph)}")
    sites = stored_sites(quantized)
    edit = GraphEdit(graph)
    marking = _Marking(edit)
    for node in edit.graph.find_nodes(op="call_function", target=aten.fake_quantize_per_tensor_affine.default):
        scale, zero, lowest, highest = cast("tuple[float, int, int, int]", node.args[1:])
        if (lowest, highest) == (0, HIGHEST_CODE):  # others, of a network that came with some, torch exports
            key = f"output of {node.name}"
            sites[key] = ActivationGrid(scale, zero, highest)
            marking.put_for(node, Mark(key))
    for key, quantizer in quantized.quantizers.items():
        layer = Mark(key) if key in sites else _Simulated(quantizer)
        marking.put(graph.found.places[key], layer)
    network = fx.GraphModule(edit.module, edit.graph)
    network.eval()
    return network, sites


def _traced(
    traces: Traces | None, whole: nn.Module, network: fx.GraphModule, trace: Callable[[], ModelProto]
) -> ModelProto:
    """The trace of a network with marks, and all around it. A quantizer that is simulated brings numbers of its own."""
    if traces is None:
        return trace()
    added = dict(network.named_children())
    marks = [f"{name} {layer.key}" for name, layer in added.items() if isinstance(layer, Mark)]
    simulated = any(isinstance(layer, _Simulated) for layer in added.values())
    return traces.of(whole, None if simulated else "\n".join([network.code, *marks]), trace)


class _Marking:
    """Modules that are put into a graph."""

    def __init__(self, edit: GraphEdit) -> None:
        self.edit = edit
        self.numbers = itertools.count()

    def put(self, places: Sequence[Place], layer: nn.Module) -> None:
        """Let the tensors that a site reads pass through a module, each once."""
        name = self._add(layer)
        passed: dict[fx.Node, fx.Node] = {}
        for place in places:
            node = self.edit.nodes[place.node]
            tensor = cast("fx.Node", node.args[place.argument])
            if tensor not in passed:
                with self.edit.graph.inserting_before(node):
                    passed[tensor] = self.edit.graph.call_module(name, (tensor,))
            node.update_arg(place.argument, passed[tensor])

    def put_for(self, node: fx.Node, layer: nn.Module) -> None:
        """Let all that reads an operation of one tensor read a module in its place."""
        with self.edit.graph.inserting_before(node):
            passed = self.edit.graph.call_module(self._add(layer), node.args[:1])
        node.replace_all_uses_with(passed)
        self.edit.graph.erase_node(node)

    def _add(self, layer: nn.Module) -> str:
        name = f"quantized_{next(self.numbers)}"
        self.edit.module.add_module(name, layer)
        return name


class _Simulated(nn.Module):
    """A quantizer for which there are no kernels."""

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        self.quantizer = quantizer

    def forward(self, x: Tensor) -> Tensor:
        """Numbers as the quantizer keeps them."""
        return quantized(self.quantizer, x).to(x.dtype)


def stored_sites(quantized: QuantizedGraph) -> dict[str, Site]:
    """What is stored or computed as codes, by key."""
    by_key, places = quantized.graph.found.by_key, quantized.graph.found.places
    found: dict[str, Site] = {}
    float_only = _behind_normed_products(quantized.graph)
    for key, quantizer in quantized.quantizers.items():
        fits = not by_key[key].is_weight and key not in float_only
        if fits and (grid := activation_grid(quantizer)) is not None:
            found[key] = grid
    for key, codes in quantized.weight_codes().items():
        grouped = any(packet(place.node) in _CONVOLUTIONS and argument(place.node, 6, 1) != 1 for place in places[key])
        integer = _in_integers(quantized.graph, key, found)
        found[key] = _stored(by_key[key], quantized.quantizers[key], codes, integer, grouped)
    return found


def _behind_normed_products(graph: Graph) -> frozenset[str]:
    """Activations that are read behind a batch norm of a product of two activations.

    OpenVINO (2026.4) fuses norm and codes into such a product, along its columns, and then cannot compile it.
    """
    sites, places = graph.found.by_key, graph.found.places
    products = {
        place.node
        for product in graph.found.products
        if not sites[product.left].is_weight and not sites[product.right].is_weight
        for place in places[product.left]
    }

    def normed(place: Place) -> bool:
        node = place.node.args[place.argument]
        while isinstance(node, fx.Node) and (node.target is operator.getitem or packet(node) in _FUSED):
            node = node.args[0]
        return isinstance(node, fx.Node) and packet(node) is _BATCH_NORM and node.args[0] in products

    return frozenset(key for key, read in places.items() if not sites[key].is_weight and any(map(normed, read)))


def _in_integers(graph: Graph, weight: str, found: dict[str, Site]) -> bool:
    """Whether all that read a weight multiply it with codes, in an operation that has kernels.

    ONNX Runtime (1.31) fails at stacks of matrices with a scale per column.
    """
    readers = [each for each in graph.found.products if weight in (each.left, each.right)]
    site = graph.found.by_key[weight]
    has_kernel = site.op is Op.CONV or (site.op is not Op.CONV_TRANSPOSE and len(site.shape) == _MATRIX)
    return has_kernel and all(
        each.right == weight and isinstance(found.get(each.left), ActivationGrid) for each in readers
    )


def _stored(site: QuantSite, quantizer: Quantizer, codes: Tensor, integer: bool, grouped: bool) -> Site:
    """The codes of a weight and what they stand for. grouped: read by convolutions in groups."""
    shape = parameter_shape(quantizer)
    shape = torch.Size([*[1] * (codes.ndim - len(shape)), *shape])
    axis = next((axis for axis, size in enumerate(shape) if size > 1), 0)
    assert shape.numel() == shape[axis]
    if isinstance(quantizer, Uniform | Ternary):
        zero = quantizer.zero_point if isinstance(quantizer, Uniform) else None
        lowest = -(2 ** (quantizer.bits - 1)) if zero is None else 0
        zeros = torch.full((shape.numel(),), -lowest) if zero is None else zero.expand(shape).flatten()
        stored = StoredWeight(
            (codes - lowest).numpy(),
            quantizer.bits,
            quantizer.scale.detach().float().expand(shape).flatten().numpy(),
            zeros.to(torch.int32).numpy(),
            axis,
            integer and (shape.numel() == 1 or axis == site.channel_axis),
        )
        return replace(stored, integer=False) if stored.integer and has_remainder(stored) and grouped else stored
    each = torch.arange(quantizer.levels, dtype=torch.int32).view(-1, *[1] * codes.ndim)
    table = quantizer.values(each).detach().float().expand(-1, *shape).flatten(1).t()
    return TableWeight(codes.numpy(), code_bits(quantizer), table.contiguous().numpy(), axis)


class _OtherDense(DensePredictor):
    """The specs of a model, the forward of another module."""

    def __init__(self, model: DensePredictor, network: nn.Module) -> None:
        nn.Module.__init__(self)
        self.size_multiple = model.size_multiple
        self.network = network
        self._spec = model.spec

    @property
    def spec(self) -> HeadSpec:
        """What the head returns."""
        return self._spec

    def forward(self, pixels: Tensor) -> Any:
        return self.network(pixels)


class _OtherJoint(JointPredictor):
    """The specs of a model, the forward of another module."""

    def __init__(self, model: JointPredictor, network: nn.Module) -> None:
        nn.Module.__init__(self)
        self.size_multiple = model.size_multiple
        self.network = network
        self._specs = model.specs

    @property
    def specs(self) -> dict[str, HeadSpec]:
        """What the head of each task returns."""
        return self._specs

    def forward(self, pixels: Tensor) -> Any:
        return self.network(pixels)
