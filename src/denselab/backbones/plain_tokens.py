"""The first blocks of a plain vision transformer as a backbone, and its last blocks for a head to run.

For EoMT (Kerssies et al., CVPR 2025), whose queries join the tokens before the last blocks.
"""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from denselab import _vision as _vision  # before timm, which imports torchvision

# isort: split
import timm
import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from denselab.backbones.portable_resize import PortableResize
from denselab.errors import InputError
from denselab.types import FeatureSpec

# The stride of tokens that belong to no place in the image.
PLACELESS = 0

PlainTransformer = VisionTransformer | Eva
"""timm's two: positions are added to the tokens, or also turn queries and keys in every block (EVA-02, DINOv3)."""


class PlainTokens(nn.Module):
    """Tokens after the blocks of a plain transformer, for any input size.

    Gives the patch tokens as a map [B, C, h, w] and, where the transformer has a class token or registers, these as
    a second map [B, C, P, 1], which `features` announces with the stride PLACELESS. No norm is applied.
    Positions are resampled to the size of the image; an image for 14-px patches is resized by 14/16, so that strides
    are powers of two.
    """

    def __init__(self, net: PlainTransformer) -> None:
        super().__init__()
        self.net: Any = net
        self.patch_px = int(self.net.patch_embed.patch_size[0])
        self.num_prefix_tokens = int(self.net.num_prefix_tokens)
        self.size_multiple = 2 ** round(math.log2(self.patch_px))
        patches = FeatureSpec(int(self.net.embed_dim), self.size_multiple)
        prefix = FeatureSpec(patches.channels, PLACELESS)
        self.features = (patches, prefix) if self.num_prefix_tokens else (patches,)
        self.mean: tuple[float, float, float] = tuple(self.net.pretrained_cfg["mean"])
        self.std: tuple[float, float, float] = tuple(self.net.pretrained_cfg["std"])

    @property
    def rope(self) -> nn.Module | None:
        """Rotary positions of a grid, `get_embed(grid_hw)`, for the blocks that follow; None where there are none."""
        return getattr(self.net, "rope", None)

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> tuple[Tensor, ...]:
        if self.patch_px != self.size_multiple:
            size_hw = [side // self.size_multiple * self.patch_px for side in pixels.shape[-2:]]
            pixels = F.interpolate(pixels, size=size_hw, mode="bilinear", align_corners=False)
        with PortableResize() if torch.compiler.is_exporting() else nullcontext():
            _, (tokens,) = self.net.forward_intermediates(
                pixels, indices=1, return_prefix_tokens=self.num_prefix_tokens > 0
            )
        if self.num_prefix_tokens == 0:
            return (tokens,)
        patches, prefix = tokens
        return patches, prefix.transpose(1, 2)[..., None]


def split_transformer(
    name: str, pretrained: bool = False, num_last: int = 4, options: Mapping[str, Any] | None = None
) -> tuple[PlainTokens, nn.ModuleList, nn.Module]:
    """A plain transformer of timm in parts: the tokens before its last blocks, those blocks, and the final norm.

    name, pretrained, options: as for TimmBackbone; of a model that timm builds as a VisionTransformer (vit_*, deit_*)
    or an Eva (eva02_*, vit_*_dinov3). Raises InputError: no such model, not a plain transformer, rotary positions that
    differ from block to block, no or unreachable weights, not more than num_last blocks.
    """
    net: Any = _plain_transformer(name, pretrained, dict(options or {}))
    blocks = list(net.blocks)
    if not 0 < num_last < len(blocks):
        raise InputError(f"num_last: {name!r} has {len(blocks)} blocks; wanted 1 to {len(blocks) - 1}, got {num_last}")
    norm = net.fc_norm if isinstance(net.norm, nn.Identity) else net.norm  # fc_norm where timm pools by averaging
    del net.blocks[-num_last:]
    net.norm = net.fc_norm = nn.Identity()
    return PlainTokens(net), nn.ModuleList(blocks[-num_last:]), norm


def _plain_transformer(name: str, pretrained: bool, options: dict[str, Any]) -> PlainTransformer:
    wanted = f"backbone: wanted a plain vision transformer of timm (vit_*, deit_*, eva02_*), got {name!r}"
    try:
        net: Any = timm.create_model(name, pretrained, num_classes=0, dynamic_img_size=True, **options)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"{wanted} ({error})") from error
    except OSError as error:
        hint = "connect to the internet once, or leave pretrained out"
        raise InputError(f"backbone: the weights of {name!r} are neither cached nor in reach; {hint}") from error
    if not isinstance(net, PlainTransformer):
        raise InputError(
            f"{wanted}, which timm builds as {type(net).__name__}; choose another, say vit_small_patch16_224"
        )
    if getattr(net, "rope_mixed", False):
        raise InputError(f"{wanted}, whose rotary positions differ from block to block; choose another")
    net.reset_classifier(0, "")  # drops a pooling by attention, which would never be trained
    return net
