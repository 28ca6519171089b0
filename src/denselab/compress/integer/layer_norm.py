"""I-LayerNorm: LayerNorm in integers, its root by Newton's iteration (I-ViT, Li & Gu, ICCV 2023, arXiv:2207.01405).

Section 3.3, eq. 19-20. Over C channels, with mean the rounded mean (half to even), y = q - mean and V = sum y^2:

    k <- floor((k + floor(V / k)) / 2), a fixed number of times from 2^16;    F = floor((2^31 - 1) / k)
    out = floor(y F / 2) + floor(beta / (gamma s)),    s = sqrt(C) / 2^30,    scale of channel c: gamma_c s

V and k are int64, all else int32: 2 sum q + C < 2^31 for C < 2^15 and 16-bit q; |y| <= k, so that |y F| <= 2^31 - 1.
Source: zkkli/I-ViT@380ba99 models/quantization_utils/quant_modules.py (IntLayerNorm), which as here takes sqrt(C) in
float32 and ignores LayerNorm's epsilon and the scale of its input. Deviations:
- 20 steps, of which 16 suffice up to 2^48. The published 10 do not reach the root where it is below about 180, and
  outputs are too small there.
- k never rises after the first step and is at least 1, so that it ends at floor(sqrt(V)), and V = 0 divides nothing.
- The published bias overflows where |beta / gamma| > sqrt(C), and divides by zero where gamma is 0. In such channels
  y F is shifted further right, `down` bits, and the scale is as much larger. Else `down` is 0.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from denselab.compress.integer.arrays import INT32_MOST, Integers, checked, int32, int64, like, row_sum
from denselab.errors import InputError

MOST_INPUT = 2**15
NEWTON_STEPS = 20
NEWTON_START = 2**16
_MOST_CHANNELS = 2**15 - 1
_MOST_BIAS = 2**30 - 1
_MOST_DOWN = 29


@dataclass(frozen=True, eq=False)
class IntegerLayerNorm:
    """Constants per channel. output_scale: what one code of that channel is, negative where its weight is."""

    bias: NDArray[np.int32]
    down: NDArray[np.int32]
    output_scale: NDArray[np.float64]
    steps: int = NEWTON_STEPS


def layer_norm_for(weight: NDArray[np.floating[Any]], bias: NDArray[np.floating[Any]]) -> IntegerLayerNorm:
    """Constants from LayerNorm's weight and bias [C]. Raises InputError for other shapes and for what is not finite."""
    if weight.ndim != 1 or weight.shape != bias.shape or not 1 <= len(weight) <= _MOST_CHANNELS:
        got = f"{list(weight.shape)} and {list(bias.shape)}"
        raise InputError(f"LayerNorm: wanted weight and bias of the same 1 to {_MOST_CHANNELS} channels, got {got}")
    if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
        raise InputError("LayerNorm: wanted a finite weight and bias, got nan or infinity")
    unit = float(np.sqrt(np.float32(len(weight)))) / 2**30
    each = [_channel(float(gamma), float(beta), unit) for gamma, beta in zip(weight, bias, strict=True)]
    offsets, down, scales = zip(*each, strict=True)
    return IntegerLayerNorm(np.array(offsets, np.int32), np.array(down, np.int32), np.array(scales, np.float64))


def _channel(gamma: float, beta: float, unit: float) -> tuple[int, int, float]:
    """Bias, `down` and scale: the published ones where the bias is within int32."""
    scale, least = gamma * unit, abs(beta) / _MOST_BIAS
    if scale and abs(scale) >= least:
        return math.floor(beta / gamma / unit), 0, scale
    if abs(scale) * 2**_MOST_DOWN <= least:  # nothing but the bias is left
        scale = least or unit
        return math.floor(beta / scale), _MOST_DOWN, scale
    down = math.ceil(math.log2(least / abs(scale)))
    scale *= 2.0**down
    return math.floor(beta / scale), down, scale


def integer_sqrt(squares: Integers, steps: int = NEWTON_STEPS) -> Integers:
    """Square root rounded down, at least 1, of int64 from 0 to 2^48, by a fixed number of Newton's steps."""
    root = ((squares // NEWTON_START + NEWTON_START) >> 1).clip(min=1)
    for _ in range(steps - 1):
        root = (root + ((squares // root - root) >> 1).clip(max=0)).clip(min=1)
    return root


def rounded_mean(q: Integers) -> Integers:
    """Mean over the last axis, rounded to the nearest, half to even."""
    count = int(q.shape[-1])
    total = row_sum(q)
    odd = (total // count) & 1
    return (total * 2 + (count - 1) + odd) // (2 * count)


def layer_norm(q: Integers, constants: IntegerLayerNorm) -> Integers:
    """LayerNorm over the last axis: codes of up to 16 bits -> int32 codes of scale `output_scale` per channel.

    Raises InputError for larger codes and other numbers of channels.
    """
    q = int32(checked("inputs of LayerNorm", q, MOST_INPUT))
    if q.shape[-1] != len(constants.bias):
        raise InputError(f"inputs of LayerNorm: wanted {len(constants.bias)} channels, got {q.shape[-1]}")
    centred = q - rounded_mean(q)
    wide = int64(centred)
    factor = int32(INT32_MOST // integer_sqrt(row_sum(wide * wide), constants.steps))
    return ((centred * factor) >> (like(constants.down, q) + 1)) + like(constants.bias, q)
