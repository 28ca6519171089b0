"""Exponential of integers by shifts: ShiftExp of I-ViT (Li & Gu, ICCV 2023, arXiv:2207.01405, section 3.3, eq. 10-14).

e^(s q) for q <= 0 is 2^(s q log2 e), log2 e about 1.0111 in binary, so that q log2 e = q + (q >> 1) - (q >> 4). With
minus one in codes, x0 = floor(-1 / s), the exponent splits into whole steps k = floor(q / x0) and a rest
r = q - x0 k, of which 2^(s r) is taken as the line 1 + s r / 2. In units of s 2^-n:

    exp(q) = floor((r / 2 - x0) 2^(n - k)) = ((r - 2 x0) << n) >> (k + 1)

k is at most n: what lies below becomes about 2^-n. Source: zkkli/I-ViT@380ba99 models/quantization_utils, in
quant_modules.py (IntSoftmax, IntGELU). The published code computes in float32, where 2^31 - 1 becomes 2^31; this is
its integer meaning.

Deviation: x0 is an integer, so that the published exponential of codes of scale 0.3 has the base e^0.83. Here codes are
first shifted left or right until x0 is 64 to 128. `as_published` leaves them as they are.
"""

import math
from dataclasses import dataclass

from denselab.compress.integer.arrays import INT32_MOST, Integers
from denselab.errors import InputError

_LEAST_UNIT = 64
_MOST_UP = 12
_LEAST_UP = -24


@dataclass(frozen=True)
class ShiftExp:
    """x0: minus one in codes. up: bits by which codes are shifted left first, right if negative. shift: n above."""

    x0: int
    up: int
    shift: int

    @property
    def lowest(self) -> int:
        """Where exponentials are cut off, in codes after `up`."""
        return self.shift * self.x0


def shift_exp_for(scale: float, shift: int, as_published: bool) -> ShiftExp:
    """Constants for codes of this scale and exponentials of `shift` fraction bits.

    Raises InputError for a scale that is no positive number, and where int32 would overflow.
    """
    if not (math.isfinite(scale) and scale > 0):
        raise InputError(f"scale: wanted a positive number, got {scale}")
    up = 0 if as_published else min(max(math.ceil(math.log2(_LEAST_UNIT * scale)), _LEAST_UP), _MOST_UP)
    x0 = math.floor(-1 / scale) if as_published else -max(1, round(2.0**up / scale))
    if -x0 << (shift + 1) > INT32_MOST:
        raise InputError(f"scale: {scale:g} is too fine for exponentials of {shift} fraction bits in int32")
    return ShiftExp(x0, up, shift)


def shift_exp(q: Integers, exp: ShiftExp) -> Integers:
    """Integers from -2^31 to 0, int32 -> exponentials, int32, at most -x0 2^n, which is that of 0."""
    q = q.clip(min=exp.lowest >> exp.up) << exp.up if exp.up >= 0 else q >> -exp.up
    q = q.clip(min=exp.lowest)
    q = (q + (q >> 1) - (q >> 4)).clip(min=exp.lowest)
    steps = q // exp.x0
    rest = q - steps * exp.x0
    return ((rest - 2 * exp.x0) << exp.shift) >> (steps + 1)
