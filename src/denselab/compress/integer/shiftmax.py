"""Shiftmax: softmax in integers (I-ViT, Li & Gu, ICCV 2023, arXiv:2207.01405, section 3.3, algorithm 1).

With e the shift exponential, n = 15, of q minus its row's maximum, and S = min(sum e, 2^31 - 1):

    F = floor((2^31 - 1) / S),    p = (e F) >> (32 - bits),    of scale 2^-(bits - 1)

int32 but for the sum, which is int64 until it is capped: e F < 2^31, as e <= S. Rounding is down, twice: codes end at
2^(bits - 1) - 1, and a row may sum to less than one. The second costs at most -x0 / 512 codes of 8 bits, and so does
the cap. Source: zkkli/I-ViT@380ba99 models/quantization_utils/quant_modules.py (IntSoftmax).
"""

from dataclasses import dataclass

from denselab.compress.integer.arrays import INT32_MOST, Integers, checked, int32, int64, row_max, row_sum
from denselab.compress.integer.shift_exp import ShiftExp, shift_exp, shift_exp_for
from denselab.errors import InputError

MOST_INPUT = 2**30
SHIFT = 15


@dataclass(frozen=True)
class Shiftmax:
    """Constants of a Shiftmax for one scale of its input."""

    exp: ShiftExp
    output_bits: int

    @property
    def output_scale(self) -> float:
        """What one code of the output is."""
        return 2.0 ** -(self.output_bits - 1)


def shiftmax_for(scale: float, output_bits: int = 8, as_published: bool = False) -> Shiftmax:
    """Constants for logits of this scale; as_published: with the published exponential (see shift_exp.py).

    Raises InputError for a scale that is no positive number or too fine for int32, and for bits other than 2 to 16.
    """
    check_bits(output_bits)
    return Shiftmax(shift_exp_for(scale, SHIFT, as_published), output_bits)


def check_bits(output_bits: int) -> None:
    """Raises InputError for bits that probabilities in int32 cannot have."""
    if not 2 <= output_bits <= 16:
        raise InputError(f"output_bits: wanted 2 to 16, got {output_bits}")


def shiftmax(q: Integers, constants: Shiftmax) -> Integers:
    """Softmax over the last axis: logits in codes of magnitude up to 2^30 -> probabilities in codes, int32.

    Raises InputError for larger codes.
    """
    q = int32(checked("logits", q, MOST_INPUT))
    exps = shift_exp(q - row_max(q), constants.exp)
    total = int32(row_sum(int64(exps)).clip(max=INT32_MOST))
    return (exps * (INT32_MOST // total)) >> (32 - constants.output_bits)
