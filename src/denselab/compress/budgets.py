"""What a compression may cost: mean bits, bytes, bit operations or milliseconds; as types, and as users write them."""

import math
import re
from dataclasses import dataclass
from typing import assert_never

from denselab.errors import InputError

_BYTE_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class MeanBits:
    """At most so many bits in the mean over all elements of weights, and of activations; None: not limited."""

    weights: float | None = None
    activations: float | None = None


@dataclass(frozen=True)
class Bytes:
    """At most so many bytes of weights on disk."""

    most: int


@dataclass(frozen=True)
class FloatShare:
    """At most this share of the bytes that the model takes as float32."""

    most: float
    float_bytes: int


@dataclass(frozen=True)
class Bops:
    """At most so many bit operations: the sum of MACs x bits of weights x bits of activations."""

    most: float


@dataclass(frozen=True)
class Milliseconds:
    """At most this sum of the options' measured milliseconds."""

    most: float


Budget = MeanBits | Bytes | FloatShare | Bops | Milliseconds


def parse_budget(text: str, float_bytes: int) -> Budget:
    """The budget that "4.0bits" (of weights and of activations), "2.5MB", "0.25x", "3.5GBOPs" or "8ms" says.

    MB is 10^6 bytes, MiB 2^20. float_bytes: the model's size as float32, of which "x" is a share. Raises InputError.
    """
    found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([a-z]+)\s*", text.lower())
    if not found:
        raise InputError(f"budget: wanted a number and a unit, such as 4.0bits, 2.5MB, 0.25x or 8ms, got {text!r}")
    value, unit = float(found[1]), found[2]
    if value <= 0:
        raise InputError(f"budget: wanted more than 0, got {text!r}")
    match unit:
        case "bits" | "bit":
            return MeanBits(value, value)
        case "x":
            return FloatShare(value, float_bytes)
        case "ms":
            return Milliseconds(value)
        case "gbops":
            return Bops(value * 1e9)
        case _ if unit in _BYTE_UNITS:
            return Bytes(math.floor(value * _BYTE_UNITS[unit] * (1 + 1e-12)))
        case _:
            raise InputError(f"budget: wanted bits, B, kB, MB, GB, x, ms or GBOPs as its unit, got {text!r}")


def budget_text(budget: Budget) -> str:
    """A budget as the user wrote it: exact in bytes and BOPs, else to 4 decimals, rounded up."""
    match budget:
        case MeanBits(weights, activations):
            if weights == activations or weights is None or activations is None:
                of = "" if weights == activations else " of activations" if weights is None else " of weights"
                return f"{_up(weights if weights is not None else activations or 0)}bits{of}"
            return f"{_up(weights)}bits of weights and {_up(activations)}bits of activations"
        case Bytes(most):
            return f"{most / 1e6:.6f}MB" if most >= 10**6 else f"{most}B"
        case FloatShare(most):
            return f"{_up(most)}x"
        case Bops(most):
            return f"{_up(most / 1e9, 9)}GBOPs"
        case Milliseconds(most):
            return f"{_up(most)}ms"
        case _:
            assert_never(budget)


def limits_activations(budget: Budget) -> bool:
    """Whether a budget counts bits of activations, so that fewer of them leave room for others."""
    match budget:
        case MeanBits(_, activations):
            return activations is not None
        case Bops():
            return True
        case Bytes() | FloatShare() | Milliseconds():
            return False
        case _:
            assert_never(budget)


def scaled(budget: Budget, times: float) -> Budget:
    """So many times the budget; bytes rounded up."""
    match budget:
        case MeanBits(weights, activations):
            return MeanBits(weights and weights * times, activations and activations * times)
        case Bytes(most):
            return Bytes(math.ceil(most * times - 1e-6))
        case FloatShare(most, float_bytes):
            return FloatShare(most * times, float_bytes)
        case Bops(most):
            return Bops(most * times)
        case Milliseconds(most):
            return Milliseconds(most * times)
        case _:
            assert_never(budget)


def _up(value: float, decimals: int = 4) -> str:
    return f"{math.ceil(value * 10**decimals - 1e-6) / 10**decimals:.{decimals}f}".rstrip("0").rstrip(".")
