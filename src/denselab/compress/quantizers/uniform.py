"""Uniform quantization, affine and symmetric, 2 to 8 bits, and its gradients as in learned step size quantization.

q = clip(round(x / s) + z, lowest, highest), x^ = s (q - z) (Jacob et al. 2018, arXiv:1712.05877, eq. 1; Nagel et al.
2021, arXiv:2106.08295). Ties round to even. Per tensor, per channel and per head follow from the shapes
of scale and zero point alone.
Gradients: Esser et al.: Learned Step Size Quantization (LSQ), ICLR 2020, arXiv:1902.08153: of the scale, v = x / s,
round(v) - v inside the range and its end outside; of the data, 1 inside and 0 outside.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from denselab.compress.quantizers.checks import check_bits, check_positive, prepared
from denselab.errors import InputError


@dataclass(frozen=True, eq=False)
class Uniform:
    """A grid of 2^bits equal steps.

    scale: above 0, broadcastable to the data. zero_point: integers that broadcast with it, the code of the number 0,
    codes 0..2^bits - 1; engines want it among the codes, nothing here does. None: symmetric, the number 0 has code 0,
    codes -2^(bits - 1)..2^(bits - 1) - 1.
    Raises InputError for other widths, scales that are not above 0, and zero points that are no integers.
    """

    scale: Float[Tensor, "..."]
    zero_point: Int[Tensor, "..."] | None
    bits: int

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_positive("scale", self.scale)
        if self.zero_point is not None and self.zero_point.is_floating_point():
            raise InputError(f"zero_point: wanted integers, got {self.zero_point.dtype}; round it first")

    @property
    def levels(self) -> int:
        """How many codes there are."""
        return 2**self.bits

    @property
    def lowest(self) -> int:
        """The least code."""
        return 0 if self.zero_point is not None else -(self.levels // 2)

    @property
    def highest(self) -> int:
        """The greatest code."""
        return self.lowest + self.levels - 1

    def codes(self, x: Float[Tensor, "..."]) -> Int[Tensor, "..."]:
        """int32 codes of numbers; those outside the range get its ends. Raises InputError for NaN and infinity."""
        # In place where the tensor is our own: allocation is most of the time on a CPU.
        steps = (prepared(x, self.scale) / self.scale).round_()
        if self.zero_point is not None:
            steps = steps + self.zero_point
        return steps.clamp_(self.lowest, self.highest).to(torch.int32)

    def values(self, codes: Int[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The numbers that codes stand for, in the dtype of the scale."""
        steps = codes if self.zero_point is None else codes - self.zero_point
        return steps.to(self.scale.dtype) * self.scale

    def bounds(self) -> tuple[Tensor, Tensor]:
        """The least and the greatest number of the grid."""
        low, high = self._steps_from_zero()
        return low * self.scale, high * self.scale

    def straight_through(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """`values(codes(x))` to the last bit, differentiable in x and scale as in LSQ; NaN stays NaN."""
        return _StraightThrough.apply(x.to(self.scale.dtype), self.scale, *self._steps_from_zero())

    def _steps_from_zero(self) -> tuple[Tensor, Tensor]:
        zero = torch.zeros((), dtype=torch.int32, device=self.scale.device)
        zero_point = zero if self.zero_point is None else self.zero_point
        low, high = self.lowest - zero_point, self.highest - zero_point
        return low.to(self.scale.dtype), high.to(self.scale.dtype)


class _StraightThrough(torch.autograd.Function):
    """Numbers on the grid, in as few passes over them as there can be: memory is what they cost."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
        steps = x / scale
        ctx.save_for_backward(steps, scale, low, high)
        return steps.round().clamp_(low, high).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        steps, scale, low, high = ctx.saved_tensors
        inside = (steps >= low).logical_and_(steps <= high)
        of_x = grad * inside if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return of_x, None, None, None
        per_scale = steps.round().clamp_(low, high).sub_(steps.mul(inside)).mul_(grad)
        return of_x, per_scale.sum_to_size(scale.shape), None, None


def lsq_scale(scale: Float[Tensor, "..."], elements: int, highest: int) -> Float[Tensor, "..."]:
    """The same scale; its gradient counts 1 / sqrt(elements * highest) (Esser et al. 2020,
    "step size gradient scale").

    elements: numbers that share one scale (features of an activation, weights). highest: the greatest code.
    """
    fixed = scale.detach()
    return fixed + (scale - fixed) * (elements * highest) ** -0.5
