"""The convolutionalized classifier of FCN.

Long, Shelhamer, Darrell: Fully Convolutional Networks for Semantic Segmentation, CVPR 2015, section 4.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from denselab.errors import InputError
from denselab.types import FeatureSpec


class FcnDecoder(nn.Module):
    """VGG16's fc6 and fc7 as convolutions (7x7 and 1x1, 4096 wide) on the map at stride 32, skips passed through.

    finest_stride: 32, 16 or 8: FCN-32s, FCN-16s, FCN-8s. The maps that leave have strides finest_stride .. 32.
    Deviations: fc6 has same padding, where the paper pads the image by 100 px and crops the scores; fc6 and fc7
    begin at random, where the paper takes them from the classifier.
    Raises InputError when the backbone lacks one of those strides.
    """

    def __init__(self, inputs: tuple[FeatureSpec, ...], finest_stride: int, width: int = 4096) -> None:
        super().__init__()
        by_stride = {f.stride: i for i, f in enumerate(inputs)}  # the last map of a stride wins
        wanted = [stride for stride in (8, 16, 32) if stride >= finest_stride]
        if not by_stride.keys() >= set(wanted):
            raise InputError(
                f"fcn{finest_stride}s: wanted a backbone with maps at strides {', '.join(map(str, wanted))}, got "
                f"{', '.join(map(str, by_stride))}; choose another, say vgg16"
            )
        self.kept = [by_stride[stride] for stride in wanted]
        coarsest = inputs[self.kept[-1]]
        self.fc6 = nn.Conv2d(coarsest.channels, width, 7, padding=3)
        self.fc7 = nn.Conv2d(width, width, 1)
        self.dropout = nn.Dropout2d(0.5)
        self.features = (*(inputs[i] for i in self.kept[:-1]), FeatureSpec(width, coarsest.stride))

    def forward(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        *skips, x = (maps[i] for i in self.kept)
        x = self.dropout(F.relu(self.fc6(x)))
        x = self.dropout(F.relu(self.fc7(x)))
        return (*skips, x)
