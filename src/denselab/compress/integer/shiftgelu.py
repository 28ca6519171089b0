"""ShiftGELU: x sigmoid(1.702 x) in int32 (I-ViT, Li & Gu, ICCV 2023, arXiv:2207.01405, section 3.3, algorithm 2).

For any m, sigmoid = e^(x - m) / (e^(x - m) + e^-m), by shift exponentials in which 1.702 is part of the scale (so does
the code; the paper multiplies by shifts), and by the division of shiftmax.py. GELU is q times its code, at scale
s 2^-(bits - 1). Both exponentials add up below 2^31, and |q| 2^(bits - 1) stays within it for |q| <= 2^(31 - bits).
Source: zkkli/I-ViT@380ba99 models/quantization_utils/quant_modules.py (IntGELU).

Deviations, all undone by `as_published`, as the published formula is wrong by more than its codes' resolution:
- m is max(x, 0) of each element, so that one of the two exponentials is e^0. The published m is the maximum of the row:
  where that is large, both are cut off at 2^-n, and the sigmoid of a negative x is one half (at x = -25 beside x = 25,
  GELU is -12.5). In a row of negative values it takes the exponential of a positive number; m is at least 0 here.
- n is 12, not 23: the sum is then far below 2^31, and F keeps its precision. With 23, F is 1 where 1.7 was meant.
- The published sum is capped at 2^31 - 1, but the exponentials are not: for 1.702 s < 1 / 127 it finds sigmoids above
  one. Such a scale is refused with `as_published`, and needs nothing without (see shift_exp.py).
"""

from dataclasses import dataclass

from denselab.compress.integer.arrays import INT32_MOST, Integers, checked, int32, row_max
from denselab.compress.integer.shift_exp import ShiftExp, shift_exp, shift_exp_for
from denselab.compress.integer.shiftmax import check_bits

_SIGMOID = 1.702
_SHIFT = 12
_PUBLISHED_SHIFT = 23


@dataclass(frozen=True)
class ShiftGELU:
    """Constants. output_scale: what one code of the output is. row_maximum: m is that of the row, as published."""

    exp: ShiftExp
    output_bits: int
    output_scale: float
    row_maximum: bool

    @property
    def most_input(self) -> int:
        """Greatest magnitude of an input of which no output overflows."""
        return 2 ** (31 - self.output_bits)


def shiftgelu_for(scale: float, output_bits: int = 8, as_published: bool = False) -> ShiftGELU:
    """Constants for inputs of this scale; output_bits: those of the sigmoid.

    Raises InputError for a scale that is no positive number or too fine for int32, and for bits other than 2 to 16.
    """
    check_bits(output_bits)
    exp = shift_exp_for(scale * _SIGMOID, _PUBLISHED_SHIFT if as_published else _SHIFT, as_published)
    return ShiftGELU(exp, output_bits, scale * 2.0 ** -(output_bits - 1), row_maximum=as_published)


def shiftgelu(q: Integers, constants: ShiftGELU) -> Integers:
    """GELU of codes, int32. Raises InputError for codes beyond `most_input`."""
    q = int32(checked("inputs of GELU", q, constants.most_input))
    top = (row_max(q) if constants.row_maximum else q).clip(min=0)
    exps, exps_of_zero = shift_exp(q - top, constants.exp), shift_exp(-top, constants.exp)
    sigmoids = (exps * (INT32_MOST // (exps + exps_of_zero))) >> (32 - constants.output_bits)
    return q * sigmoids
