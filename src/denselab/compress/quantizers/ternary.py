"""Ternary weights: minus the scale, 0, the scale.

Li et al.: Ternary Weight Networks, arXiv:1605.04711: +1 above the threshold, -1 below its negative, else 0. The
range that the paper finds in closed form is `ranges.ternary`.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from denselab.compress.quantizers.checks import check_finite, check_positive, prepared
from denselab.errors import InputError


@dataclass(frozen=True, eq=False)
class Ternary:
    """Codes -1, 0, 1 times the scale.

    scale: above the threshold. threshold: 0 or more; both broadcastable to the data. Raises InputError for others.
    """

    scale: Float[Tensor, "..."]
    threshold: Float[Tensor, "..."]
    bits: ClassVar[int] = 2
    levels: ClassVar[int] = 3

    def __post_init__(self) -> None:
        check_positive("scale", self.scale)
        check_finite("threshold", self.threshold)
        if torch.compiler.is_compiling():
            return
        if (self.threshold < 0).any() or (self.scale <= self.threshold).any():
            raise InputError("threshold: wanted from 0 to below the scale, got others")

    def codes(self, x: Float[Tensor, "..."]) -> Int[Tensor, "..."]:
        """int32 codes -1, 0, 1. Raises InputError for NaN and infinity."""
        x = prepared(x, self.scale)
        return (x > self.threshold).to(torch.int32) - (x < -self.threshold).to(torch.int32)

    def values(self, codes: Int[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The numbers that codes stand for, in the dtype of the scale."""
        return codes.to(self.scale.dtype) * self.scale

    def bounds(self) -> tuple[Tensor, Tensor]:
        """All numbers: weights beyond the scale keep their gradient, as in the paper."""
        return torch.full_like(self.scale, -torch.inf), torch.full_like(self.scale, torch.inf)
