"""The semantic decoder that kMaX-DeepLab trains beside its masks: atrous pyramid pooling, then finer maps fused in.

Cheng, Collins, Zhu, Liu, Huang, Adam, Chen: Panoptic-DeepLab, CVPR 2020, section 3.1, one decoder and its head; in
the form of kmax-deeplab@f8e1d04 kmax_transformer_decoder.py (SemanticPredictor). Deviation: a choice of norm.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from denselab.layers import Norm, classifier, conv_norm
from denselab.pixel_decoders.kmax import resize
from denselab.types import FeatureSpec

RATES = (6, 12, 18)


class AtrousPyramid(nn.Module):
    """A 1x1 and three atrous 3x3 convolutions and global pooling, concatenated; a 1x1 convolution; dropout."""

    def __init__(self, inputs: int, width: int, dropout: float, norm: Norm) -> None:
        super().__init__()
        self.point = conv_norm(inputs, width, norm, gelu=True)
        self.atrous = nn.ModuleList(conv_norm(inputs, width, norm, kernel=3, dilation=r, gelu=True) for r in RATES)
        self.pooled = conv_norm(inputs, width, norm, gelu=True)
        self.project = conv_norm((2 + len(RATES)) * width, width, norm, gelu=True)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B D h w"]:
        pooled = self.pooled(x.mean(dim=(2, 3), keepdim=True)).expand(-1, -1, *x.shape[2:])
        branches = [self.point(x), *(atrous(x) for atrous in self.atrous), pooled]
        return self.dropout(self.project(torch.cat(branches, dim=1)))


class DeepLabSemantic(nn.Module):
    """Class logits at the stride of the finest map.

    inputs: finest first; published: the backbone's maps at strides 4, 8 and 32. The coarsest goes through the atrous
    pyramid; each of the others, from coarse to fine and projected to width / 4, width / 8, ..., is fused in by a
    5x5 depthwise and a 1x1 convolution.
    align_corners: see `resize`; None takes the corners by the width of the coarsest map at every fusion, as published.
    """

    def __init__(
        self,
        inputs: tuple[FeatureSpec, ...],
        num_classes: int,
        width: int = 256,
        dropout: float = 0.1,
        norm: Norm = Norm.BATCH,
        align_corners: bool | None = False,
    ) -> None:
        super().__init__()
        self.align_corners = align_corners
        self.pyramid = AtrousPyramid(inputs[-1].channels, width, dropout, norm)
        self.projections = nn.ModuleList()
        self.fusions = nn.ModuleList()
        for index, finer in enumerate(inputs[-2::-1]):
            narrow = width // (4 * 2**index)
            self.projections.append(conv_norm(finer.channels, narrow, norm, gelu=True))
            self.fusions.append(separable(width + narrow, width, norm))
        self.refine = separable(width, width, norm)
        self.classify = classifier(width, num_classes)

    def forward(self, maps: tuple[Tensor, ...]) -> Float[Tensor, "B K h w"]:
        aligned = maps[-1].shape[-1] % 2 == 1 if self.align_corners is None else self.align_corners
        x = self.pyramid(maps[-1])
        for project, fuse, finer in zip(self.projections, self.fusions, maps[-2::-1], strict=True):
            x = fuse(torch.cat([resize(x, finer, aligned), project(finer)], dim=1))
        return self.classify(self.refine(x))


def separable(inputs: int, outputs: int, norm: Norm) -> nn.Sequential:
    """A 5x5 depthwise and a 1x1 convolution, norm and GELU after each."""
    depthwise = conv_norm(inputs, inputs, norm, kernel=5, depthwise=True, gelu=True)
    return nn.Sequential(depthwise, conv_norm(inputs, outputs, norm, gelu=True))
