"""A model in every engine, OpenVINO held to fp32."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime
import openvino
from onnx import ModelProto


def run_everywhere(model: ModelProto, inputs: Mapping[str, np.ndarray]) -> dict[str, list[np.ndarray]]:
    """The outputs of a model in their order, by engine."""
    options: Any = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    contents = model.SerializeToString()
    session = onnxruntime.InferenceSession(contents, options, providers=["CPUExecutionProvider"])
    core: Any = openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = core.compile_model(core.read_model(contents), "CPU", settings)
    answers = compiled(dict(inputs))
    return {
        "onnxruntime": list(session.run(None, dict(inputs))),
        "openvino": [np.array(answers[compiled.output(each.name)]) for each in model.graph.output],
    }
