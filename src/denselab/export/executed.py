"""What engines really compute in integers: counted in the graphs that they execute, not in the file.

ONNX Runtime's profile of a run names every kernel and the shapes that it got; OpenVINO's compiled graph says of every
node in which numbers it runs and of which nodes of the file it was made.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from denselab.runtime.session import import_openvino

Inputs = Mapping[str, NDArray[np.generic]]
"""An example of what a model reads, by name."""

_INTEGER_KERNELS = {"QLinearConv", "QGemm", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat", "ConvInteger"}
_CONVOLUTIONS = {"Conv", "FusedConv", "NhwcFusedConv", "QLinearConv", "ConvInteger"}
_TRANSPOSED = {"ConvTranspose"}
_PRODUCTS = {
    *("MatMul", "FusedMatMul", "Gemm", "FusedGemm", "MatMulNBits"),
    *("QGemm", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat"),
}
_KINDS_OF_OPENVINO = {"Convolution", "Deconvolution", "FullyConnected", "MatMul"}
_INTEGERS_OF_OPENVINO = {"u8", "i8"}
_ROWS_AND_COLUMNS, _WITH_SPACE = 2, 3


def executed_integers(model: ModelProto, inputs: Inputs) -> dict[str, float]:
    """The share of all multiplications, in products and convolutions, that every engine computes in integers, 0..1.

    Products that OpenVINO fuses into something else count as float.
    """
    macs = {name: count for name, _, count in _run_by_onnxruntime(model, inputs, optimized=False)}
    total = max(sum(macs.values()), 1)
    by_onnxruntime = (
        count for _, kernel, count in _run_by_onnxruntime(model, inputs, optimized=True) if kernel in _INTEGER_KERNELS
    )
    in_openvino = _integers_of_openvino(model)
    by_openvino = (count for name, count in macs.items() if name in in_openvino)
    return {
        "openvino": round(sum(by_openvino) / total, 4),
        "onnxruntime": round(sum(by_onnxruntime) / total, 4),
    }


def _run_by_onnxruntime(model: ModelProto, inputs: Inputs, optimized: bool) -> Iterator[tuple[str, str, int]]:
    """Name, kernel and multiplications of the products of one run."""
    import onnxruntime

    with TemporaryDirectory() as folder:
        options: Any = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        options.add_session_config_entry("session.disable_prepacking", "1")  # a packed weight has no shape
        if not optimized:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        contents = model.SerializeToString()
        session: Any = onnxruntime.InferenceSession(contents, options, providers=["CPUExecutionProvider"])
        session.run(None, dict(inputs))
        events: list[dict[str, Any]] = json.loads(Path(session.end_profiling()).read_text("utf-8"))
    for event in events:
        about = event.get("args", {})
        if event["cat"] == "Node" and "output_type_shape" in about:
            read, made = (
                [shape for each in about[f"{side}_type_shape"] for shape in each.values()]
                for side in ("input", "output")
            )
            count = _macs(about["op_name"], read, made[0])
            if count:
                yield event["name"].removesuffix("_kernel_time"), about["op_name"], count


def _macs(kernel: str, read: Sequence[Sequence[int]], made: Sequence[int]) -> int:
    if kernel in _CONVOLUTIONS | _TRANSPOSED:
        x, weight = [shape for shape in read if len(shape) >= _WITH_SPACE][:2]
        return math.prod(made if kernel in _CONVOLUTIONS else x) * math.prod(weight[1:])
    if kernel in _PRODUCTS:
        left, right = [shape for shape in read if len(shape) >= _ROWS_AND_COLUMNS][:2]
        # [.., m, k] x [.., k, n] -> [.., m, n], whichever of them is transposed
        matrices = math.prod(made[:-2]) if math.prod(right[:-2]) > 1 else 1
        return math.isqrt(math.prod(left) * math.prod(right) * math.prod(made) // matrices)
    return 0


def _integers_of_openvino(model: ModelProto) -> set[str]:
    """Names of the nodes of the file that OpenVINO runs in integers."""
    openvino = import_openvino()
    core: Any = openvino.Core()
    compiled: Any = core.compile_model(core.read_model(model.SerializeToString()), "CPU", {"INFERENCE_NUM_THREADS": 1})
    found: set[str] = set()
    for node in compiled.get_runtime_model().get_ops():
        about: Any = node.get_rt_info()
        kind, precision, names = (
            about[name].astype(str) for name in ("layerType", "runtimePrecision", "originalLayersNames")
        )
        if kind in _KINDS_OF_OPENVINO and precision in _INTEGERS_OF_OPENVINO:
            found.update(name.partition("/")[0] for name in names.split(","))
    return found
