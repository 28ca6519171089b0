"""Logarithmic quantization of numbers 0..scale, as softmax gives them: powers of two, and of the root of two.

log2: c = round(-log2(x / s)), x^ = s 2^-c (Miyashita et al. 2016, arXiv:1603.01025; FQ-ViT, Lin et al. 2022,
arXiv:2111.13824, for softmax). log-sqrt2: c = round(-2 log2(x / s)), x^ = s 2^-(c / 2), computed as
s 2^-ceil(c / 2) (1 + (sqrt(2) - 1) (c mod 2)): a shift, and one of two scales by the parity of the code (RepQ-ViT, Li
et al. ICCV 2023, arXiv:2212.08254; zkkli/RepQ-ViT@a160561 classification/quant/quantizer.py).

Zero needs a code. The published codes send every c >= 2^bits to exactly 0 beside the 2^bits powers that they keep:
2^bits + 1 levels, one more than the bits they are named for can tell apart. Here the last code is 0, and `ZeroCode`
says whether it is the last of the 2^bits or one more.
"""

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from denselab.compress.quantizers.checks import check_bits, check_positive, prepared

_SQRT2 = 2**0.5


class ZeroCode(Enum):
    """Which code stands for exactly 0 in a logarithmic quantizer.

    LAST: the last of 2^bits, so that a code fits its bits. EXTRA: one more than those, as in the published
    simulations of RepQ-ViT and AdaLog: a code takes one bit more than the name says.
    """

    LAST = "the last of 2^bits"
    EXTRA = "one more than 2^bits"


def level_count(bits: int, zero: ZeroCode) -> int:
    """Codes of a logarithmic quantizer, zero's among them."""
    return 2**bits + (zero is ZeroCode.EXTRA)


def nearest_codes(exponents: Float[Tensor, "..."], levels: int) -> Int[Tensor, "..."]:
    """Exponents rounded to codes 0..levels - 1; what is too small for the others gets the last one, which means 0."""
    return exponents.round().clamp_(0, levels - 1).to(torch.int32)


@dataclass(frozen=True, eq=False)
class _Powers:
    """Equal steps of the logarithm below the scale, and 0; scale above 0, broadcastable to the data."""

    steps_per_octave: ClassVar[int]

    scale: Float[Tensor, "..."]
    bits: int
    zero: ZeroCode = ZeroCode.LAST

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_positive("scale", self.scale)

    @property
    def levels(self) -> int:
        """How many codes there are."""
        return level_count(self.bits, self.zero)

    def codes(self, x: Float[Tensor, "..."]) -> Int[Tensor, "..."]:
        """int32 codes 0..levels - 1; numbers above the scale count as the scale, below 0 as 0. Raises InputError."""
        ratio = (prepared(x, self.scale) / self.scale).clamp(min=0)
        return nearest_codes(-ratio.log2() * self.steps_per_octave, self.levels)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """0 and the scale."""
        return torch.zeros_like(self.scale), self.scale


@dataclass(frozen=True, eq=False)
class Log2(_Powers):
    """Powers of two below the scale, and 0. scale: above 0, broadcastable to the data. Raises InputError."""

    steps_per_octave = 1

    def values(self, codes: Int[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The numbers that codes stand for, in the dtype of the scale."""
        powers = torch.exp2(-codes.to(self.scale.dtype))
        return torch.where(codes == self.levels - 1, 0, powers * self.scale)


@dataclass(frozen=True, eq=False)
class LogSqrt2(_Powers):
    """Powers of the root of two below the scale, and 0. scale: above 0, broadcastable. Raises InputError."""

    steps_per_octave = 2

    def values(self, codes: Int[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The numbers that codes stand for, in the dtype of the scale: a shift, then the scale or its root 2 fold."""
        shifts, odd = (codes + 1) // 2, codes % 2
        powers = torch.exp2(-shifts.to(self.scale.dtype)) * torch.where(odd == 1, _SQRT2, 1.0).to(self.scale.dtype)
        return torch.where(codes == self.levels - 1, 0, powers * self.scale)
