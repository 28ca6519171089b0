"""What the models of the hub share: what each was made from, and the parts between a backbone and a head."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Rgb = tuple[float, float, float]


@dataclass(frozen=True)
class HubRecipe:
    """All but the weights of a model of the hub, in plain data: what a checkpoint keeps to build it again.

    architecture: class of transformers. config: its configuration. mean, std: for pixels in [0, 1].
    relative_depth: the network gives inverse depth of unknown scale and shift. masked_blocks: of EoMT.
    """

    architecture: str
    config: Mapping[str, Any]
    mean: Rgb
    std: Rgb
    relative_depth: bool = False
    masked_blocks: tuple[bool, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON or a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "HubRecipe":
        """The inverse of `to_dict`."""
        lists: dict[str, Any] = {name: tuple(data[name]) for name in ("mean", "std", "masked_blocks")}
        return cls(**{**data, **lists})


def to_map(tokens: Float[Tensor, "B N C"], height: int, width: int) -> Float[Tensor, "B C height width"]:
    """Tokens of an image, row by row, as a map."""
    return tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], height, width)


def to_tokens(prefix: Float[Tensor, "B P C"], patches: Float[Tensor, "B C h w"]) -> Float[Tensor, "B N C"]:
    """Prefix tokens and, after them, the cells of a map, row by row."""
    return torch.cat([prefix, patches.flatten(2).transpose(1, 2)], dim=1)


def resize(maps: Float[Tensor, "B C h w"], size_hw: tuple[int, int]) -> Tensor:
    """Bilinear."""
    return F.interpolate(maps, size=size_hw, mode="bilinear", align_corners=False)
