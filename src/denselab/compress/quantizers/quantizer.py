"""What can be done with every quantizer: quantize, quantize with a gradient, count bits."""

from dataclasses import fields
from typing import assert_never

import torch
from jaxtyping import Float
from torch import Tensor

from denselab.compress.quantizers.adalog import AdaLog
from denselab.compress.quantizers.logarithm import Log2, LogSqrt2
from denselab.compress.quantizers.sulq import Sulq
from denselab.compress.quantizers.tanq import TanQ
from denselab.compress.quantizers.ternary import Ternary
from denselab.compress.quantizers.uniform import Uniform

Quantizer = Uniform | Log2 | LogSqrt2 | AdaLog | Sulq | TanQ | Ternary


def quantized(quantizer: Quantizer, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Numbers as the quantizer keeps them, in the dtype of its parameters. Raises InputError for NaN, infinity."""
    return quantizer.values(quantizer.codes(x))


def fake_quantized(quantizer: Quantizer, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """`quantized` to the last bit, with a gradient: 1 inside the quantizer's range and 0 outside (straight through).

    A uniform quantizer's scale gets its gradient too, that of LSQ (see `uniform.py`); other parameters get none.
    Raises InputError for NaN and infinity, but for a uniform quantizer, which lets them through to the loss.
    """
    match quantizer:
        case Uniform():
            return quantizer.straight_through(x)
        case Log2() | LogSqrt2() | AdaLog() | Sulq() | TanQ() | Ternary():
            low, high = (bound.detach() for bound in quantizer.bounds())
            values = quantized(quantizer, x.detach()).detach()
            inside = x.to(values.dtype).clamp(low, high)
            # Added to an exact 0, so that the forward result is the quantized number itself.
            return values + (inside - inside.detach())
        case _:
            assert_never(quantizer)


def code_bits(quantizer: Quantizer) -> int:
    """Bits that one code takes on disk: the fewest that tell its levels apart."""
    return (quantizer.levels - 1).bit_length()


def parameter_shape(quantizer: Quantizer) -> torch.Size:
    """Shape of what the quantizer's parameters broadcast to among themselves: [] per tensor."""
    parts = (getattr(quantizer, each.name) for each in fields(quantizer))
    return torch.broadcast_shapes(*(part.shape for part in parts if isinstance(part, Tensor)))
