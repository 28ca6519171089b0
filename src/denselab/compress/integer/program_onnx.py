"""An integer program as a file: an ONNX graph of integer nodes only, with its scales in the metadata.

Products are MatMulInteger and ConvInteger of int8, all else int32 and int64 (`onnx_graph`). ONNX Runtime gives the
integers of numpy and torch to the last bit; OpenVINO does not (see there).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, assert_never, cast

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper
from torch import nn

from denselab.compress.integer.layer_norm import IntegerLayerNorm
from denselab.compress.integer.onnx_graph import (
    IntegerGraph,
    add_layer_norm,
    add_requantize,
    add_requantized_sum,
    add_shiftgelu,
    add_shiftmax,
)
from denselab.compress.integer.program import (
    IMAGES,
    Add,
    Code,
    Concat,
    Constant,
    Conv,
    Evaluated,
    Expand,
    IntegerProgram,
    Linear,
    MatMul,
    Maximum,
    Operation,
    Pad,
    Permute,
    Relu,
    Requantize,
    Reshape,
    Slice,
    Sum,
)
from denselab.compress.integer.shiftgelu import ShiftGELU
from denselab.compress.integer.shiftmax import Shiftmax
from denselab.compress.saved_file import check_version, reading
from denselab.errors import InputError
from denselab.files import atomic_path

PROGRAM_FORMAT = 1
LOGITS = "logits"
_METADATA = "denselab_integer_program"


def program_to_onnx(program: IntegerProgram) -> ModelProto:
    """A model from image codes to int32 logits; the number of images stays free, if the program leaves it free."""
    graph = IntegerGraph()
    known = {IMAGES: graph.add("Cast", IMAGES, to=TensorProto.INT32)}
    for step in program.steps:
        known[step.output] = _added(graph, step.operation, [known[name] for name in step.inputs])
    output = known[program.steps[-1].output]
    graph.nodes[-1].output[0] = LOGITS
    assert output == graph.nodes[-1].name  # every operation ends with the node that makes its value
    kind = TensorProto.INT8 if program.image_code.bits == 8 else TensorProto.INT16
    images = program.images or "images"
    shape = [images if length == -1 else length for length in program.logit_shape]
    model = graph.to_model({IMAGES: [images, *program.image_shape]}, {LOGITS: shape}, kind)
    about = {
        "format_version": PROGRAM_FORMAT,
        "image_scale": program.image_code.scale,
        "image_bits": program.image_code.bits,
        "logit_scale": program.logit_scale,
    }
    helper.set_model_props(model, {_METADATA: json.dumps(about)})
    return model


def write_program(program: IntegerProgram, path: Path) -> None:
    """Write a program as ONNX, atomically."""
    model = program_to_onnx(program)
    onnx.checker.check_model(model, full_check=True)
    with atomic_path(path) as partial:
        partial.write_bytes(model.SerializeToString())


class ProgramFile:
    """A program that `write_program` wrote, opened in ONNX Runtime.

    Raises InputError, naming the file: missing, damaged, no integer program, a newer format.
    """

    def __init__(self, path: Path, threads: int = 0) -> None:
        with reading(path, "an integer program", "make it again"):
            model = path.read_bytes()
            try:
                options = onnxruntime.SessionOptions()
                options.intra_op_num_threads = threads
                self._session = onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"])
            except Exception as error:  # ONNX Runtime has exception types of its own
                raise ValueError(str(error).partition("\n")[0]) from error
            about = json.loads(self._session.get_modelmeta().custom_metadata_map[_METADATA])
            check_version(path, about["format_version"], PROGRAM_FORMAT)
            self.image_code = Code(float(about["image_scale"]), int(about["image_bits"]))
            self.logit_scale = float(about["logit_scale"])

    def run(self, codes: NDArray[np.signedinteger[Any]]) -> NDArray[np.int32]:
        """int32 logits of image codes. Raises InputError for what the engine refuses."""
        try:
            return cast("NDArray[np.int32]", self._session.run([LOGITS], {IMAGES: codes})[0])
        except Exception as error:  # see above
            raise InputError(
                f"codes: the program does not run on {codes.dtype} {list(codes.shape)}: {error}"
            ) from error

    def logits(self, pixels: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
        """What the captured model would return for images [B, 3, H, W]."""
        return (self.run(self.image_code.stored(pixels)) * self.logit_scale).astype(np.float32)

    def as_module(self) -> nn.Module:
        """A module with the forward of the captured model."""
        return Evaluated(self.logits)


def _added(graph: IntegerGraph, operation: Operation, inputs: Sequence[str]) -> str:
    """Nodes of one step; int32 in and out."""
    match operation:
        case Linear():
            weight = graph.constant(np.ascontiguousarray(operation.weight.T))
            return graph.add(
                "Add", graph.add("MatMulInteger", _int8(graph, inputs[0]), weight), graph.int32(operation.bias)
            )
        case Conv():
            return _convolved(graph, operation, inputs[0])
        case MatMul():
            return graph.add("MatMulInteger", _int8(graph, inputs[0]), _int8(graph, inputs[1]))
        case Requantize():
            return add_requantize(graph, inputs[0], operation.dyadic, operation.bits)
        case Add():
            return add_requantized_sum(
                graph, inputs[0], operation.dyadic, inputs[1], operation.other_dyadic, operation.bits
            )
        case Constant():
            return graph.int32(operation.codes)
        case Relu():
            return graph.add("Max", inputs[0], graph.int32(0))
        case Maximum():
            return graph.add("Max", inputs[0], inputs[1])
        case Sum():
            return graph.add("ReduceSum", inputs[0], graph.int64(operation.axes), keepdims=int(operation.keep))
        case Shiftmax():
            return add_shiftmax(graph, inputs[0], operation)
        case ShiftGELU():
            return add_shiftgelu(graph, inputs[0], operation)
        case IntegerLayerNorm():
            return add_layer_norm(graph, inputs[0], operation)
        case Reshape():
            return graph.add("Reshape", inputs[0], graph.int64(operation.shape))
        case Permute():
            return graph.add("Transpose", inputs[0], perm=operation.order)
        case Slice():
            ends = ([operation.start], [operation.stop], [operation.axis], [operation.step])
            return graph.add("Slice", inputs[0], *map(graph.int64, ends))
        case Concat():
            return graph.add("Concat", *inputs, axis=operation.axis)
        case Expand():
            images = graph.add("Shape", IMAGES, start=0, end=1)
            lengths = [images if length == -1 else graph.int64([length]) for length in operation.shape]
            return graph.add("Expand", inputs[0], graph.add("Concat", *lengths, axis=0))
        case Pad():
            before, after = zip(*operation.widths, strict=True)
            return graph.add("Pad", inputs[0], graph.int64([*before, *after]), graph.int32(operation.value))
        case _:
            assert_never(operation)


def _convolved(graph: IntegerGraph, conv: Conv, x: str) -> str:
    sums = graph.add(
        "ConvInteger",
        _int8(graph, x),
        graph.constant(conv.weight),
        strides=conv.stride,
        pads=conv.padding * 2,
        dilations=conv.dilation,
        group=conv.groups,
    )
    return graph.add("Add", sums, graph.int32(conv.bias.reshape(-1, 1, 1)))


def _int8(graph: IntegerGraph, x: str) -> str:
    return graph.add("Cast", x, to=TensorProto.INT8)
