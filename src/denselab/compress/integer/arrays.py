"""What numpy and torch spell differently; all else in an integer operator is written once, in their shared operators.

Both round `>>` and `//` toward minus infinity, wrap int32 silently, and keep int32 with Python integers. An operator
written over these therefore gives the same integers from an array as from a tensor.
"""

from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from denselab.errors import InputError

Integers = TypeVar("Integers", NDArray[np.integer[Any]], Tensor)

INT32_MOST = 2**31 - 1


def int32(x: Integers) -> Integers:
    """The same values as int32."""
    return x.to(torch.int32) if isinstance(x, Tensor) else x.astype(np.int32)


def int64(x: Integers) -> Integers:
    """The same values as int64."""
    return x.to(torch.int64) if isinstance(x, Tensor) else x.astype(np.int64)


def row_max(x: Integers) -> Integers:
    """Greatest over the last axis, which is kept."""
    if isinstance(x, Tensor):
        return x.amax(dim=-1, keepdim=True)
    return x.max(axis=-1, keepdims=True)


def row_sum(x: Integers) -> Integers:
    """Sum over the last axis, which is kept, in the type of x."""
    if isinstance(x, Tensor):
        return x.sum(dim=-1, keepdim=True, dtype=x.dtype)
    return x.sum(axis=-1, dtype=x.dtype, keepdims=True)


def like(values: NDArray[np.integer[Any]], x: Integers) -> Integers:
    """Constants as an array or a tensor, where x is, in their own type."""
    if isinstance(x, Tensor):
        return torch.from_numpy(np.asarray(values)).to(x.device)
    return values


def checked(name: str, x: Integers, most: int) -> Integers:
    """x, if it holds integers from -most to most. Raises InputError for others: an int32 would overflow."""
    kind = not (x.is_floating_point() or x.is_complex()) if isinstance(x, Tensor) else x.dtype.kind in "iu"
    if not kind or not x.shape or not x.shape[-1]:
        raise InputError(f"{name}: wanted integers with a last axis of one or more, got {x.dtype} {list(x.shape)}")
    if 0 in x.shape:
        return x
    low, high = int(x.min()), int(x.max())
    if low < -most or high > most:
        raise InputError(
            f"{name}: wanted integers from {-most} to {most}, so that int32 cannot overflow, got {low} to {high}; "
            "requantize to fewer bits first"
        )
    return x
