"""The file of a classifier: ONNX that takes uint8 photos and returns logits, opened by the engines of the runtime.

Photos are resized and cropped before, as the metadata says: timm's data config, or the settings of an image processor
of transformers. Normalisation is in the graph.
"""

import json
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

from denselab.compress.subject import Classifier
from denselab.errors import InputError
from denselab.export.graph import OPSET

CLASSIFIER_KEY = "denselab_classifier"
"""Where the file says, as JSON, what it is."""

DATA_OPTIONS = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std", "image_processor")
"""What photos go through before the network sees them."""

IMAGE, LOGITS = "image", "logits"
PIXELS = "pixels"


def float_to_onnx(network: nn.Module, example: Float[Tensor, "1 3 H W"]) -> ModelProto:
    """The network in float32 of `pixels` [B, 3, H, W] to `logits`. Raises InputError if it cannot be traced."""
    batch = {0: torch.export.Dim("batch", min=1)}
    several = example.expand(2, -1, -1, -1).clone()  # a batch of one is never left free
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about its own deprecations, of which a user can mend none
            program = torch.onnx.export(
                network.eval(),
                (several,),
                dynamo=True,
                dynamic_shapes=(batch,),
                input_names=[PIXELS],
                output_names=[LOGITS],
                opset_version=OPSET,
                verbose=False,
            )
    except Exception as error:  # torch.export has a dozen exception types
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise InputError(f"model: its float form cannot be written as ONNX ({reason}); take another model") from error
    assert program is not None
    return program.model_proto


def taking_photos(model: ModelProto, kind: Classifier, about: Mapping[str, Any]) -> ModelProto:
    """A model of `pixels` as one of `image`: uint8 [B, H, W, 3], RGB, resized and cropped already.

    about: kept in the metadata.
    """
    made = ModelProto()
    made.CopyFrom(model)
    (pixels,) = made.graph.input
    batch, _, height, width = pixels.type.tensor_type.shape.dim
    # The operations of `Subject.pixels` in its order: another rounding would be another code here and there.
    constants = {
        "image_most": np.array(255),
        "image_mean": np.array(kind.mean).reshape(1, 3, 1, 1),
        "image_std": np.array(kind.std).reshape(1, 3, 1, 1),
    }
    nodes = [
        helper.make_node("Transpose", [IMAGE], ["image_planes"], "image_planes", perm=[0, 3, 1, 2]),
        helper.make_node("Cast", ["image_planes"], ["image_float"], "image_float", to=TensorProto.FLOAT),
        helper.make_node("Div", ["image_float", "image_most"], ["image_unit"], "image_unit"),
        helper.make_node("Sub", ["image_unit", "image_mean"], ["image_centred"], "image_centred"),
        helper.make_node("Div", ["image_centred", "image_std"], [pixels.name], "image_pixels"),
    ]
    shape: list[int | str] = [
        batch.dim_param or batch.dim_value or "batch",
        *(each.dim_value or each.dim_param for each in (height, width)),
        3,
    ]
    nodes += list(made.graph.node)
    del made.graph.node[:], made.graph.input[:]
    made.graph.node.extend(nodes)
    made.graph.input.append(helper.make_tensor_value_info(IMAGE, TensorProto.UINT8, shape))
    made.graph.initializer.extend(
        numpy_helper.from_array(value.astype(np.float32), name) for name, value in constants.items()
    )
    described = {
        "format_version": 1,
        "classes": kind.names,
        "data": {name: kind.data[name] for name in DATA_OPTIONS if name in kind.data},
        **about,
    }
    del made.metadata_props[:]
    made.metadata_props.add(key=CLASSIFIER_KEY, value=json.dumps(described, ensure_ascii=False))
    return made
