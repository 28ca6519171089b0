"""A tiny artifact for tests: red pixels are class 1, all others class 0."""

import json
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

METADATA: dict[str, Any] = {
    "format_version": 1,
    "task": "semantic",
    "name": "tiny",
    "classes": {"names": ["other", "red"], "colours": [[0, 0, 200], [200, 0, 0]]},
    "void": 255,
    "size_multiple": 8,
    "train_hw": [360, 480],
    "precision": "fp32",
    "licence": "Apache-2.0",
    "score": None,
    "receipt": {},
    "denselab_version": "0.1.0",
}


def tiny_artifact(path: Path, **metadata: Any) -> Path:
    """Write an artifact whose class is 1 where the red channel is >= 128; `metadata` replaces fields of METADATA."""
    channel_0 = helper.make_node("Slice", ["image", "zero", "one", "axis"], ["red"])
    squeezed = helper.make_node("Squeeze", ["red", "axis"], ["red_2d"])
    compared = helper.make_node("GreaterOrEqual", ["red_2d", "half"], ["is_red"])
    cast = helper.make_node("Cast", ["is_red"], ["class_ids"], to=TensorProto.UINT8)
    graph = helper.make_graph(
        [channel_0, squeezed, compared, cast],
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, [1, "height", "width", 3])],
        [helper.make_tensor_value_info("class_ids", TensorProto.UINT8, [1, "height", "width"])],
        [
            helper.make_tensor("zero", TensorProto.INT64, [1], [0]),
            helper.make_tensor("one", TensorProto.INT64, [1], [1]),
            helper.make_tensor("axis", TensorProto.INT64, [1], [3]),
            helper.make_tensor("half", TensorProto.UINT8, [], [128]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    helper.set_model_props(model, {"denselab": json.dumps({**METADATA, **metadata})})
    onnx.save(model, str(path))
    return path
