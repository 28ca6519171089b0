"""What the models of the hub share: what is known of each, and the parts between a backbone and a head."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from denselab.classes import Classes
from denselab.errors import InputError
from denselab.model import DensePredictor

Rgb = tuple[float, float, float]


@dataclass(frozen=True)
class HubSettings:
    """What a model of the hub needs to know beside its network.

    mean, std: for pixels in [0, 1]. relative_depth: the network gives inverse depth of unknown scale and shift.
    masked_blocks: of EoMT.
    """

    mean: Rgb
    std: Rgb
    relative_depth: bool = False
    masked_blocks: tuple[bool, ...] = ()


@dataclass(frozen=True)
class HubModel:
    """A pretrained model in evaluation mode on the CPU, and what it is.

    source: name on the hub, folder or file. tasks: what it can do, first what it was trained for. classes: None for
    depth. relative_depth: its depth is known up to the scale and shift of its inverse, and in no unit. train_hw: size
    of a usual training photo in px, if known. network_hw: size to run at inside an artifact, None where it can run at
    any. licence: as the hub names it. note: what a user should know.
    """

    model: DensePredictor
    source: str
    tasks: tuple[str, ...]
    classes: Classes | None
    relative_depth: bool
    train_hw: tuple[int, int] | None
    network_hw: tuple[int, int] | None
    licence: str
    note: str


def thing_ids(names: tuple[str, ...], things: Sequence[int | str]) -> tuple[int, ...]:
    """Rising ids of classes given by name or id. Raises InputError for one that there is not."""
    strange = [thing for thing in things if thing not in names and thing not in range(len(names))]
    if strange:
        raise InputError(f"things: wanted names or ids of classes (0..{len(names) - 1}), got {strange}; correct them")
    return tuple(sorted({names.index(thing) if isinstance(thing, str) else thing for thing in things}))


def to_map(tokens: Float[Tensor, "B N C"], height: int, width: int) -> Float[Tensor, "B C height width"]:
    """Tokens of an image, row by row, as a map."""
    return tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], height, width)


def to_tokens(prefix: Float[Tensor, "B P C"], patches: Float[Tensor, "B C h w"]) -> Float[Tensor, "B N C"]:
    """Prefix tokens and, after them, the cells of a map, row by row."""
    return torch.cat([prefix, patches.flatten(2).transpose(1, 2)], dim=1)


def resize(maps: Float[Tensor, "B C h w"], size_hw: tuple[int, int]) -> Tensor:
    """Bilinear."""
    return F.interpolate(maps, size=size_hw, mode="bilinear", align_corners=False)
