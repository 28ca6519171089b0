"""A quantized network, simulated in torch: every planned site passes through its quantizer and back to numbers.

The integers are those that an export writes: it reads the same quantizers, and the codes of the weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, assert_never

import torch
from jaxtyping import Int
from torch import Tensor, nn

from denselab.compress.graph import Graph, Hook
from denselab.compress.observing import weights
from denselab.compress.plan import Grid, QuantPlan
from denselab.compress.quantizers import (
    AdaLog,
    Log2,
    LogSqrt2,
    Quantizer,
    Sulq,
    TanQ,
    Ternary,
    Uniform,
    ZeroCode,
    fake_quantized,
    quantized,
)
from denselab.compress.sites import ModelHash
from denselab.compress.tensor_file import read_tensors, write_tensors
from denselab.errors import InputError

QUANTIZERS_FORMAT = 1


@dataclass(frozen=True, eq=False)
class QuantizedGraph:
    """A network and the quantizers of its sites, fitted as a plan says.

    graph: with whatever a method folded into its parameters; in float it says what the model says.
    Raises InputError where the quantizers are not those of the plan: another site, grid or width.
    """

    graph: Graph
    plan: QuantPlan
    quantizers: Mapping[str, Quantizer]
    _weights: dict[str, Tensor] = field(default_factory=dict[str, Tensor], init=False, repr=False)

    def __post_init__(self) -> None:
        self.plan.check(self.graph.site_list())
        for key in self.plan.specs.keys() ^ self.quantizers.keys():
            raise InputError(f"quantizers: wanted one for every site of the plan, and no other; mend {key!r}")
        for key, spec in self.plan.specs.items():
            got = self.quantizers[key]
            if grid_of(got) is not spec.grid or got.bits != spec.bits:
                raise InputError(
                    f"{key}: wanted a quantizer of {spec.bits} bits on the grid {spec.grid.value}, as the plan says, "
                    f"got {got.bits} bits on {grid_of(got).value}"
                )

    def run(self, *inputs: Tensor) -> Any:
        """What the quantized model returns.

        Weights are quantized in the first run and kept. Raises InputError for sizes the graph is not free for, and
        naming the site for NaN and infinity in it.
        """
        sites = self.graph.found.by_key
        hooks: dict[str, Hook] = {
            key: partial(self._kept if sites[key].is_weight else self._checked, key) for key in self.quantizers
        }
        return self.graph.run(*inputs, hooks=hooks)

    def trainable_hooks(self) -> dict[str, Hook]:
        """Hooks for `Graph.run` through which gradients reach weights, scales and the image (straight through)."""
        return {key: partial(fake_quantized, quantizer) for key, quantizer in self.quantizers.items()}

    def as_module(self) -> nn.Module:
        """A module with the forward of the model, for what evaluates modules."""
        return _Simulated(self)

    def weight_codes(self) -> dict[str, Int[Tensor, "..."]]:
        """The integers of every planned weight by key, int32."""
        found = weights(self.graph)
        return {key: self.quantizers[key].codes(found[key]).cpu() for key in self.quantizers if key in found}

    def write(self, path: Path) -> None:
        """All quantizers and the codes of weights ("KEY:codes", int8 or uint8), as safetensors, atomically."""
        tensors: dict[str, Tensor] = {}
        entries: dict[str, dict[str, Any]] = {}
        for key, quantizer in self.quantizers.items():
            entries[key] = {"grid": grid_of(quantizer).value, "bits": quantizer.bits}
            if isinstance(quantizer, Log2 | LogSqrt2 | AdaLog):
                entries[key]["zero"] = quantizer.zero.name
            for name, value in _tensors(quantizer).items():
                tensors[f"{key}:{name}"] = value.clone()  # sites may share a quantizer, files may not share memory
        for key, codes in self.weight_codes().items():
            tensors[f"{key}:codes"] = codes.to(torch.int8 if codes.amin() < 0 else torch.uint8)
        about = {"method": self.plan.method, "quantizers": entries}
        write_tensors(path, tensors, about, self.graph.model, QUANTIZERS_FORMAT)

    def _kept(self, key: str, weight: Tensor) -> Tensor:
        if key not in self._weights:
            self._weights[key] = self._checked(key, weight).detach()
        return self._weights[key]

    def _checked(self, key: str, x: Tensor) -> Tensor:
        try:
            return quantized(self.quantizers[key], x).to(x.dtype)
        except InputError as error:
            raise InputError(f"{key}: {error}") from error


def read_quantizers(path: Path, model: ModelHash) -> dict[str, Quantizer]:
    """The quantizers that `QuantizedGraph.write` saved for a model, by key of the site.

    Raises InputError, naming the file: missing, damaged, a newer format, of another model or of other weights.
    """

    def built(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Quantizer]:
        return {key: _quantizer(key, entry, tensors) for key, entry in about["quantizers"].items()}

    return read_tensors(path, model, QUANTIZERS_FORMAT, built, "the quantizers of a model")


def grid_of(quantizer: Quantizer) -> Grid:
    """The grid that a quantizer has."""
    match quantizer:
        case Uniform():
            return Grid.UNIFORM
        case Log2():
            return Grid.LOG2
        case LogSqrt2():
            return Grid.LOG_SQRT2
        case AdaLog():
            return Grid.ADALOG
        case Sulq():
            return Grid.SULQ
        case TanQ():
            return Grid.TANQ
        case Ternary():
            return Grid.TERNARY
        case _:
            assert_never(quantizer)


def _tensors(quantizer: Quantizer) -> dict[str, Tensor]:
    """The parameters of a quantizer by name."""
    values = {each.name: getattr(quantizer, each.name) for each in fields(quantizer)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def _quantizer(key: str, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Quantizer:
    def of(name: str) -> Tensor:
        return tensors[f"{key}:{name}"]

    bits = entry["bits"]
    match Grid(entry["grid"]):
        case Grid.UNIFORM:
            return Uniform(of("scale"), tensors.get(f"{key}:zero_point"), bits)
        case Grid.LOG2:
            return Log2(of("scale"), bits, ZeroCode[entry["zero"]])
        case Grid.LOG_SQRT2:
            return LogSqrt2(of("scale"), bits, ZeroCode[entry["zero"]])
        case Grid.ADALOG:
            return AdaLog(of("scale"), of("q"), bits, of("shift"), ZeroCode[entry["zero"]])
        case Grid.SULQ:
            return Sulq(of("eta"), of("min_log2"), of("max_log2"), bits)
        case Grid.TANQ:
            return TanQ(of("scale"), of("theta"), bits)
        case Grid.TERNARY:
            return Ternary(of("scale"), of("threshold"))


class _Simulated(nn.Module):
    """The forward of a quantized graph."""

    def __init__(self, quantized_graph: QuantizedGraph) -> None:
        super().__init__()
        self.network = quantized_graph.graph.module
        self._run = quantized_graph.run

    def forward(self, *inputs: Tensor) -> Any:
        """What the quantized model returns."""
        return self._run(*inputs)
