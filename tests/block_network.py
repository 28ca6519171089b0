"""A small network with a known field of view, as an artifact."""

import json
from pathlib import Path

import numpy as np
import onnx

from artifacts import METADATA

BLOCKS = """
<ir_version: 9, opset_import: ["" : 18]>
blocks (uint8[1, height, width, 3] image) => (uint8[1, height, width] class_ids)
<float[5, 3, 8, 8] to_blocks, float[4, 5, 3, 3] mix, float[4] eight = {1.0, 1.0, 8.0, 8.0},
 int64[2] zeros = {0, 0}, int64[2] sides = {1, 2}>
{
    float_image = Cast <to = 1> (image)
    pixels = Transpose <perm = [0, 3, 1, 2]> (float_image)
    cells = Conv <strides = [8, 8], pads = [0, 0, 7, 7]> (pixels, to_blocks)
    scores = Conv <pads = [1, 1, 1, 1]> (cells, mix)
    enlarged = Resize <mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "floor">
        (scores, , eight)
    best = ArgMax <axis = 1, keepdims = 0> (enlarged)
    source_hw = Shape <start = 1, end = 3> (image)
    cropped = Slice (best, zeros, source_hw, sides)
    class_ids = Cast <to = 2> (cropped)
}
"""


def block_artifact(path: Path) -> Path:
    """A network on a grid of 8 px: a pixel's class depends on its block and the eight around it, 15 px away at most.

    Sizes that are no multiple of 8 are padded with zeros right and bottom.
    """
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(BLOCKS)
    for name, shape in (("to_blocks", (5, 3, 8, 8)), ("mix", (4, 5, 3, 3))):
        weights = onnx.numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name)
        model.graph.initializer.append(weights)
    onnx.helper.set_model_props(model, {"denselab": json.dumps({**METADATA, "classes": {"names": list("abcd")}})})
    onnx.save(model, path)
    return path


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)
