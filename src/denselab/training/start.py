"""Weights to start from: those of a checkpoint, or of the built-in model, whose batch norms are folded away."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from denselab._packaged import PACKAGED
from denselab.errors import InputError
from denselab.export.torch_session import open_model
from denselab.model import Model

_GRAPH_PREFIX = "model."


def start_from(model: Model, source: str, pixels: Tensor) -> str:
    """Copy every weight that fits by name and shape into the model; the rest stays as it is. Returns what was done.

    source: the name of a built-in model, or what `open_model` takes: a checkpoint or a published model.
    pixels: [B, 3, H, W] in [0, 1], training images on which batch norms that were folded away are measured anew.
    Raises InputError where nothing fits.
    """
    if source in PACKAGED:
        tensors = folded_convolutions(PACKAGED[source])
        taken = _unfold(model, tensors, pixels)
    else:
        tensors = open_model(source).model.state_dict()
        own = model.state_dict()
        taken = {name: tensor for name, tensor in tensors.items() if name in own and own[name].shape == tensor.shape}
        model.load_state_dict(taken, strict=False)
    if not taken:
        raise InputError(f"start: wanted a model that shares weights with the new one, got {source}; none of them fits")
    return f"starts from {source}: {len(taken)} of its {len(tensors)} tensors fit"


def folded_convolutions(artifact: Path) -> dict[str, Tensor]:
    """Weights and biases of an artifact's convolutions as float32 under the names of the modules, integers scaled back.

    A bias is that of the batch norm after the convolution, folded into it.
    """
    stored = {i.name: i for i in onnx.load(artifact).graph.initializer}

    def real(name: str) -> Tensor:
        values = torch.from_numpy(numpy_helper.to_array(stored[name]).copy()).float()
        for integers in (name, name.removesuffix("_quantized")):
            if f"{integers}_scale" in stored:
                scale = torch.from_numpy(numpy_helper.to_array(stored[f"{integers}_scale"]).copy())
                return values * scale.reshape(-1, *[1] * (values.ndim - 1))
        return values

    convolutions: dict[str, Tensor] = {}
    for name in stored:
        for ending, ours in ((".weight", ".weight"), (".weight_bias", ".bias"), (".bias", ".bias")):
            if name.startswith(_GRAPH_PREFIX) and name.removesuffix("_quantized").endswith(ending):
                module = name.removesuffix("_quantized").removesuffix(ending).removeprefix(_GRAPH_PREFIX)
                convolutions[module + ours] = real(name)
    return convolutions


@torch.no_grad()
def _unfold(model: Model, tensors: Mapping[str, Tensor], pixels: Tensor) -> dict[str, Tensor]:
    """Give convolutions their folded weights, and each batch norm behind one a scale and shift of the same effect.

    In evaluation a batch norm then adds the folded bias and no more; in training it starts from the statistics of
    `pixels`.
    """
    taken: dict[str, Tensor] = {}
    hooks: list[Any] = []
    for name, conv, norm in _convolutions(model):
        weight, bias = tensors.get(f"{name}.weight"), tensors.get(f"{name}.bias")
        if weight is None or weight.shape != conv.weight.shape:
            continue
        conv.weight.copy_(weight)
        taken[f"{name}.weight"] = weight
        if bias is None:
            continue
        taken[f"{name}.bias"] = bias
        if norm is not None:
            hooks.append(norm.register_forward_pre_hook(partial(_measure, bias=bias)))
        elif conv.bias is not None:
            conv.bias.copy_(bias)
    was_training = model.training
    model.eval()(pixels)
    model.train(was_training)
    for hook in hooks:
        hook.remove()
    return taken


def _measure(norm: nn.BatchNorm2d, inputs: tuple[Tensor, ...], bias: Tensor) -> None:
    variance, mean = torch.var_mean(inputs[0].float(), dim=(0, 2, 3))
    cast("Tensor", norm.running_mean).copy_(mean)
    cast("Tensor", norm.running_var).copy_(variance)
    norm.weight.copy_((variance + norm.eps).sqrt())
    norm.bias.copy_(mean + bias)


def _convolutions(model: Model) -> Iterator[tuple[str, nn.Conv2d, nn.BatchNorm2d | None]]:
    """Every convolution by name, with the batch norm that follows it in its sequence, if one does."""
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if isinstance(module, nn.Conv2d):
            parent, _, place = name.rpartition(".")
            after = modules.get(f"{parent}.{int(place) + 1}") if place.isdigit() else None
            yield name, module, after if isinstance(after, nn.BatchNorm2d) else None
