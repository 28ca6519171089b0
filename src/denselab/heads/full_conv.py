"""LinkNet's head: a 2x2 transposed convolution from stride 2 to class scores of every pixel."""

from torch import Tensor, nn

from denselab.heads.per_pixel import identity_values
from denselab.types import FeatureSpec, HeadSpec, MaskNorm, QueryOutput, ValueKind


class FullConvHead(nn.Module):
    """Transposed convolution, 2x2 with stride 2, on the finest map (Chaurasia et al. 2017, Fig. 1)."""

    def __init__(self, inputs: tuple[FeatureSpec, ...], num_classes: int) -> None:
        super().__init__()
        self.classify = nn.ConvTranspose2d(inputs[0].channels, num_classes, 2, 2)
        self.spec = HeadSpec(num_classes, num_classes, inputs[0].stride // 2, MaskNorm.SOFTMAX, ValueKind.IDENTITY)

    def forward(self, maps: tuple[Tensor, ...]) -> QueryOutput:
        mask_logits = self.classify(maps[0])
        return QueryOutput(mask_logits, identity_values(mask_logits))
