"""SULQ, the shift-uniform-log2 quantizer of I&S-ViT: lift by eta, quantize the logarithm uniformly, round to powers.

Zhong et al.: I&S-ViT, arXiv:2311.10126; zysxmu/IaS-ViT@9300cea quant/quantizer.py (there it bears the name
LogSqrt2Quantizer). With t = log2(x + eta) and d = (max t - min t) / (2^bits - 1): c = round((t - min t) / d),
x^ = 2^round(c d + min t) - eta.

The published code searches eta with these 2^bits levels, but runs with d = (max t - min t) / 2^bits and codes up to
2^bits: one level more than fits the bits. Ours has 2^bits levels in both. Since exponents are rounded, only about
log2(1 / eta) of the numbers differ, at any width.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from denselab.compress.quantizers.checks import check_bits, check_finite, check_positive, prepared
from denselab.errors import InputError


@dataclass(frozen=True, eq=False)
class Sulq:
    """Powers of two from 2^min_log2 to 2^max_log2, moved down by eta.

    eta: above 0. min_log2, max_log2: range of log2(x + eta) seen in calibration. All broadcastable to the data.
    Raises InputError for other widths, eta not above 0, and a range that ends below its start.
    """

    eta: Float[Tensor, "..."]
    min_log2: Float[Tensor, "..."]
    max_log2: Float[Tensor, "..."]
    bits: int

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_positive("eta", self.eta)
        check_finite("min_log2", self.min_log2)
        check_finite("max_log2", self.max_log2)
        if not torch.compiler.is_compiling() and (self.max_log2 < self.min_log2).any():
            raise InputError("max_log2: wanted at least min_log2, got less")

    @property
    def levels(self) -> int:
        """How many codes there are."""
        return 2**self.bits

    @property
    def step(self) -> Float[Tensor, "..."]:
        """Octaves per code; 1 where the range has no width."""
        step = (self.max_log2 - self.min_log2) / (self.levels - 1)
        return torch.where(step > 0, step, 1)

    def codes(self, x: Float[Tensor, "..."]) -> Int[Tensor, "..."]:
        """int32 codes 0..levels - 1; numbers outside the range get its ends. Raises InputError for NaN, infinity."""
        lifted = (prepared(x, self.eta) + self.eta).clamp(min=0)
        steps = (lifted.log2() - self.min_log2) / self.step
        return steps.round_().clamp_(0, self.levels - 1).to(torch.int32)

    def values(self, codes: Int[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The numbers that codes stand for, in the dtype of eta."""
        return torch.exp2(self.exponents(codes).to(self.eta.dtype)) - self.eta

    def exponents(self, codes: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """The whole powers of two that codes stand for, int32: x^ + eta = 2^exponent, a shift."""
        return (codes * self.step + self.min_log2).round().to(torch.int32)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """The ends of the range of calibration."""
        return torch.exp2(self.min_log2) - self.eta, torch.exp2(self.max_log2) - self.eta
