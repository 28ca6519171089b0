"""Traces of networks, so that two which differ in numbers alone are traced once: tracing is most of an export."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from onnx import ModelProto, TensorProto, numpy_helper
from torch import Tensor, nn


class Traces:
    """The last trace, for networks with the same operations.

    A trace holds parameters under their names. One that is not there as it is, but folded into a constant, has to be
    the same in both networks; else the other is traced too.
    """

    def __init__(self) -> None:
        self._operations: str | None = None
        self._values: dict[str, Tensor] = {}
        self._trace = ModelProto()

    def of(self, network: nn.Module, operations: str | None, trace: Callable[[], ModelProto]) -> ModelProto:
        """The trace of a network, which the caller may change.

        operations: what must be the same of two networks; None where numbers are part of the operations.
        """
        values = {name: value.detach() for name, value in (*network.named_parameters(), *network.named_buffers())}
        known = operations is not None and operations == self._operations
        others = self._others(values) if known else None
        if others is None:
            others = {}
            self._operations, self._values, self._trace = operations, values, trace()
        made = ModelProto()
        made.CopyFrom(self._trace)
        for stored in made.graph.initializer:
            if stored.name in others:
                stored.CopyFrom(numpy_helper.from_array(others[stored.name].cpu().contiguous().numpy(), stored.name))
        return made

    def _others(self, values: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """The numbers to put into the trace; None where that cannot be done."""
        if values.keys() != self._values.keys():
            return None
        stored = {each.name: each for each in self._trace.graph.initializer}
        found: dict[str, Tensor] = {}
        for name, value in values.items():
            before = self._values[name]
            if value.shape != before.shape or value.dtype != before.dtype:
                return None
            if not torch.equal(value, before):
                if name not in stored or not _holds(stored[name], before):
                    return None
                found[name] = value
        return found


def _holds(stored: TensorProto, value: Tensor) -> bool:
    return np.array_equal(numpy_helper.to_array(stored), value.cpu().numpy())
