"""SegNet: a decoder that puts every value back where the encoder's pooling took it from.

Badrinarayanan, Kendall, Cipolla: SegNet: A Deep Convolutional Encoder-Decoder Architecture for Image Segmentation,
TPAMI 2017, section 3 and Figs. 2 and 3.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from denselab.errors import InputError
from denselab.layers import conv_bn_relu
from denselab.types import FeatureSpec

CONVS_PER_STAGE = (2, 2, 3, 3, 3)  # VGG16's thirteen


def unpool(values: Float[Tensor, "B C h w"], before_pooling: Float[Tensor, "B C h*2 w*2"]) -> Tensor:
    """values at the places of the maxima of 2x2 cells of `before_pooling`, 0 elsewhere: [B, C, 2h, 2w].

    Equal to F.max_unpool2d with the indices of F.max_pool2d, ties included (the first in reading order wins), in
    operations that every engine runs.
    """
    batch, channels, height, width = values.shape
    cells = before_pooling.reshape(batch, channels, height, 2, width, 2).transpose(3, 4).flatten(4)
    chosen = cells.argmax(dim=-1, keepdim=True) == torch.arange(4, device=cells.device)
    spread = torch.where(chosen, values[..., None], torch.zeros((), dtype=values.dtype, device=values.device))
    return spread.unflatten(-1, (2, 2)).transpose(3, 4).reshape(batch, channels, 2 * height, 2 * width)


class SegNetDecoder(nn.Module):
    """VGG16's thirteen convolutions mirrored, each with batch norm and ReLU, after five unpoolings.

    inputs: the encoder's maps before each pooling, strides 1, 2, 4, 8, 16. The pooling itself happens here, from
    the same maps, and so with the encoder's indices. Raises InputError for any other pyramid.
    """

    def __init__(self, inputs: tuple[FeatureSpec, ...]) -> None:
        super().__init__()
        strides = tuple(f.stride for f in inputs[:5])
        if strides != (1, 2, 4, 8, 16):
            raise InputError(
                f"segnet: wanted a backbone with maps before five poolings (strides 1, 2, 4, 8, 16), got strides "
                f"{', '.join(map(str, strides))}; choose a VGG, say vgg16_bn"
            )
        widths = [f.channels for f in inputs[:5]]
        nexts = [widths[0], *widths[:-1]]
        self.stages = nn.ModuleList(
            nn.Sequential(*(conv_bn_relu(width, width) for _ in range(convs - 1)), conv_bn_relu(width, after))
            for width, after, convs in zip(widths, nexts, CONVS_PER_STAGE, strict=True)
        )
        self.features = (FeatureSpec(widths[0], 1),)

    def forward(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = F.max_pool2d(maps[4], 2)
        for level in (4, 3, 2, 1, 0):
            x = self.stages[level](unpool(x, maps[level]))
        return (x,)
