"""An exponential moving average of weights."""

import copy

import torch
from torch import nn


class AveragedModel(nn.Module):
    """A copy of a model that follows it: average <- d * average + (1 - d) * weight after every step.

    d = min(decay, (1 + step) / (10 + step)), so that a short run does not average its random start (TensorFlow's
    ExponentialMovingAverage with num_updates). Floating-point buffers (batch norm statistics) are averaged too,
    counters are copied. The number of steps is part of the state.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.decay = decay
        self.steps = 0

    def get_extra_state(self) -> int:
        """The number of steps, for the state dict."""
        return self.steps

    def set_extra_state(self, state: int) -> None:
        """The inverse of `get_extra_state`."""
        self.steps = state

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights that `model` has now."""
        self.steps += 1
        weight = 1 - min(self.decay, (1 + self.steps) / (10 + self.steps))
        for average, now in zip(self.model.state_dict().values(), model.state_dict().values(), strict=True):
            if average.is_floating_point():
                average.lerp_(now.to(average.dtype), weight)
            else:
                average.copy_(now)
