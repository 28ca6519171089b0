"""What numpy and torch spell differently; all else in an integer operator is written once, in their shared operators.

Both round `>>` and `//` toward minus infinity, wrap int32 silently, and keep int32 with Python integers. An operator
written over these therefore gives the same integers from an array as from a tensor.
"""

from collections.abc import Sequence
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.nn.functional as F
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


def sum_over(x: Integers, axes: tuple[int, ...], keep: bool) -> Integers:
    """Sum over some axes, in the type of x."""
    if isinstance(x, Tensor):
        return x.sum(dim=axes, keepdim=keep, dtype=x.dtype)
    return np.asarray(x.sum(axis=axes, dtype=x.dtype, keepdims=keep))


def permuted(x: Integers, order: tuple[int, ...]) -> Integers:
    """Axes in another order."""
    return x.permute(order) if isinstance(x, Tensor) else x.transpose(order)


def joined(parts: Sequence[Integers], axis: int) -> Integers:
    """One after another along an axis."""
    found = cast("Any", parts)
    return cast("Any", torch.cat(found, axis) if isinstance(parts[0], Tensor) else np.concatenate(found, axis))


def expanded(x: Integers, shape: tuple[int, ...]) -> Integers:
    """Repeated along axes of length one."""
    return x.expand(shape) if isinstance(x, Tensor) else np.broadcast_to(x, shape)


def padded(x: Integers, widths: tuple[tuple[int, int], ...], value: int) -> Integers:
    """So many copies of a value before and after, along every axis."""
    if isinstance(x, Tensor):
        return F.pad(x, [width for pair in reversed(widths) for width in pair], value=value)
    return np.pad(x, widths, constant_values=value)


def greater(x: Integers, y: Integers) -> Integers:
    """The greater of two, for every element."""
    return x.maximum(cast("Tensor", y)) if isinstance(x, Tensor) else np.maximum(x, y)


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
