"""A small residual network of our own, for tests, tiny budgets and the built-in model."""

from jaxtyping import Float
from torch import Tensor, nn

from denselab.layers import conv_bn_relu
from denselab.types import FeatureSpec


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al. 2016, Fig. 5 left), optionally dilated."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.conv1 = conv_bn_relu(inputs, outputs, 3, stride, dilation)
        self.conv2 = conv_bn_relu(outputs, outputs, 3, 1, dilation)[:2]
        changes_shape = stride != 1 or inputs != outputs
        self.shortcut = conv_bn_relu(inputs, outputs, 1, stride)[:2] if changes_shape else nn.Identity()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Float[Tensor, "B C h w"]) -> Tensor:
        return self.relu(self.conv2(self.conv1(x)) + self.shortcut(x))


class SmallBackbone(nn.Module):
    """Feature maps at strides 4, 8 and 16 from plain 3x3 convolutions, which CPUs run fast in bf16 and int8.

    widths: channels of the stem and of the three stages.
    dilations: of every block, per stage.
    """

    mean = (0.5, 0.5, 0.5)
    std = (0.25, 0.25, 0.25)
    size_multiple = 16

    def __init__(
        self,
        widths: tuple[int, int, int, int] = (16, 24, 48, 96),
        dilations: tuple[tuple[int, ...], ...] = ((1,), (1,), (1, 2)),
    ) -> None:
        super().__init__()
        stem, *stages = widths
        self.stem = nn.Sequential(conv_bn_relu(3, stem, stride=2), conv_bn_relu(stem, stages[0], stride=2))
        self.stages = nn.ModuleList()
        inputs = stages[0]
        for index, (width, rates) in enumerate(zip(stages, dilations, strict=True)):
            blocks = [BasicBlock(inputs, width, stride=1 if index == 0 else 2, dilation=rates[0])]
            blocks += [BasicBlock(width, width, dilation=rate) for rate in rates[1:]]
            self.stages.append(nn.Sequential(*blocks))
            inputs = width
        self.features = tuple(FeatureSpec(width, 4 * 2**i) for i, width in enumerate(stages))

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> tuple[Tensor, ...]:
        x = self.stem(pixels)
        maps: list[Tensor] = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return tuple(maps)
