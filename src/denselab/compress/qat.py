"""Training a quantized network: weights, and the steps of its grids, learn through the rounding.

Esser et al.: Learned Step Size Quantization (LSQ), ICLR 2020, arXiv:1902.08153. Every pass forward quantizes what the
plan says; the pass back goes straight through rounding, and reaches a scale s by round(v) - v of v = x / s inside the
range and by its end outside (section 2.1; `quantizers.uniform`). The gradient of a scale counts 1 / sqrt(N Q) (section
2.2), with N the numbers of the weight, or of the activation per image, that share it, and Q the greatest code, so that
scales move about as fast, relative to their size, as weights do. Mix-QViT (arXiv:2501.06357) trains its plans of 2 bits
so.

Both rates fall with a cosine to 0; scales learn by gradient descent with momentum 0.9, as in the paper. Deviations:
weights, biases and norms learn by AdamW, as transformers need it; zero points stay; grids that are not uniform keep
their parameters and pass gradients; the network starts from quantizers that were fitted to it, whose scales of
symmetric weights `lsq_weights` replaces by the paper's start. No scale falls below a thousandth of where it began. The
gradient as a whole is cut to length 1.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from denselab.compress.edit import GraphEdit
from denselab.compress.graph import Graph, Hook
from denselab.compress.methods.method import Calibration
from denselab.compress.observing import weights
from denselab.compress.plan import kept_axes
from denselab.compress.quantizers import Quantizer, Uniform, fake_quantized, lsq_scale
from denselab.compress.ranges import lsq_start
from denselab.compress.simulate import QuantizedGraph
from denselab.compress.sites import ModelHash, QuantSite
from denselab.compress.tensor_file import read_tensors, write_tensors
from denselab.errors import InputError

Loss = Callable[[Any, Any], Float[Tensor, "..."]]
"""From what the network returns and the target of a batch to what shall become small; its mean is taken."""

Examples = Iterable[tuple[Float[Tensor, "B 3 H W"], Any]]
"""Images and their targets; every loop over them starts anew."""

TRAINED_FORMAT = 1

_PARAMETER, _SCALE = "parameter ", "scale of "
_MOMENTUM = 0.9
_LEAST_SHARE = 1e-3
_LONGEST_GRADIENT = 1.0
_SAID = 50


@dataclass(frozen=True)
class Training:
    """steps: batches in all. weight_rate: of AdamW. scale_rate: of gradient descent. Raises InputError for none."""

    steps: int
    weight_rate: float = 1e-4
    scale_rate: float = 1e-3
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"steps: wanted at least 1, got {self.steps}")
        for name in ("weight_rate", "scale_rate", "weight_decay"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"{name}: wanted a finite number from 0 up, got {getattr(self, name)}")


def distilled(start: QuantizedGraph, teacher: Graph, calibration: Calibration, training: Training) -> QuantizedGraph:
    """`trained` to answer the calibration images as a float network does: the loss is the change from its answers."""

    class Answers:
        """The teacher's, computed anew in every loop."""

        def __iter__(self) -> Iterator[tuple[Tensor, Any]]:
            for pixels in calibration.batches:
                with torch.no_grad():
                    answer = teacher.run(pixels)
                yield pixels, answer

    return trained(start, Answers(), calibration.change, training, calibration.say)


def write_trained(network: QuantizedGraph, start: QuantizedGraph, path: Path) -> None:
    """What training changed of a network: parameters and scales, as safetensors, atomically."""
    tensors = {f"{_PARAMETER}{name}": value.detach() for name, value in network.graph.module.named_parameters()}
    for key, quantizer in network.quantizers.items():
        if isinstance(quantizer, Uniform):
            tensors[f"{_SCALE}{key}"] = quantizer.scale.clone()  # sites may share a quantizer, files may not
    write_tensors(path, tensors, {}, start.graph.model, TRAINED_FORMAT)


def read_trained(path: Path, start: QuantizedGraph) -> QuantizedGraph:
    """What `write_trained` saved, of the network that it was trained from.

    Raises InputError, naming the file: missing, damaged, a newer format, of another model, weights or plan.
    """

    def built(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> QuantizedGraph:
        graph = _with_own_parameters(start.graph)
        scales = Scales(start.quantizers)
        held = {f"{_PARAMETER}{name}": value for name, value in graph.module.named_parameters()}
        for key, quantizer in start.quantizers.items():
            if isinstance(quantizer, Uniform):
                held[f"{_SCALE}{key}"] = scales.of(key)
        if unlike := held.keys() ^ tensors.keys():
            raise ValueError(f"it is of another plan: {min(unlike)}")
        for name, value in held.items():
            if value.shape != tensors[name].shape:
                raise ValueError(f"it is of another plan: {name}")
            value.data.copy_(tensors[name])
        return QuantizedGraph(_hashed_again(graph), start.plan, scales.quantizers())

    return read_tensors(path, start.graph.model, TRAINED_FORMAT, built, "a trained network")


def trained(
    start: QuantizedGraph,
    examples: Examples,
    loss: Loss,
    training: Training,
    say: Callable[[str], None] = lambda text: None,
) -> QuantizedGraph:
    """A quantized network like the one given, with weights and scales that learned from examples.

    The network that it starts from, and the user's model, keep theirs. Examples are taken again from the first when
    they end. Raises InputError: no examples, a loss that is no number (step named).
    """
    graph = _with_own_parameters(start.graph)
    parameters = [each for each in graph.module.parameters() if each.is_floating_point()]
    scales = Scales(start.quantizers)
    optimizers = (
        torch.optim.AdamW(parameters, training.weight_rate, weight_decay=training.weight_decay),
        torch.optim.SGD(scales.learned(), training.scale_rate, momentum=_MOMENTUM),
    )
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(each, training.steps) for each in optimizers]
    stepping = _cycled(examples)
    hooks = scales.hooks(graph)
    for step in range(training.steps):
        pixels, target = next(stepping)
        with torch.enable_grad():
            value = loss(graph.run(pixels, hooks=hooks), target).mean()
        if not value.isfinite():
            raise InputError(f"loss: wanted a finite number, got {value.item()} in step {step}; lower the rates")
        for each in optimizers:
            each.zero_grad()
        value.backward()
        learned = [*parameters, *scales.learned()]
        nn.utils.clip_grad_norm_(learned, _LONGEST_GRADIENT)
        for each in (*optimizers, *schedules):
            each.step()
        scales.keep_above_zero()
        if step % _SAID == 0 or step + 1 == training.steps:
            say(f"training the quantized network: step {step + 1} of {training.steps}, loss {value.item():.4g}")
    return QuantizedGraph(_hashed_again(graph), start.plan, scales.quantizers())


def lsq_weights(start: QuantizedGraph) -> QuantizedGraph:
    """The same with the scales of symmetric uniform weights as LSQ starts: 2 mean |w| / sqrt(greatest code)."""
    stored, sites = weights(start.graph), start.graph.found.by_key
    quantizers = dict(start.quantizers)
    for key, weight in stored.items():
        quantizer = quantizers.get(key)
        if isinstance(quantizer, Uniform) and quantizer.zero_point is None:
            keep = kept_axes(sites[key], start.plan.specs[key].granularity)
            quantizers[key] = lsq_start(weight, quantizer.bits, keep)
    return QuantizedGraph(start.graph, start.plan, quantizers)


class Scales:
    """The scales of uniform quantizers as parameters that learn; quantizers that sites share stay shared."""

    def __init__(self, quantizers: Mapping[str, Quantizer]) -> None:
        self._start = dict(quantizers)
        self._learned: dict[int, nn.Parameter] = {
            id(each): nn.Parameter(each.scale.detach().clone())
            for each in quantizers.values()
            if isinstance(each, Uniform)
        }

    def learned(self) -> list[nn.Parameter]:
        """All scales that learn."""
        return list(self._learned.values())

    def of(self, key: str) -> nn.Parameter:
        """The scale of a site."""
        return self._learned[id(self._start[key])]

    def hooks(self, graph: Graph) -> dict[str, Hook]:
        """Hooks for `Graph.run` that quantize, with gradients for scales as in LSQ."""
        sites = graph.found.by_key
        return {key: partial(self._quantized, sites[key]) for key in self._start}

    def keep_above_zero(self) -> None:
        """Lift scales that fell too low."""
        for each in self._start.values():
            if isinstance(each, Uniform):
                scale = self._learned[id(each)].data
                scale.copy_(torch.maximum(scale, each.scale * _LEAST_SHARE))

    def quantizers(self) -> dict[str, Quantizer]:
        """The quantizers as they have become."""
        found: dict[int, Quantizer] = {}
        for each in self._start.values():
            if isinstance(each, Uniform):
                found[id(each)] = replace(each, scale=self._learned[id(each)].detach().clone())
        return {key: found.get(id(each), each) for key, each in self._start.items()}

    def _quantized(self, site: QuantSite, x: Tensor) -> Tensor:
        quantizer = self._start[site.key]
        if isinstance(quantizer, Uniform):
            scale = self.of(site.key)
            sharing = max(site.elements // scale.numel(), 1)
            quantizer = replace(quantizer, scale=lsq_scale(scale, sharing, quantizer.highest))
        return fake_quantized(quantizer, x).to(x.dtype)


def _with_own_parameters(graph: Graph) -> Graph:
    """The same graph over copies of its parameters."""
    edit = GraphEdit(graph)
    copies: dict[int, nn.Parameter] = {}
    for module in edit.module.modules():
        for name, value in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            copy = copies.setdefault(id(value), nn.Parameter(value.detach().clone(), value.is_floating_point()))
            module.register_parameter(name, copy)
    return edit.finish(same_model=True)


def _hashed_again(graph: Graph) -> Graph:
    """The graph with the hash of its values: of the same architecture as before, so that plans stay valid."""
    for each in graph.module.parameters():
        each.grad = None
    values = ModelHash.of(graph.module, graph.found).values
    return replace(graph, model=ModelHash(graph.model.architecture, values))


def _cycled(examples: Examples) -> Iterator[tuple[Tensor, Any]]:
    for loop in count():
        empty = True
        for example in examples:
            empty = False
            yield example
        if empty:
            raise InputError("examples: wanted at least one batch to train with, got none" + (" again" if loop else ""))
