"""Tiny artifacts for tests, whose answers are known functions of the red and green of every pixel."""

import json
from pathlib import Path
from typing import Any

import onnx

METADATA: dict[str, Any] = {
    "format_version": 2,
    "tasks": ["semantic"],
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
    "depth_unit": None,
}

GRAPH = """
<ir_version: 9, opset_import: ["" : 18]>
tiny (uint8[1, height, width, 3] image) => ({outputs})
<int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] two = {{2}}, int64[1] three = {{3}}, uint8 half = {{128}},
 float ten = {{10.0}}, int32[1] other_id = {{2}}>
{{
    red_plane = Slice (image, zero, one, three)
    red = Squeeze (red_plane, three)
    green_plane = Slice (image, one, two, three)
    green = Squeeze (green_plane, three)
    is_red = GreaterOrEqual (red, half)
    is_green = GreaterOrEqual (green, half)
    {nodes}
}}
"""

# Per task: the outputs of the graph and the nodes that make them.
TASKS = {
    # 1 where red, else 0
    "semantic": ("uint8[1, height, width] class_ids", "class_ids = Cast <to = 2> (is_red)"),
    # slot 0 (id 1) where red, else slot 1 (id 2); slot 2 is never used
    "panoptic": (
        "int32[1, height, width] panoptic_ids, int32[1, 3] segment_classes, float[1, 3] segment_scores",
        """
        red_one = Cast <to = 6> (is_red)
        panoptic_ids = Sub (other_id, red_one)
        segment_classes = Constant <value = int32[1, 3] {1, 0, 1}> ()
        segment_scores = Constant <value = float[1, 3] {0.75, 0.5, 0.25}> ()
        """,
    ),
    # slots: green of class 0, red of class 1, nothing, red again but hardly sure, red unused
    "instance": (
        "uint8[1, 5, height, width] instance_masks, int32[1, 5] instance_classes, float[1, 5] instance_scores",
        """
        red_mask = Cast <to = 2> (is_red)
        green_mask = Cast <to = 2> (is_green)
        no_mask = Sub (red_mask, red_mask)
        red_slot = Unsqueeze (red_mask, one)
        green_slot = Unsqueeze (green_mask, one)
        no_slot = Unsqueeze (no_mask, one)
        instance_masks = Concat <axis = 1> (green_slot, red_slot, no_slot, red_slot, red_slot)
        instance_classes = Constant <value = int32[1, 5] {0, 1, 1, 1, 1}> ()
        instance_scores = Constant <value = float[1, 5] {0.5, 0.75, 0.875, 0.03125, 0.0}> ()
        """,
    ),
    # red / 10 metres; 0, unknown, where there is no red
    "depth": (
        "float[1, height, width] depth_m",
        """
        red_float = Cast <to = 1> (red)
        depth_m = Div (red_float, ten)
        """,
    ),
    # to the right where red, else to the camera
    "normals": (
        "float[1, 3, height, width] normals",
        """
        is_other = Not (is_red)
        right = Cast <to = 1> (is_red)
        back = Cast <to = 1> (is_other)
        forward = Neg (back)
        flat = Sub (right, right)
        right_slot = Unsqueeze (right, one)
        flat_slot = Unsqueeze (flat, one)
        forward_slot = Unsqueeze (forward, one)
        normals = Concat <axis = 1> (right_slot, flat_slot, forward_slot)
        """,
    ),
}


def task_artifact(path: Path, *tasks: str, **metadata: Any) -> Path:
    """Write an artifact that answers the tasks as TASKS says; `metadata` replaces fields of METADATA."""
    outputs, nodes = zip(*(TASKS[task] for task in tasks), strict=True)
    model = onnx.parser.parse_model(GRAPH.format(outputs=", ".join(outputs), nodes="\n".join(nodes)))
    described = {**METADATA, "tasks": list(tasks), **metadata}
    onnx.helper.set_model_props(model, {"denselab": json.dumps(described)})
    onnx.save(model, str(path))
    return path


def tiny_artifact(path: Path, **metadata: Any) -> Path:
    """Write a semantic artifact whose class is 1 where the red channel is >= 128."""
    return task_artifact(path, "semantic", **metadata)
