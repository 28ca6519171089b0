"""FCN's head: class scores from several maps, fused from coarse to fine.

Long, Shelhamer, Darrell: Fully Convolutional Networks for Semantic Segmentation, CVPR 2015, section 4.2 and Fig. 3.
"""

import torch
from torch import Tensor, nn

from denselab.heads.per_pixel import identity_values
from denselab.types import FeatureSpec, HeadSpec, MaskNorm, QueryOutput, ValueKind


def bilinear_kernel(scale: int) -> Tensor:
    """Kernel [2 scale, 2 scale] with which a transposed convolution of stride `scale` interpolates bilinearly."""
    offsets = torch.arange(2 * scale) - (scale - 0.5)
    weights = 1 - offsets.abs() / scale
    return weights[:, None] * weights[None, :]


class ScoreFusionHead(nn.Module):
    """A 1x1 convolution to class scores per map; scores upsampled 2x and added to those of the next finer map.

    Upsampling is a transposed convolution per class that begins as bilinear interpolation and is learned; the
    scores of the skips begin at zero, so that training begins as FCN-32s (section 4.2). The last upsampling, from
    the finest map here to the image, is the decode's fixed bilinear one, as in the paper.
    """

    def __init__(self, inputs: tuple[FeatureSpec, ...], num_classes: int) -> None:
        super().__init__()
        self.scores = nn.ModuleList(nn.Conv2d(f.channels, num_classes, 1) for f in inputs)
        self.upsample = nn.ModuleList(
            nn.ConvTranspose2d(num_classes, num_classes, 4, 2, padding=1, groups=num_classes, bias=False)
            for _ in inputs[:-1]
        )
        with torch.no_grad():
            for layer in self.scores[:-1]:
                for parameter in layer.parameters():
                    parameter.zero_()
            for layer in self.upsample:
                for parameter in layer.parameters():
                    parameter.copy_(bilinear_kernel(2).expand_as(parameter))
        self.spec = HeadSpec(num_classes, num_classes, inputs[0].stride, MaskNorm.SOFTMAX, ValueKind.IDENTITY)

    def forward(self, maps: tuple[Tensor, ...]) -> QueryOutput:
        mask_logits = self.scores[-1](maps[-1])
        for level in range(len(maps) - 2, -1, -1):
            mask_logits = self.upsample[level](mask_logits) + self.scores[level](maps[level])
        return QueryOutput(mask_logits, identity_values(mask_logits))
