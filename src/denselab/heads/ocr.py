"""Object-contextual representations: a pixel is told what the regions of the classes around it look like.

Yuan, Chen, Wang: Object-Contextual Representations for Semantic Segmentation, ECCV 2020, section 3.2 and Fig. 3.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from denselab.heads.per_pixel import identity_values
from denselab.layers import conv_bn_relu
from denselab.types import FeatureSpec, HeadSpec, MaskNorm, QueryOutput, ValueKind


class OcrHead(nn.Module):
    """A per-pixel classifier on pixels augmented by object regions; a first classifier supplies the soft regions.

    All maps are brought to the finest and joined, as the paper does with HRNet; the soft regions and the pixels come
    from that map (with a dilated ResNet the paper takes the regions from an earlier stage). In training `aux` holds
    the logits of the regions, which are classes too (weight 0.4 in the paper).
    width: channels of pixels and regions; key_channels: of queries, keys and the context.
    """

    def __init__(
        self,
        inputs: tuple[FeatureSpec, ...],
        num_classes: int,
        width: int = 512,
        key_channels: int = 256,
        dropout: float = 0.05,
    ) -> None:
        super().__init__()
        channels = sum(f.channels for f in inputs)
        self.regions = nn.Sequential(conv_bn_relu(channels, channels, 1), nn.Conv2d(channels, num_classes, 1))
        self.pixels = conv_bn_relu(channels, width)
        self.context = ObjectContext(width, key_channels)
        self.augment = nn.Sequential(conv_bn_relu(2 * width, width, 1), nn.Dropout2d(dropout))
        self.classify = nn.Conv2d(width, num_classes, 1)
        regions = HeadSpec(num_classes, num_classes, inputs[0].stride, MaskNorm.SOFTMAX, ValueKind.IDENTITY)
        self.spec = HeadSpec(
            num_classes, num_classes, inputs[0].stride, MaskNorm.SOFTMAX, ValueKind.IDENTITY, aux=(regions,)
        )

    def forward(self, maps: tuple[Tensor, ...]) -> QueryOutput:
        size_hw = maps[0].shape[-2:]
        coarser = [F.interpolate(m, size=size_hw, mode="bilinear", align_corners=False) for m in maps[1:]]
        joined = torch.cat([maps[0], *coarser], dim=1)
        region_logits = self.regions(joined)
        pixels = self.pixels(joined)
        context = self.context(pixels, object_regions(pixels, region_logits))
        mask_logits = self.classify(self.augment(torch.cat([context, pixels], dim=1)))
        values = identity_values(mask_logits)
        aux = (QueryOutput(region_logits, values),) if self.training else ()
        return QueryOutput(mask_logits, values, aux=aux)


def object_regions(
    pixels: Float[Tensor, "B C h w"], region_logits: Float[Tensor, "B K h w"]
) -> Float[Tensor, "B C K 1"]:
    """Representation of every region: f_k = sum_i m_ki x_i, with m_k the softmax over pixels i of its logits."""
    shares = region_logits.flatten(2).softmax(dim=2)
    return (pixels.flatten(2) @ shares.transpose(1, 2))[..., None]


class ObjectContext(nn.Module):
    """y_i = output(sum_k w_ik value(f_k)), with w_i the softmax over regions k of query(x_i) . key(f_k).

    All transforms are 1x1 convolutions with batch norm and ReLU, two for queries and keys and one for values and
    output. Products are divided by sqrt(key_channels), as in the authors' code and not in the paper.
    """

    def __init__(self, width: int, key_channels: int) -> None:
        super().__init__()
        self.query = nn.Sequential(conv_bn_relu(width, key_channels, 1), conv_bn_relu(key_channels, key_channels, 1))
        self.key = nn.Sequential(conv_bn_relu(width, key_channels, 1), conv_bn_relu(key_channels, key_channels, 1))
        self.value = conv_bn_relu(width, key_channels, 1)
        self.output = conv_bn_relu(key_channels, width, 1)
        self.scale = key_channels**-0.5

    def forward(self, pixels: Float[Tensor, "B C h w"], regions: Float[Tensor, "B C K 1"]) -> Float[Tensor, "B C h w"]:
        query, key, value = (each.flatten(2) for each in (self.query(pixels), self.key(regions), self.value(regions)))
        relation = (key.transpose(1, 2) @ query * self.scale).softmax(dim=1)
        return self.output((value @ relation).unflatten(2, pixels.shape[-2:]))
