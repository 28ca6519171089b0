"""LinkNet: a light decoder that adds the encoder's maps to its own.

Chaurasia, Culurciello: LinkNet: Exploiting Encoder Representations for Efficient Semantic Segmentation, VCIP 2017,
section III, Figs. 1 to 3.
"""

from itertools import pairwise

from torch import Tensor, nn

from denselab.errors import InputError
from denselab.layers import conv_bn_relu
from denselab.types import FeatureSpec


def full_conv(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """3x3 transposed convolution that upsamples exactly `stride` times, batch norm, ReLU."""
    conv = nn.ConvTranspose2d(inputs, outputs, 3, stride, padding=1, output_padding=stride - 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def decoder_block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """1x1 convolution to a quarter of the channels, transposed convolution, 1x1 convolution (Fig. 3)."""
    quarter = inputs // 4
    return nn.Sequential(
        conv_bn_relu(inputs, quarter, 1), full_conv(quarter, quarter, stride), conv_bn_relu(quarter, outputs, 1)
    )


class LinkNetDecoder(nn.Module):
    """One decoder block per encoder block, its output added to that encoder block's input; then to stride 2.

    The first decoder block (stride 4 to 4) has no link: its partner would be the map after the first max pooling,
    which a general backbone does not give. The last transposed convolution, to classes, is the head's.
    """

    def __init__(self, inputs: tuple[FeatureSpec, ...], width: int = 32) -> None:
        super().__init__()
        strides = [f.stride for f in inputs]
        if strides[0] != 4 or any(b not in (a, 2 * a) for a, b in pairwise(strides)):
            raise InputError(
                f"linknet: wanted a backbone whose maps begin at stride 4 and double, got strides "
                f"{', '.join(map(str, strides))}; choose another, say resnet18"
            )
        targets = [inputs[0], *inputs[:-1]]
        self.blocks = nn.ModuleList(
            decoder_block(f.channels, to.channels, f.stride // to.stride) for f, to in zip(inputs, targets, strict=True)
        )
        self.final = nn.Sequential(full_conv(inputs[0].channels, width, 2), conv_bn_relu(width, width))
        self.features = (FeatureSpec(width, 2),)

    def forward(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = maps[-1]
        for level in range(len(maps) - 1, 0, -1):
            x = self.blocks[level](x) + maps[level - 1]
        return (self.final(self.blocks[0](x)),)
