"""Backbones whose cells lie on the corners of a grid: cell i of the map of stride s is centred on pixel s * i.

So DeepLab2 lays out its networks (Weber et al. 2021), kMaX-DeepLab among them: an input of 32 n + 1 px has 32 n / s + 1
cells at stride s, the first and the last on its first and last pixel, and maps are resized with those corners
aligned. Here the input, of 32 n px, gets one more column and row of the mean colour, and `at_cell_centres` brings
what comes out at the end to the grid of all other models, on which cell i covers pixels s * i to s * (i + 1) - 1.

Source: kmax-deeplab@f5a3d9e backbone/resnet.py and convnext.py; the networks are timm's, which differ from those in
where they pad and, for ResNet, in the eps of their norms.
"""

from functools import partial
from typing import Any

from denselab import _vision as _vision  # before timm, which imports torchvision

# isort: split
import timm
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from denselab.types import FeatureSpec

_CORNERS = (0, 1, 0, 1)
"""The column and row that make 32 n px 32 n + 1, in the order of F.pad: left, right, top, bottom."""
_CORNERS_AND_STEM = (1, 3, 1, 3)
"""For ConvNeXt also the 1 px before and 2 px after that its stem, 4x4 with stride 4, is padded by."""


class CornerGridBackbone(nn.Module):
    """Maps [B, C, H / s + 1, W / s + 1] of strides s = 4, 8, 16, 32, finest first; H and W are multiples of 32.

    net: feature extractor of timm with these four maps. padding: px left, right, top and bottom, normalised zeros.
    """

    def __init__(self, net: Any, padding: tuple[int, int, int, int]) -> None:
        super().__init__()
        self.net = net
        self.padding = padding
        info = net.feature_info
        self.features = tuple(FeatureSpec(*each) for each in zip(info.channels(), info.reduction(), strict=True))
        self.size_multiple = self.features[-1].stride
        self.mean = self.std = (0.5, 0.5, 0.5)  # 127.5 of 255 each

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> tuple[Tensor, ...]:
        return tuple(self.net(F.pad(pixels, self.padding)))


class _PaddedDownsampling(nn.Sequential):
    """Norm and 2x2 convolution of ConvNeXt, after a column and a row of zeros, which the norm turns into its bias."""

    def forward(self, input: Float[Tensor, "B C h w"]) -> Tensor:
        return super().forward(F.pad(input, (0, 1, 0, 1)))


def corner_resnet(depths: tuple[int, ...], widths: tuple[int, ...]) -> CornerGridBackbone:
    """ResNet of bottlenecks, with the norms of TensorFlow. depths, widths: blocks and base channels of each stage.

    Symmetric padding, which is timm's, keeps the cells on the corners.
    """
    norm = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)
    sizes: dict[str, Any] = {"layers": depths, "channels": widths, "norm_layer": norm}
    net = timm.create_model("resnet50", features_only=True, out_indices=(1, 2, 3, 4), **sizes)
    return CornerGridBackbone(net, _CORNERS)


def corner_convnext(depths: tuple[int, ...], widths: tuple[int, ...]) -> CornerGridBackbone:
    """ConvNeXt; depths, widths: blocks and channels of each stage."""
    net: Any = timm.create_model("convnext_tiny", features_only=True, depths=depths, dims=widths)
    for stage in (net.stages_1, net.stages_2, net.stages_3):
        stage.downsample = _PaddedDownsampling(*stage.downsample)
    return CornerGridBackbone(net, _CORNERS_AND_STEM)


def at_cell_centres(corners: Float[Tensor, "B C h+1 w+1"], stride: int) -> Float[Tensor, "B C h w"]:
    """Maps on corners, resampled bilinearly at the centres of the cells that lie between them.

    Cell i is centred on pixel stride * i + (stride - 1) / 2; of two corners the second has the weight
    (stride - 1) / (2 * stride).
    """
    second = (stride - 1) / (2 * stride)
    rows = (1 - second) * corners[..., :-1, :] + second * corners[..., 1:, :]
    return (1 - second) * rows[..., :-1] + second * rows[..., 1:]
