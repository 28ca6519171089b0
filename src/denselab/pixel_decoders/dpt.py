"""DPT: the blocks of a plain vision transformer as a pyramid, fused from coarse to fine.

Ranftl, Bochkovskiy, Koltun: Vision Transformers for Dense Prediction, ICCV 2021, section 3 and Fig. 1.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from denselab.errors import InputError
from denselab.types import FeatureSpec

PAPER_WIDTHS = (96, 192, 384, 768)
"""Channels of the reassembled maps with ViT-Base; (256, 512, 1024, 1024) with ViT-Large."""


class DptDecoder(nn.Module):
    """Reassembles maps at strides 4, 8, 16, 32 and fuses them into one map of `width` channels at stride 2.

    inputs: maps of blocks of a plain transformer, early to late, all at one stride; or a pyramid, whose maps have
    their strides already and go to the fusion as they are (as the convolutional maps of DPT-Hybrid).
    widths: channels of the reassembled maps of a plain transformer. batch_norm: in the residual units; the
    authors' code has it for segmentation and not for depth.
    full: upsample after the last fusion too, as the paper does; without, the map leaves at the stride of the finest
    and is four times cheaper. aligned_corners: interpolate as the authors' weights want it; else cells stay in place.
    The readout token is ignored, the first of the paper's three ways: backbones give maps and no tokens.
    The 1x1 convolution at the end of a fusion comes before the upsampling, with which it commutes.
    Raises InputError for one map alone, more than there are widths, or strides that neither agree nor double.
    """

    def __init__(
        self,
        inputs: tuple[FeatureSpec, ...],
        width: int = 256,
        widths: tuple[int, ...] = PAPER_WIDTHS,
        full: bool = True,
        batch_norm: bool = False,
        aligned_corners: bool = False,
    ) -> None:
        super().__init__()
        pyramid = _reassembled(inputs, widths)
        self.reassemble = nn.ModuleList(
            nn.Identity() if pyramid is inputs else reassemble(f, to) for f, to in zip(inputs, pyramid, strict=True)
        )
        self.project = nn.ModuleList(nn.Conv2d(f.channels, width, 3, padding=1, bias=False) for f in pyramid)
        self.fusions = nn.ModuleList(
            Fusion(width, has_coarser=level + 1 < len(pyramid), batch_norm=batch_norm) for level in range(len(pyramid))
        )
        self.full, self.aligned_corners = full, aligned_corners
        self.features = (FeatureSpec(width, pyramid[0].stride // 2 if full else pyramid[0].stride),)

    def forward(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        pyramid = [
            project(reassemble(m)) for m, reassemble, project in zip(maps, self.reassemble, self.project, strict=True)
        ]
        x = self.fusions[-1](pyramid[-1])
        for level in range(len(pyramid) - 2, -1, -1):
            finer = pyramid[level]
            x = self.fusions[level](finer, self._resized(x, (finer.shape[-2], finer.shape[-1])))
        if self.full:
            x = self._resized(x, (2 * x.shape[-2], 2 * x.shape[-1]))
        return (x,)

    def _resized(self, x: Float[Tensor, "B C h w"], size_hw: tuple[int, int]) -> Tensor:
        return F.interpolate(x, size=size_hw, mode="bilinear", align_corners=self.aligned_corners)


def reassemble(source: FeatureSpec, target: FeatureSpec) -> nn.Module:
    """To the channels and the stride of `target`: 1x1 convolution, then a transposed or strided one (section 3.2).

    Upwards its kernel is its stride, downwards 3x3.
    """
    project = nn.Conv2d(source.channels, target.channels, 1)
    if target.stride < source.stride:
        ratio = source.stride // target.stride
        return nn.Sequential(project, nn.ConvTranspose2d(target.channels, target.channels, ratio, ratio))
    if target.stride > source.stride:
        ratio = target.stride // source.stride
        return nn.Sequential(project, nn.Conv2d(target.channels, target.channels, 3, ratio, padding=1))
    return project


class ResidualUnit(nn.Module):
    """ReLU and 3x3 convolution, twice, around a shortcut (RefineNet, Lin et al. 2017, Fig. 2b)."""

    def __init__(self, width: int, batch_norm: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [nn.ReLU(), nn.Conv2d(width, width, 3, padding=1, bias=not batch_norm)]
            layers += [nn.BatchNorm2d(width)] * batch_norm
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Float[Tensor, "B C h w"]) -> Tensor:
        return x + self.layers(x)


class Fusion(nn.Module):
    """The map of a level through a residual unit, plus what came from below, through another (section 3.2, Fig. 1)."""

    def __init__(self, width: int, has_coarser: bool, batch_norm: bool) -> None:
        super().__init__()
        self.skip = ResidualUnit(width, batch_norm) if has_coarser else nn.Identity()
        self.refine = ResidualUnit(width, batch_norm)
        self.project = nn.Conv2d(width, width, 1)

    def forward(self, x: Float[Tensor, "B C h w"], coarser: Float[Tensor, "B C h w"] | None = None) -> Tensor:
        x = self.skip(x)
        return self.project(self.refine(x if coarser is None else x + coarser))


def _reassembled(inputs: tuple[FeatureSpec, ...], widths: tuple[int, ...]) -> tuple[FeatureSpec, ...]:
    strides = [f.stride for f in inputs]
    if len(inputs) > 1 and all(stride == strides[0] * 2**i for i, stride in enumerate(strides)):
        return inputs
    if len(set(strides)) == 1 and 1 < len(inputs) <= len(widths):
        return tuple(FeatureSpec(channels, 4 * 2**i) for i, channels in enumerate(widths[: len(inputs)]))
    raise InputError(
        f"dpt: wanted a pyramid of doubling strides or 2 to {len(widths)} maps of a plain transformer, got strides "
        f"{', '.join(map(str, strides))}; choose out_indices of four blocks, or another backbone"
    )
