"""What the values of a head mean: class logits, metres, or normals; and how raw numbers become them.

PolyMaX (Yang et al., WACV 2024) gives every query one of these, so that one head serves every task; a per-pixel
regression gives one to every pixel.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, assert_never

import torch
from jaxtyping import Float
from torch import Tensor

from denselab.errors import InputError


@dataclass(frozen=True)
class ClassValues:
    """Logits over K classes."""

    num_classes: int

    @property
    def dim(self) -> int:
        """Numbers per value."""
        return self.num_classes


@dataclass(frozen=True)
class DepthValues:
    """Depth in metres, between min_m and max_m.

    Raises InputError unless 0 < min_m < max_m.
    """

    max_m: float = 10.0
    min_m: float = 0.1
    dim: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not 0 < self.min_m < self.max_m:
            raise InputError(
                f"depth: wanted 0 < min_m < max_m, got min_m={self.min_m:g}, max_m={self.max_m:g}; "
                "give the nearest and the farthest depth of the data in metres"
            )


@dataclass(frozen=True)
class NormalValues:
    """Normals, x right, y down, z forward; of any length until the decode normalises the blended ones."""

    dim: ClassVar[int] = 3


Values = ClassValues | DepthValues | NormalValues


def activated(raw: Float[Tensor, "..."], values: Values) -> Float[Tensor, "..."]:
    """Raw numbers of a network as values: depths become metres, logits and normals stay as they are.

    Depth is min_m * (max_m / min_m) ** sigmoid(raw): bounded, with a gradient everywhere between, and even in log
    depth, where the losses (SILog) and the metrics (AbsRel, delta) measure: a step of `raw` changes the near and the
    far by like factors, in rooms as in streets. It begins (raw = 0) at the geometric mean of the range. The linear
    max_m * sigmoid(raw) of PolyMaX and AdaBins begins at half of max_m, 30 m in a street whose median depth is 9 m,
    and its bins lie farthest apart, in ratio, where it is near. Metres are float32 under autocast too: the steps of
    bfloat16 just below sigmoid = 1 would be of 2 % in depth.
    """
    match values:
        case DepthValues(max_m=max_m, min_m=min_m):
            return torch.exp(math.log(min_m) + math.log(max_m / min_m) * raw.float().sigmoid())
        case ClassValues() | NormalValues():
            return raw
        case _:
            assert_never(values)


def spread(values: Values, count: int) -> Float[Tensor, "count D"]:
    """Raw numbers of `count` queries at the start of training, so that together they cover what can be said.

    Depths: the middles of equal bins of log depth (adaptive bins that begin as even ones). Normals: points spread
    by golden angles over the half of the sphere that faces the camera, z < 0, where what is seen lies. Classes:
    zeros, no opinion.
    """
    middles = (torch.arange(count) + 0.5) / count
    match values:
        case ClassValues():
            return torch.zeros(count, values.dim)
        case DepthValues():
            return torch.logit(middles)[:, None]
        case NormalValues():
            across = (1 - middles**2).sqrt()
            angle_rad = torch.arange(count) * math.pi * (3 - math.sqrt(5))
            return torch.stack([across * angle_rad.cos(), across * angle_rad.sin(), -middles], dim=1)
        case _:
            assert_never(values)
