"""Backbone -> pixel decoder -> head, or heads: the models that everything else takes."""

from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from denselab.types import Backbone, Head, HeadSpec, PixelDecoder, QueryOutput


def round_up(size_px: int, multiple: int) -> int:
    """The next multiple at or above size_px, in operations that torch.export traces with a symbolic size."""
    return (size_px + multiple - 1) // multiple * multiple


class Trunk(nn.Module):
    """What all heads of a model share: normalisation, backbone and pixel decoder.

    pixels: float [B, 3, H, W], RGB in [0, 1]. The mask grid of an output covers the input padded right and bottom to
    a multiple of `backbone.size_multiple`; a task's decode crops it back to H, W.
    """

    def __init__(self, backbone: Backbone, pixel_decoder: PixelDecoder) -> None:
        super().__init__()
        self.backbone = cast("nn.Module", backbone)
        self.pixel_decoder = cast("nn.Module", pixel_decoder)
        self.size_multiple = backbone.size_multiple
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(backbone.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(backbone.std).view(1, 3, 1, 1), persistent=False)

    def normalize(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H2 W2"]:
        """Subtract the mean, divide by the standard deviation, pad right and bottom with the mean colour."""
        height, width = pixels.shape[-2:]
        pad_right = round_up(width, self.size_multiple) - width
        pad_bottom = round_up(height, self.size_multiple) - height
        return F.pad((pixels - self.mean) / self.std, (0, pad_right, 0, pad_bottom))

    def maps(self, pixels: Float[Tensor, "B 3 H W"]) -> tuple[Tensor, ...]:
        """What the heads see."""
        return self.pixel_decoder(self.backbone(self.normalize(pixels)))


class DensePredictor(Trunk):
    """Any backbone, pixel decoder and head as one model that takes images of any size."""

    def __init__(self, backbone: Backbone, pixel_decoder: PixelDecoder, head: Head) -> None:
        super().__init__(backbone, pixel_decoder)
        self.head = cast("nn.Module", head)

    @property
    def spec(self) -> HeadSpec:
        """What the head returns."""
        return cast("Head", self.head).spec

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> QueryOutput:
        return self.head(self.maps(pixels))


class JointPredictor(Trunk):
    """One backbone and pixel decoder under one head per task."""

    def __init__(self, backbone: Backbone, pixel_decoder: PixelDecoder, heads: Mapping[str, Head]) -> None:
        super().__init__(backbone, pixel_decoder)
        self.heads = nn.ModuleDict({task: cast("nn.Module", head) for task, head in heads.items()})

    @property
    def specs(self) -> dict[str, HeadSpec]:
        """What the head of each task returns."""
        return {task: cast("Head", head).spec for task, head in self.heads.items()}

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> dict[str, QueryOutput]:
        maps = self.maps(pixels)
        return {task: head(maps) for task, head in self.heads.items()}


Model = DensePredictor | JointPredictor
"""What is trained, evaluated and exported."""


def head_outputs(
    model: Model, tasks: tuple[str, ...], pixels: Float[Tensor, "B 3 H W"]
) -> dict[str, tuple[QueryOutput, HeadSpec]]:
    """Output and spec of the head that serves each task; the only head serves them all."""
    if isinstance(model, JointPredictor):
        outputs = model(pixels)
        return {task: (outputs[task], model.specs[task]) for task in tasks}
    output = model(pixels)
    return dict.fromkeys(tasks, (output, model.spec))
