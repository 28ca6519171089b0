"""Per-pixel regression: a few convolutions whose channels are the answer.

Ranftl, Bochkovskiy, Koltun: Vision Transformers for Dense Prediction, ICCV 2021 (DPT): its head for depth.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from denselab.heads.per_pixel import identity_values
from denselab.heads.values import Values, activated
from denselab.types import FeatureSpec, HeadSpec, MaskNorm, QueryOutput, ValueKind


class RegressionHead(nn.Module):
    """3x3 convolution to half the channels, 2x upsampling, 3x3 convolution, ReLU, 1x1 convolution to the value.

    The special case Q = D, values = identity of the mask view: mask channel d is component d of the answer, metres
    and not their logits where the values are depths. A map at stride 1 is not upsampled.
    Deviations: upsampling is bilinear without aligned corners, so that a map's cells stay where they are at any
    size; depths are bounded (`denselab.heads.values`) where DPT ends in a ReLU, which can die and knows no bounds.
    """

    def __init__(self, inputs: tuple[FeatureSpec, ...], values: Values, width: int = 32) -> None:
        super().__init__()
        finest = inputs[0]
        self.values = values
        self.scale = 2 if finest.stride > 1 else 1
        self.reduce = nn.Conv2d(finest.channels, finest.channels // 2, 3, padding=1)
        self.refine = nn.Conv2d(finest.channels // 2, width, 3, padding=1)
        self.regress = nn.Conv2d(width, values.dim, 1)
        self.spec = HeadSpec(values.dim, values.dim, finest.stride // self.scale, MaskNorm.SOFTMAX, ValueKind.IDENTITY)

    def forward(self, maps: tuple[Tensor, ...]) -> QueryOutput:
        x = self.reduce(maps[0])
        if self.scale > 1:
            size_hw = (x.shape[-2] * self.scale, x.shape[-1] * self.scale)
            x = F.interpolate(x, size=size_hw, mode="bilinear", align_corners=False)
        answer = activated(self.regress(F.relu(self.refine(x))), self.values)
        return QueryOutput(answer, identity_values(answer))
