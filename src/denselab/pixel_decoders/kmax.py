"""The pixel decoder of kMaX-DeepLab: axial attention at coarse strides, bottlenecks at fine ones.

Yu, Wang, Qiao, Collins, Zhu, Adam, Yuille, Chen: k-means Mask Transformer, ECCV 2022, section 4.1; in the form of
kmax-deeplab@f8e1d04 kmax_pixel_decoder.py. Deviations: maps of any size (there the length of the attention is fixed),
a choice of norm, and by default the same corners at every size (see `resize`).
"""

from dataclasses import dataclass
from enum import Enum
from typing import assert_never

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from denselab.backbones.simple_pyramid import ChannelNorm
from denselab.errors import InputError
from denselab.layers import DropPath, Norm, conv_norm
from denselab.pixel_decoders.axial_attention import AxialAttention2d
from denselab.types import FeatureSpec


class Mixing(Enum):
    """How the cells of a stage see each other: axial attention, or 3x3 convolutions."""

    AXIAL = "axial attention"
    BOTTLENECK = "3x3 convolution"


@dataclass(frozen=True)
class Stage:
    """Blocks at one stride: `depth` of them, base `width`; their maps have 4 * width channels."""

    width: int
    depth: int
    mixing: Mixing


PUBLISHED_STAGES = {
    32: Stage(512, 1, Mixing.AXIAL),
    16: Stage(256, 5, Mixing.AXIAL),
    8: Stage(128, 1, Mixing.BOTTLENECK),
    4: Stage(64, 1, Mixing.BOTTLENECK),
}
"""By stride (kmax-deeplab@f8e1d04 configs/coco/panoptic_segmentation/kmax_r50.yaml)."""


def resize(x: Float[Tensor, "B C h w"], like: Tensor, align_corners: bool | None) -> Float[Tensor, "B C H W"]:
    """Bilinear resizing to the grid of `like`. align_corners None: the corners are aligned if the width is odd.

    None is the published rule, made for inputs of 32 n + 1 px; a model with it exports for either kind of width only.
    """
    aligned = x.shape[-1] % 2 == 1 if align_corners is None else align_corners
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=aligned)


class KMaXBlock(nn.Module):
    """GELU, then a residual: 1x1 convolution, mixing, GELU, 1x1 convolution. The shortcut starts after the GELU."""

    def __init__(self, inputs: int, width: int, mixing: Mixing, num_heads: int, drop_path: float, norm: Norm) -> None:
        super().__init__()
        outputs = 4 * width
        match mixing:
            case Mixing.AXIAL:
                self.reduce = conv_norm(inputs, 2 * width, norm, gelu=True)
                self.mix = nn.Sequential(AxialAttention2d(2 * width, width, num_heads, norm), nn.GELU())
                self.expand = conv_norm(2 * width, outputs, norm, scale=0)
            case Mixing.BOTTLENECK:
                self.reduce = conv_norm(inputs, width, norm, gelu=True)
                self.mix = conv_norm(width, width, norm, kernel=3, gelu=True)
                self.expand = conv_norm(width, outputs, norm, scale=0)
            case _:
                assert_never(mixing)
        self.shortcut = nn.Identity() if inputs == outputs else conv_norm(inputs, outputs, norm)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "B C h w"]) -> Tensor:
        x = F.gelu(x)
        return self.shortcut(x) + self.drop_path(self.expand(self.mix(self.reduce(x))))


class ResizedFuse(nn.Module):
    """The sum of a coarse map, resized, and a finer one, each with GELU and a 1x1 convolution if its width differs."""

    def __init__(self, coarse: int, fine: int, outputs: int, align_corners: bool | None, norm: Norm) -> None:
        super().__init__()
        self.coarse = _project(coarse, outputs, norm)
        self.fine = _project(fine, outputs, norm)
        self.align_corners = align_corners

    def forward(self, coarse: Float[Tensor, "B C h w"], fine: Float[Tensor, "B D H W"]) -> Tensor:
        return resize(self.coarse(coarse), fine, self.align_corners) + self.fine(fine)


def _project(inputs: int, outputs: int, norm: Norm) -> nn.Module:
    return nn.Identity() if inputs == outputs else nn.Sequential(nn.GELU(), conv_norm(inputs, outputs, norm))


class KMaXPixelDecoder(nn.Module):
    """Feature maps refined from coarse to fine; at stride s they have 4 * (width of its stage) channels.

    inputs: of the backbone, finest first. Published: strides 4, 8, 16, 32; any will do.
    stages: of the coarsest maps, coarsest first; finer maps than there are stages are left out. None: the published
    stages of the strides there are.
    align_corners: see `resize`; False unless published weights are to be reproduced.
    Raises InputError: more stages than maps, strides without published stages, a width the heads do not divide.
    """

    def __init__(
        self,
        inputs: tuple[FeatureSpec, ...],
        stages: tuple[Stage, ...] | None = None,
        num_heads: int = 8,
        drop_path: float = 0.0,
        norm: Norm = Norm.BATCH,
        align_corners: bool | None = False,
    ) -> None:
        super().__init__()
        stages = _published_stages(inputs) if stages is None else stages
        _check(inputs, stages, num_heads)
        sources = inputs[::-1][: len(stages)]
        self.input_norms = nn.ModuleList(ChannelNorm(source.channels, eps=1e-6) for source in sources)
        self.fuses = nn.ModuleList()
        self.stages = nn.ModuleList()
        channels = sources[0].channels
        for index, (source, stage) in enumerate(zip(sources, stages, strict=True)):
            if index > 0:
                self.fuses.append(ResizedFuse(channels, source.channels, stage.width, align_corners, norm))
                channels = stage.width
            blocks: list[nn.Module] = []
            for _ in range(stage.depth):
                blocks.append(KMaXBlock(channels, stage.width, stage.mixing, num_heads, drop_path, norm))
                channels = 4 * stage.width
            self.stages.append(nn.Sequential(*blocks))
        outputs = [FeatureSpec(4 * stage.width, source.stride) for source, stage in zip(sources, stages, strict=True)]
        self.features = tuple(outputs[::-1])

    def forward(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        sources = maps[::-1][: len(self.stages)]
        coarse_to_fine = [self.stages[0](self.input_norms[0](sources[0]))]
        for fuse, stage, norm, source in zip(
            self.fuses, self.stages[1:], self.input_norms[1:], sources[1:], strict=True
        ):
            coarse_to_fine.append(stage(fuse(coarse_to_fine[-1], norm(source))))
        return tuple(coarse_to_fine[::-1])


def _published_stages(inputs: tuple[FeatureSpec, ...]) -> tuple[Stage, ...]:
    wanted = [f.stride for f in inputs[::-1] if f.stride >= min(PUBLISHED_STAGES)]
    if not wanted or not PUBLISHED_STAGES.keys() >= set(wanted):
        strides = ", ".join(str(f.stride) for f in inputs)
        raise InputError(f"stages: the published ones are for strides 4, 8, 16, 32, got {strides}; give stages")
    return tuple(PUBLISHED_STAGES[stride] for stride in wanted)


def _check(inputs: tuple[FeatureSpec, ...], stages: tuple[Stage, ...], num_heads: int) -> None:
    if not 0 < len(stages) <= len(inputs):
        strides = ", ".join(str(f.stride) for f in inputs)
        raise InputError(
            f"stages: wanted 1 to {len(inputs)}, as the backbone has maps at strides {strides}, got {len(stages)}; "
            "leave stages out, or choose a backbone with more maps"
        )
    for stage in stages:
        if stage.mixing is Mixing.AXIAL and stage.width % num_heads:
            raise InputError(
                f"stages: wanted the width of axial attention to be a multiple of its {num_heads} heads, "
                f"got {stage.width}; change the width or num_heads"
            )
        if stage.depth < 1:
            raise InputError(f"stages: wanted a depth of 1 or more, got {stage.depth}; leave the stage out instead")
