"""AdaRound: to the step below or above, as is learned (Nagel et al., ICML 2020, arXiv:2004.10568).

A weight lies a share h = clip(1.2 sigmoid(V) - 0.1, 0, 1) of a step above the step below it; the regulariser
1 - |2 h - 1|^beta, beta falling from 20 to 2, drives every share to 0 or 1.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from denselab.compress.quantizers import Quantizer, Uniform

_STRETCH_LOW, _STRETCH_HIGH = -0.1, 1.1


@dataclass(frozen=True)
class AdaRound:
    """Weights stay between two steps of their grid until they choose one.

    rate: of Adam, of V. strength: of the regulariser, beside an error that starts at 1. warm_up: share of the steps
    without it.
    """

    rate: float
    strength: float = 1.0
    warm_up: float = 0.2
    first_beta: float = 20.0
    last_beta: float = 2.0

    def beta(self, done: float) -> float:
        """The exponent when a share of the steps is done, falling linearly after the warm-up."""
        left = (1 - done) / (1 - self.warm_up)
        return self.last_beta + (self.first_beta - self.last_beta) * min(max(left, 0), 1)


def rounding_logits(rest: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """V at which h is what rounding down leaves over, 0 to 1."""
    return -((_STRETCH_HIGH - _STRETCH_LOW) / (rest - _STRETCH_LOW) - 1).log()


def rounded_up(logits: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """h, the share of a step that is rounded up: the rectified sigmoid (AdaRound, eq. 23)."""
    return (logits.sigmoid() * (_STRETCH_HIGH - _STRETCH_LOW) + _STRETCH_LOW).clamp(0, 1)


def undecided(share: Float[Tensor, "..."], beta: float) -> Float[Tensor, ""]:
    """The regulariser: 0 where all shares are 0 or 1 (AdaRound, eq. 24)."""
    return (1 - (2 * share - 1).abs().pow(beta)).sum()


def rounded(quantizer: Uniform, weight: Float[Tensor, "..."], share: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The weight a share of a step above the step below it, within the grid."""
    zero = torch.tensor(0) if quantizer.zero_point is None else quantizer.zero_point
    steps = (weight / quantizer.scale).floor() + share
    return steps.clamp(quantizer.lowest - zero, quantizer.highest - zero) * quantizer.scale


def left_over(quantizer: Quantizer, weight: Tensor) -> Tensor:
    """What rounding weights down leaves over, in steps."""
    assert isinstance(quantizer, Uniform)
    steps = weight.detach() / quantizer.scale
    return steps - steps.floor()
