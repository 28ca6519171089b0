"""AdaLog: a logarithmic quantizer whose base is fitted, dequantized by two small integer tables and a shift.

Wu et al.: AdaLog: Post-Training Quantization for Vision Transformers with Adaptive Logarithm Quantizer, ECCV 2024,
arXiv:2407.12951; GoatWu/AdaLog@75a57d2 quantizers/logarithm.py. Base 2^(q / r), r = 37:
k = round(-log2(x / s) r / q), x^ = s 2^(-k q / r). With k q = r T1[k] + rest, x^ = s 2^-T1[k] T2[k], where
T2[k] = 2^(-rest / r) is rounded to multiples of 1 / (2^(bits + 1) - 2).

Zero is the last code, see `ZeroCode`; its mantissa is 0. Zeros of the data reach it unless
(2^bits - 1) q / r > 49.8: x / s is at least 1e-15, as published.
"""

from dataclasses import dataclass, field
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from denselab.compress.quantizers.checks import check_bits, check_finite, check_positive, prepared
from denselab.compress.quantizers.logarithm import ZeroCode, level_count, nearest_codes
from denselab.errors import InputError

DENOMINATOR = 37
_LEAST_RATIO = 1e-15


@dataclass(frozen=True, eq=False)
class AdaLog:
    """Powers of 2^(-q / 37) times the scale, and 0, moved down by the shift.

    scale: above 0. q: integers from 1, int32 or int64. shift: added before and taken off after, so that the negative
    tail of a GELU can be reached (0.17). All broadcastable to the data.
    Quantizing twice changes nothing while q / 74 > log2(1 + 1 / (2^(bits + 1) - 2)), the rounding of T2.
    Raises InputError for other widths, scales, and q.
    """

    scale: Float[Tensor, "..."]
    q: Int[Tensor, "..."]
    bits: int
    shift: Float[Tensor, "..."] = field(default_factory=lambda: torch.zeros(()))
    zero: ZeroCode = ZeroCode.LAST

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_positive("scale", self.scale)
        check_finite("shift", self.shift)
        if self.q.dtype not in (torch.int32, torch.int64):
            raise InputError(f"q: wanted integers (int32 or int64), got {self.q.dtype}")
        check_positive("q", self.q)

    @property
    def levels(self) -> int:
        """How many codes there are."""
        return level_count(self.bits, self.zero)

    @property
    def mantissa_unit(self) -> int:
        """What the mantissas of T2 are divided by: 2^(bits + 1) - 2, so that each takes bits + 1 bits."""
        return 2 ** (self.bits + 1) - 2

    def codes(self, x: Float[Tensor, "..."]) -> Int[Tensor, "..."]:
        """int32 codes 0..levels - 1; numbers outside the range get its ends. Raises InputError for NaN, infinity."""
        ratio = ((prepared(x, self.scale) + self.shift) / self.scale).clamp(_LEAST_RATIO, 1.0)
        return nearest_codes(-ratio.log2() * DENOMINATOR / self.q, self.levels)

    def values(self, codes: Int[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The numbers that codes stand for, in the dtype of the scale."""
        return self.shifted_values(codes) - self.shift

    def shifted_values(self, codes: Int[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The same before the shift is taken off, for a next layer whose bias does it (`bias_without_shift`)."""
        exponents, mantissas = self._table_entries(codes)
        dtype = self.scale.dtype
        return torch.exp2(-exponents.to(dtype)) * (mantissas.to(dtype) / self.mantissa_unit) * self.scale

    def tables(self) -> tuple[Int[Tensor, "levels ..."], Int[Tensor, "levels ..."]]:
        """T1 and the mantissas of T2 per code, int32 [levels, *shape of q]: x^ + shift = s T2 / unit 2^-T1."""
        codes = torch.arange(self.levels, dtype=torch.int32, device=self.q.device)
        return self._table_entries(codes.view(-1, *(1 for _ in self.q.shape)))

    def bounds(self) -> tuple[Tensor, Tensor]:
        """The least and the greatest number of the grid."""
        return -self.shift, self.scale - self.shift

    def _table_entries(self, codes: Int[Tensor, "..."]) -> tuple[Tensor, Tensor]:
        steps = codes * self.q.to(torch.int32)
        by_rest = torch.tensor(_mantissas(self.mantissa_unit), dtype=torch.int32, device=codes.device)
        mantissas = torch.where(codes == self.levels - 1, 0, by_rest[steps % DENOMINATOR])
        return steps // DENOMINATOR, mantissas


@cache
def _mantissas(unit: int) -> tuple[int, ...]:
    return tuple(round(2 ** (-rest / DENOMINATOR) * unit) for rest in range(DENOMINATOR))
