"""What every quantizer asks of its parameters and of its data; nothing is looked at while a graph is being traced."""

import torch
from torch import Tensor

from denselab.errors import InputError

BITS = range(2, 9)


def check_bits(bits: int) -> None:
    """Raises InputError for a width that no quantizer has."""
    if bits not in BITS:
        raise InputError(f"bits: wanted {BITS.start} to {BITS.stop - 1}, got {bits}")


def check_finite(name: str, x: Tensor) -> None:
    """Raises InputError, with the name given (a tensor's, a layer's), for NaN and infinity."""
    if torch.compiler.is_compiling() or not x.numel() or not x.is_floating_point():
        return
    # One pass without a mask: both ends are finite where every number is, and NaN reaches both.
    if torch.stack(x.detach().aminmax()).isfinite().all():
        return
    bad = int((~x.isfinite()).sum())
    raise InputError(f"{name}: {bad} of {x.numel()} numbers are NaN or infinite; quantizing needs finite numbers")


def check_positive(name: str, x: Tensor) -> None:
    """Raises InputError for a parameter that must be finite and above 0 and is not."""
    if torch.compiler.is_compiling():
        return
    check_finite(name, x)
    if x.numel() and not (x > 0).all():
        raise InputError(f"{name}: wanted numbers above 0, got {x.min().item():g}")


def prepared(x: Tensor, parameter: Tensor) -> Tensor:
    """Finite data in the dtype that a quantizer computes with: that of its parameter. Raises InputError."""
    check_finite("x", x)
    return x.to(parameter.dtype)
