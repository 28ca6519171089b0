"""The per-pixel classifier: one query per class whose value is that class."""

import torch
from torch import Tensor, nn

from denselab.types import FeatureSpec, HeadSpec, MaskNorm, QueryOutput, ValueKind


class PerPixelHead(nn.Module):
    """A 1x1 convolution on the finest map: mask logit q is the logit of class q (Long et al. 2015).

    The special case Q = K, D = K, values = identity of the mask view (MaskFormer, section 3.1).
    """

    def __init__(self, inputs: tuple[FeatureSpec, ...], num_classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout2d(dropout)
        self.classify = nn.Conv2d(inputs[0].channels, num_classes, 1)
        self.spec = HeadSpec(num_classes, num_classes, inputs[0].stride, MaskNorm.SOFTMAX, ValueKind.IDENTITY)

    def forward(self, maps: tuple[Tensor, ...]) -> QueryOutput:
        mask_logits = self.classify(self.dropout(maps[0]))
        return QueryOutput(mask_logits, identity_values(mask_logits))


def identity_values(mask_logits: Tensor) -> Tensor:
    """Values [B, K, K] of a per-pixel classifier with mask logits [B, K, h, w]."""
    batch, classes = mask_logits.shape[:2]
    eye = torch.eye(classes, dtype=mask_logits.dtype, device=mask_logits.device)
    return eye.expand(batch, classes, classes)
