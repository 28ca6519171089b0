"""Smaller artifacts: 8-bit integers, or weights stored as bfloat16."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

# Additions and ReLUs too: a residual block then stays in 8 bits from one convolution to the next.
_OPERATIONS = ("Conv", "Add", "Relu")


class _Photos(CalibrationDataReader):
    def __init__(self, images: Sequence[NDArray[np.uint8]]) -> None:
        self._images: Iterator[NDArray[np.uint8]] = iter(images)

    # onnxruntime declares a dict and wants None at the end
    def get_next(self) -> dict[str, NDArray[np.uint8]] | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        image = next(self._images, None)
        return None if image is None else {"image": image[None]}


def quantize_int8(model: ModelProto, calibration: Sequence[NDArray[np.uint8]]) -> ModelProto:
    """Static quantization in QDQ form: weights in 7 bits of int8 per output channel, activations uint8 per tensor.

    Convolutions and the additions between them; linear layers and attention stay in float. calibration: photos uint8
    [H, W, 3]; the smallest and largest value seen sets each activation's range.
    """
    prepared = ModelProto()
    prepared.CopyFrom(model)
    # Without this mark the quantizer asks to run its preprocessing (constant folding), which torch has done.
    prepared.metadata_props.add(key="onnx.quant.pre_process", value="onnxruntime.quant")
    with TemporaryDirectory() as folder:
        path = Path(folder) / "int8.onnx"
        quantize_static(
            prepared,
            path,
            _Photos(calibration),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(_OPERATIONS),
            per_channel=True,
            reduce_range=True,  # with 8 bits, processors of x86 without VNNI saturate (see `integers`)
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=_kept_in_float(model),
        )
        quantized = onnx.load(path)
    del quantized.metadata_props[:]
    del quantized.graph.value_info[:]
    return quantized


def _kept_in_float(model: ModelProto) -> list[str]:
    """Names of the first and last learned convolution, of the upsampling, and of additions that no convolution feeds.

    The first convolution has too few channels for integer kernels; the last makes the scores that are compared, and
    the upsampling refines them. All are cheap. The sums of a transformer have outliers that 8 bits do not span.
    """
    shape = {weight.name: tuple(weight.dims) for weight in model.graph.initializer}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    upsampling = [node for node in convolutions if shape.get(node.input[1], (0, 0))[1] == 1 and _groups(node) == 1]
    learned = [node for node in convolutions if node not in upsampling]
    fed = {node.output[0] for node in convolutions}
    fed |= {node.output[0] for node in model.graph.node if node.op_type == "Relu" and node.input[0] in fed}
    sums = [node for node in model.graph.node if node.op_type == "Add" and fed.isdisjoint(node.input)]
    return [node.name for node in (*learned[:1], *learned[-1:], *upsampling, *sums)]


def _groups(convolution: NodeProto) -> int:
    return next((attribute.i for attribute in convolution.attribute if attribute.name == "group"), 1)


def store_bf16(model: ModelProto) -> ModelProto:
    """Store every float weight of two or more dimensions as bfloat16, cast back to float32 where it is used."""
    stored = ModelProto()
    stored.CopyFrom(model)
    casts = []
    for weight in stored.graph.initializer:
        if weight.data_type == TensorProto.FLOAT and len(weight.dims) > 1:
            name = weight.name
            rounded = torch.from_numpy(numpy_helper.to_array(weight).copy()).bfloat16()
            bits = rounded.view(torch.int16).numpy().tobytes()
            weight.CopyFrom(TensorProto(name=f"{name}.bf16", data_type=TensorProto.BFLOAT16, dims=weight.dims))
            weight.raw_data = bits
            casts.append(helper.make_node("Cast", [weight.name], [name], to=TensorProto.FLOAT, name=f"{name}.cast"))
    nodes = [*casts, *stored.graph.node]
    del stored.graph.node[:]
    stored.graph.node.extend(nodes)
    return stored
