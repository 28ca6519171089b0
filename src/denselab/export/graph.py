"""The whole way from a uint8 photo to the answers of all tasks: as one torch module, and as an ONNX graph."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from onnx import ModelProto
from torch import Tensor, nn

from denselab.errors import InputError
from denselab.model import Model, head_outputs
from denselab.runtime.answers import outputs_of
from denselab.tasks.task import Task

OPSET = 20


class ArtifactGraph(nn.Module):
    """image: uint8 [1, H, W, 3] RGB of any size -> the answers of the tasks at that size, in the order of `outputs`.

    network_hw: fixed size in px at which the network runs, for models that cannot be traced at a dynamic size;
    the photo is resized to it, and what the masks say is resized back. None: it runs at H, W.
    """

    def __init__(self, model: Model, tasks: tuple[Task, ...], network_hw: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.model = model
        self.tasks = tasks
        self.network_hw = network_hw

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of what `forward` returns."""
        return tuple(name for task in self.tasks for name in outputs_of(task.name))

    def forward(self, image: UInt8[Tensor, "1 H W 3"]) -> tuple[Tensor, ...]:
        source_hw = (image.shape[1], image.shape[2])
        pixels = image.permute(0, 3, 1, 2).float() / 255
        if self.network_hw is not None:
            pixels = F.interpolate(pixels, size=self.network_hw, mode="bilinear", align_corners=False)
        heads = head_outputs(self.model, tuple(task.name for task in self.tasks), pixels)
        return tuple(
            answer for task in self.tasks for answer in task.decode(*heads[task.name], source_hw, self.network_hw)
        )


def to_onnx(graph: ArtifactGraph, opset: int = OPSET) -> ModelProto:
    """Input `image`, height and width dynamic, and the graph's outputs; batch norm is folded into convolutions.

    Raises InputError for a model that torch cannot trace so.
    """
    step = graph.model.size_multiple
    example = torch.zeros(1, 2 * step + 1, 3 * step + 1, 3, dtype=torch.uint8)
    size = {1: torch.export.Dim("height", min=1), 2: torch.export.Dim("width", min=1)}
    try:
        model = trace(graph, (example,), {"image": size}, ["image"], graph.outputs, opset)
    except InputError as error:
        at = "any size" if graph.network_hw is None else f"{graph.network_hw[1]}x{graph.network_hw[0]} px"
        raise InputError(
            f"this model cannot be exported to run at {at} ({error}); "
            "give the one size it shall run at inside the artifact, such as --network-size 512x512"
        ) from error
    height, width = model.graph.input[0].type.tensor_type.shape.dim[1:3]
    if not (height.dim_param and width.dim_param):
        raise InputError(
            "this model was traced at one size only, as window attention is; "
            "give the size it shall run at inside the artifact, such as --network-size 512x512"
        )
    return model


def trace(
    module: nn.Module,
    example: tuple[Tensor, ...],
    dynamic_shapes: Any,
    inputs: Sequence[str],
    outputs: Sequence[str],
    opset: int = OPSET,
) -> ModelProto:
    """The operations of a module as ONNX. dynamic_shapes: as `torch.export` takes them.

    Raises InputError with torch's reason for a module that it cannot trace.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about its own deprecations, of which a user can mend none
            program = torch.onnx.export(
                module.eval(),
                example,
                dynamo=True,
                dynamic_shapes=dynamic_shapes,
                input_names=list(inputs),
                output_names=list(outputs),
                opset_version=opset,
                verbose=False,
            )
    except Exception as error:  # torch.export has a dozen exception types
        raise InputError(str(error.__cause__ or error).strip().partition("\n")[0]) from error
    assert program is not None
    return _without_notes(program.model_proto)


def _without_notes(model: ModelProto) -> ModelProto:
    """Drop what torch notes about sources (stack traces, file names) and intermediate shapes."""
    graph = model.graph
    del graph.value_info[:]
    for each in (graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        del each.metadata_props[:]
        each.ClearField("doc_string")
    return model
