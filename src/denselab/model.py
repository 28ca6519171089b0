"""DensePredictor: backbone -> pixel decoder -> head."""

from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from denselab.types import Backbone, Head, HeadSpec, PixelDecoder, QueryOutput


def round_up(size_px: int, multiple: int) -> int:
    """The next multiple at or above size_px, in operations that torch.export traces with a symbolic size."""
    return (size_px + multiple - 1) // multiple * multiple


class DensePredictor(nn.Module):
    """Any backbone, pixel decoder and head as one model that takes images of any size.

    pixels: float [B, 3, H, W], RGB in [0, 1]. The mask grid of the output covers the input padded right and
    bottom to a multiple of `backbone.size_multiple`; a task's decode crops it back to H, W.
    """

    def __init__(self, backbone: Backbone, pixel_decoder: PixelDecoder, head: Head) -> None:
        super().__init__()
        self.backbone = cast("nn.Module", backbone)
        self.pixel_decoder = cast("nn.Module", pixel_decoder)
        self.head = cast("nn.Module", head)
        self.size_multiple = backbone.size_multiple
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(backbone.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(backbone.std).view(1, 3, 1, 1), persistent=False)

    @property
    def spec(self) -> HeadSpec:
        """What the head returns."""
        return cast("Head", self.head).spec

    def normalize(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H2 W2"]:
        """Subtract the mean, divide by the standard deviation, pad right and bottom with the mean colour."""
        height, width = pixels.shape[-2:]
        pad_right = round_up(width, self.size_multiple) - width
        pad_bottom = round_up(height, self.size_multiple) - height
        return F.pad((pixels - self.mean) / self.std, (0, pad_right, 0, pad_bottom))

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> QueryOutput:
        maps = self.backbone(self.normalize(pixels))
        return self.head(self.pixel_decoder(maps))
