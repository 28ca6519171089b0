"""Shiftmax: softmax in integers (I-ViT, Li & Gu, ICCV 2023, arXiv:2207.01405, section 3.3, algorithm 1).

With e the shift exponential, n = 15, of q minus its row's maximum, and S = sum e:

    F = floor((2^46 - 1) / S),    p = (e F) >> (47 - bits),    of scale 2^-(bits - 1)

e F < 2^46, as e <= S. Rounding is down, twice: codes end at 2^(bits - 1) - 1, and a row sums to less than one.
Source: zkkli/I-ViT@380ba99 models/quantization_utils/quant_modules.py (IntSoftmax).

Deviation, undone by `as_published`: the published F is floor((2^31 - 1) / S), with S capped there, for an int32
product. In a flat row of 200 codes S is near 2^30, F is 2 where 2.6 was meant, and the row sums to 0.8. The product
here is int64, as that of a requantization.
"""

from dataclasses import dataclass

from denselab.compress.integer.arrays import Integers, checked, int32, int64, row_max, row_sum
from denselab.compress.integer.shift_exp import ShiftExp, shift_exp, shift_exp_for
from denselab.errors import InputError

MOST_INPUT = 2**30
SHIFT = 15
_RECIPROCAL_BITS = 46
_PUBLISHED_RECIPROCAL_BITS = 31


@dataclass(frozen=True)
class Shiftmax:
    """Constants of a Shiftmax for one scale of its input. reciprocal_bits: F is so many ones over the sum."""

    exp: ShiftExp
    output_bits: int
    reciprocal_bits: int

    @property
    def output_scale(self) -> float:
        """What one code of the output is."""
        return 2.0 ** -(self.output_bits - 1)


def shiftmax_for(scale: float, output_bits: int = 8, as_published: bool = False) -> Shiftmax:
    """Constants for logits of this scale; as_published: with the published F and exponential (see shift_exp.py).

    Raises InputError for a scale that is no positive number or too fine for int32, and for bits other than 2 to 16.
    """
    check_bits(output_bits)
    exp = shift_exp_for(scale, SHIFT, as_published)
    return Shiftmax(exp, output_bits, _PUBLISHED_RECIPROCAL_BITS if as_published else _RECIPROCAL_BITS)


def check_bits(output_bits: int) -> None:
    """Raises InputError for bits that probabilities in int32 cannot have."""
    if not 2 <= output_bits <= 16:
        raise InputError(f"output_bits: wanted 2 to 16, got {output_bits}")


def shiftmax(q: Integers, constants: Shiftmax) -> Integers:
    """Softmax over the last axis: logits in codes of magnitude up to 2^30 -> probabilities in codes, int32.

    Raises InputError for larger codes.
    """
    q = int32(checked("logits", q, MOST_INPUT))
    exps = int64(shift_exp(q - row_max(q), constants.exp))
    one = 2**constants.reciprocal_bits - 1
    factor = one // row_sum(exps).clip(max=one)
    return int32((exps * factor) >> (constants.reciprocal_bits + 1 - constants.output_bits))
