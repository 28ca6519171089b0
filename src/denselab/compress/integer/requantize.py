"""Dyadic requantization: from int32 codes of one scale to few bits of another, by a multiplier and a shift.

in_scale / out_scale = m / 2^e with an int32 m of 31 significant bits (I-ViT, Li & Gu, ICCV 2023, arXiv:2207.01405,
eq. 6; after HAWQ-V3, arXiv:2011.10680, section 3.1). The product q m takes int64; it is rounded half to even.
Source: zkkli/I-ViT@380ba99 quant_utils.py (fixedpoint_mul, batch_frexp). Deviation: below 2^-31 a ratio keeps fewer
bits of m, so that e stays at most 62.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from denselab.compress.integer.arrays import Integers, checked, int32, int64, like
from denselab.errors import InputError

MOST_INPUT = 2**31
_MOST_SHIFT = 62


@dataclass(frozen=True, eq=False)
class Dyadic:
    """multiplier / 2^shift, for all or per channel of the last axis."""

    multiplier: NDArray[np.int64]
    shift: NDArray[np.int64]


def dyadic_for(in_scale: ArrayLike, out_scale: float) -> Dyadic:
    """The ratio of scales, one or per channel [C]. A negative input scale (a LayerNorm's weight) is allowed.

    Raises InputError for zero, for what is not finite, and for a ratio of 2^30 and more.
    """
    scales = np.asarray(in_scale, np.float64)
    ratio = scales / out_scale if out_scale else np.full_like(scales, np.inf)
    if not (np.isfinite(ratio).all() and out_scale > 0 and (ratio != 0).all()):
        raise InputError(f"scales: wanted finite ones other than 0, got {in_scale} to {out_scale}")
    if np.abs(ratio).max() >= 2**30:
        raise InputError(
            f"scales: wanted a ratio below 2^30, got {np.abs(ratio).max():g}; make the output scale larger"
        )
    mantissa, exponent = np.frexp(np.abs(ratio))
    shift = np.minimum(31 - exponent.astype(np.int64), _MOST_SHIFT)
    multiplier = np.floor(np.ldexp(mantissa, shift + exponent) + 0.5) * np.sign(ratio)
    return Dyadic(np.asarray(multiplier, np.int64), np.asarray(shift))


def rescale(q: Integers, dyadic: Dyadic) -> Integers:
    """q m / 2^e, rounded half to even, int64. Raises InputError for q beyond int32."""
    shift = like(dyadic.shift, q)
    product = int64(checked("accumulators", q, MOST_INPUT)) * like(dyadic.multiplier, q)
    half = like(np.left_shift(1, dyadic.shift - 1), q)
    return (product + (half - 1) + ((product >> shift) & 1)) >> shift


def clipped(x: Integers, bits: int) -> Integers:
    """Saturated to signed integers of so many bits, int32."""
    return int32(x.clip(min=-(2 ** (bits - 1)), max=2 ** (bits - 1) - 1))


def requantize(q: Integers, dyadic: Dyadic, bits: int = 8) -> Integers:
    """Codes of another scale, saturated to `bits`, int32."""
    return clipped(rescale(q, dyadic), bits)


def requantized_sum(q: Integers, dyadic: Dyadic, other: Integers, other_dyadic: Dyadic, bits: int = 8) -> Integers:
    """A residual sum: both addends at the output's scale, each rounded, added and saturated to `bits`, int32."""
    return clipped(rescale(q, dyadic) + rescale(other, other_dyadic), bits)
