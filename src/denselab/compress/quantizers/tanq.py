"""TanQ-style quantization of numbers 0..scale: codes are dense near 0 and near the scale.

Yang et al.: DopQ-ViT, arXiv:2408.03291, gives the idea, a quantizer through a tangent that serves the many attention
values near 0 and the few, important ones near 1. Neither its formula nor its code was at hand: this formula is our own
completion, hence "style". With u = x / s in 0..1, T = tan(theta) and L = 2^bits:
g(u) = 1/2 + tan((2u - 1) theta) / (2T), c = round((L - 1) g(u)), x^ = s (1/2 + atan((2c / (L - 1) - 1) T) / (2 theta)).
As theta goes to 0 this is the uniform quantizer; 0 and s are hit exactly.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from denselab.compress.quantizers.checks import check_bits, check_positive, prepared
from denselab.errors import InputError


@dataclass(frozen=True, eq=False)
class TanQ:
    """A grid through a tangent on 0..scale.

    scale: above 0. theta: radians above 0 and below pi / 2, how dense the ends are. Both broadcastable to the data.
    Raises InputError for other widths, scales and angles.
    """

    scale: Float[Tensor, "..."]
    theta: Float[Tensor, "..."]
    bits: int

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_positive("scale", self.scale)
        check_positive("theta", self.theta)
        if not torch.compiler.is_compiling() and (self.theta >= math.pi / 2).any():
            raise InputError(f"theta: wanted radians below pi / 2, got {self.theta.max().item():g}")

    @property
    def levels(self) -> int:
        """How many codes there are."""
        return 2**self.bits

    def codes(self, x: Float[Tensor, "..."]) -> Int[Tensor, "..."]:
        """int32 codes 0..levels - 1; numbers outside 0..scale get its ends. Raises InputError for NaN, infinity."""
        share = (prepared(x, self.scale) / self.scale).clamp(0, 1)
        bent = torch.tan((2 * share - 1) * self.theta) / self.theta.tan()
        return ((bent + 1) / 2 * (self.levels - 1)).round().clamp(0, self.levels - 1).to(torch.int32)

    def values(self, codes: Int[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The numbers that codes stand for, in the dtype of the scale."""
        tangent = self.theta.tan()
        bent = codes.to(self.scale.dtype) * (2 / (self.levels - 1)) - 1
        # atan(T) rather than theta: a number divided by itself, so that the ends are exactly 0 and the scale.
        return (torch.atan(bent * tangent) / torch.atan(tangent) + 1) / 2 * self.scale

    def bounds(self) -> tuple[Tensor, Tensor]:
        """0 and the scale."""
        return torch.zeros_like(self.scale), self.scale
