"""The weighted sum of named losses."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from denselab.errors import InputError


def check_weights(what: str, weights: Mapping[str, float]) -> None:
    """Raises InputError unless all weights are finite and at least 0, and one is above."""
    values = weights.values()
    if not all(0 <= value < math.inf for value in values) or not any(values):
        given = ", ".join(f"{name}={value:g}" for name, value in weights.items())
        raise InputError(f"{what} weights: wanted numbers >= 0, one of them above 0, got {given}")


def weighted_sum(
    losses: Mapping[str, Callable[[], Tensor]], weights: Mapping[str, float]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of weight * loss, and each loss by name, unweighted and detached; those of weight 0 are not computed."""
    parts = {name: loss() for name, loss in losses.items() if weights[name] > 0}
    total = torch.stack([weights[name] * part for name, part in parts.items()]).sum()
    return total, {name: part.detach() for name, part in parts.items()}
