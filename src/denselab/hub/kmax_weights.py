"""The names of kMaX-DeepLab's published PyTorch weights, and ours.

kmax-deeplab@f8e1d04: kmax_pixel_decoder.py and kmax_transformer_decoder.py; @f5a3d9e: backbone/resnet.py and
convnext.py. A checkpoint is a dict whose entry "model" holds the tensors; see `denselab.hub.kmax`, which reads whole
ones.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from denselab.backbones.corner_grid import CornerGridBackbone
from denselab.errors import InputError
from denselab.heads.deeplab_semantic import DeepLabSemantic
from denselab.heads.kmax import KMaXHead
from denselab.pixel_decoders.kmax import KMaXPixelDecoder

_RESNET = {
    "stem.conv1": "net.conv1",
    "stem.conv1.norm": "net.bn1",
    **{f"res{stage + 1}": f"net.layer{stage}" for stage in range(1, 5)},
    **{f"conv{place}.norm": f"bn{place}" for place in range(1, 4)},
    "shortcut": "downsample.0",
    "shortcut.norm": "downsample.1",
}
_CONVNEXT = {
    "downsample_layers.0.0": "net.stem_0",
    "downsample_layers.0.1": "net.stem_1",
    **{f"downsample_layers.{stage}": f"net.stages_{stage}.downsample" for stage in range(1, 4)},
    **{f"stages.{stage}": f"net.stages_{stage}.blocks" for stage in range(4)},
    "dwconv": "conv_dw",
    "pwconv1": "mlp.fc1",
    "pwconv2": "mlp.fc2",
}
_PIXEL_DECODER = {
    "_in_norms": "input_norms",
    "_stages": "stages",
    "_blocks": "",
    "_conv1_bn_act": "reduce",
    "_conv2_bn_act": "mix",
    "_conv3_bn": "expand",
    "_shortcut": "shortcut",
    "_attention": "mix.0",
    "_height_axis": "columns",
    "_width_axis": "rows",
    "qkv_transform": "qkv",
    "_batch_norm_qkv": "qkv.norm",
    "_query_rpe": "query_positions",
    "_key_rpe": "key_positions",
    "_value_rpe": "value_positions",
    "_embeddings": "",
    "_batch_norm_similarity": "norm_similarity",
    "_batch_norm_retrieved_output": "norm_retrieved",
    "_resized_fuses": "fuses",
    "_conv_bn_low": "coarse.1",
    "_conv_bn_high": "fine.1",
}
_HEAD = {
    "_kmax_transformer_layers": "layers",
    "_query_conv1_bn_act": "queries",
    "_pixel_conv1_bn_act": "pixels",
    "_pixel_v_conv_bn": "pixel_values",
    "_kmeans_query_batch_norm_retrieved_value": "norm_update",
    "_kmeans_query_conv3_bn": "update",
    "_query_qkv_conv_bn": "query_qkv",
    "_query_self_attention": "attention",
    "_batch_norm_similarity": "norm_similarity",
    "_batch_norm_retrieved_value": "norm_retrieved",
    "_query_conv3_bn": "attention_update",
    "_query_ffn_conv1_bn_act": "ffn.0",
    "_query_ffn_conv2_bn": "ffn.1",
    "_predcitor": "predictor",
    "_pixel_space_head_conv0bnact": "embed.0",
    "_pixel_space_head_conv1bnact": "embed.1",
    "_pixel_space_head_last_convbn": "embed.2",
    "_transformer_mask_head": "mask_kernel",
    "_transformer_class_head.conv": "classify",
    "_pixel_space_mask_batch_norm": "norm_logits",
    "_class_embedding_projection": "for_classes",
    "_mask_embedding_projection": "for_masks",
    "_cluster_centers.weight": "centres",
}
_SEMANTIC = {
    "_aspp": "pyramid",
    "_aspp_conv0": "point",
    "_aspp_conv1": "atrous.0",
    "_aspp_conv2": "atrous.1",
    "_aspp_conv3": "atrous.2",
    "_aspp_pool": "pooled",
    "_proj_conv_bn_act": "project",
    "_low_level_projection_os8": "projections.0",
    "_low_level_fusion_os8_conv0_bn_act": "fusions.0.0",
    "_low_level_fusion_os8_conv1_bn_act": "fusions.0.1",
    "_low_level_projection_os4": "projections.1",
    "_low_level_fusion_os4_conv0_bn_act": "fusions.1.0",
    "_low_level_fusion_os4_conv1_bn_act": "fusions.1.1",
    "conv_block_0": "refine.0",
    "conv_block_1": "refine.1",
    "final_conv.conv": "classify",
}
_SEMANTIC_PREFIX = "_auxiliary_semantic_predictor."
_SHOWN = 5


def backbone_weights(
    published: Mapping[str, Tensor], backbone: CornerGridBackbone, prefix: str = "backbone."
) -> dict[str, Tensor]:
    """The state of `backbone`, a ResNet or a ConvNeXt, from published tensors whose names begin with `prefix`.

    Raises InputError naming the keys that do not fit.
    """
    names = _RESNET if hasattr(backbone.net, "layer1") else _CONVNEXT
    return _fitted(_below(published, prefix), backbone.state_dict(), names, prefix)


def pixel_decoder_weights(
    published: Mapping[str, Tensor], decoder: KMaXPixelDecoder, prefix: str = "sem_seg_head.pixel_decoder."
) -> dict[str, Tensor]:
    """The state of `decoder` from published tensors whose names begin with `prefix`; others are left aside.

    Raises InputError naming the keys that do not fit.
    """
    return _fitted(_below(published, prefix), decoder.state_dict(), _PIXEL_DECODER, prefix)


def head_weights(
    published: Mapping[str, Tensor], head: KMaXHead, prefix: str = "sem_seg_head.predictor."
) -> dict[str, Tensor]:
    """The state of `head` from published tensors; its semantic decoder, which sees other maps, stays as it is.

    Raises InputError naming the keys that do not fit.
    """
    state = head.state_dict()
    own = {name: value for name, value in state.items() if name.startswith("semantic.")}
    wanted = {name: value for name, value in state.items() if name not in own}
    named = {name: v for name, v in _below(published, prefix).items() if not name.startswith(_SEMANTIC_PREFIX)}
    return _fitted(named, wanted, _HEAD, prefix) | own


def semantic_weights(
    published: Mapping[str, Tensor],
    decoder: DeepLabSemantic,
    prefix: str = "sem_seg_head.predictor._auxiliary_semantic_predictor.",
) -> dict[str, Tensor]:
    """The state of the published semantic decoder over backbone maps; it has K + 1 classes, the last one unused.

    Raises InputError naming the keys that do not fit.
    """
    return _fitted(_below(published, prefix), decoder.state_dict(), _SEMANTIC, prefix)


def _below(published: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in published.items() if name.startswith(prefix)}


def _renamed(name: str, names: Mapping[str, str]) -> str:
    """`name` with every part that `names` knows replaced; parts are whole stretches between dots."""
    known = "|".join(re.escape(part) for part in sorted(names, key=len, reverse=True))
    renamed = re.sub(rf"(?<![^.])(?:{known})(?![^.])", lambda found: names[found[0]], name)
    return renamed.replace("..", ".")


def _fitted(
    published: Mapping[str, Tensor], wanted: Mapping[str, Tensor], names: Mapping[str, str], prefix: str
) -> dict[str, Tensor]:
    """Every wanted tensor from the published ones, in our shapes and types.

    Weights converted from TensorFlow do not count the batches that their norms have seen, which nothing here asks for.
    """
    ours = {_renamed(name, names): (prefix + name, value) for name, value in published.items()}
    problems = [f"{name} is not in the model" for ours_name, (name, _) in ours.items() if ours_name not in wanted]
    state: dict[str, Tensor] = {}
    for name, like in wanted.items():
        if name not in ours and name.endswith(".num_batches_tracked"):
            state[name] = like
            continue
        if name not in ours:
            problems.append(f"{name} of the model is not in the weights")
            continue
        theirs, value = ours[name]
        # Convolutions of size 1 over sequences there are convolutions over maps here.
        if tuple(value.shape) + (1,) * (like.ndim - value.ndim) == tuple(like.shape):
            state[name] = value.to(like.dtype).reshape(like.shape)
        else:
            problems.append(f"{theirs} is {list(value.shape)}, the model wants {list(like.shape)}")
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise InputError(
            f"published weights: wanted those of kMaX-DeepLab below {prefix!r} for a model of the same sizes, but "
            f"{'; '.join(problems[:_SHOWN])}{more}; build the model with the sizes of the weights, and Norm.BATCH or "
            "Norm.FROZEN, and give it a whole checkpoint of that project, unchanged"
        )
    return state
