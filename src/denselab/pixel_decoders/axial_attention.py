"""Axial attention with relative positions: every cell of a map looks along its column, then along its row.

Wang, Zhu, Green, Adam, Yuille, Chen: Axial-DeepLab: Stand-Alone Axial-Attention for Panoptic Segmentation,
ECCV 2020; as kMaX-DeepLab's pixel decoder uses it (kmax-deeplab@f8e1d04 kmax_pixel_decoder.py).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from denselab.layers import Norm, conv_norm, logit_norm, norm_layer, truncated_normal_

SPAN = 255  # cells that a table of relative positions reaches, the cell itself counted


class RelativePositions(nn.Embedding):
    """One learned vector per distance key - query, -254 .. 254 cells; farther keys take that of the farthest.

    The published tables are cut out for one length at construction; here they serve any length.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(2 * SPAN - 1, channels)
        truncated_normal_(self.weight, 1.0)

    def forward(self, input: Float[Tensor, "*batch L C"]) -> Float[Tensor, "L L D"]:
        """Vectors [query, key] for a sequence as long as `input`."""
        place = torch.arange(input.shape[-2], device=input.device)
        distance = (place - place[:, None]).clamp(1 - SPAN, SPAN - 1)
        return super().forward(distance + SPAN - 1)


class AxialAttention(nn.Module):
    """Attention along the columns of a map (eq. 4), with position terms for query, key and value.

    The three similarities q k, q r_q, k r_k have their own norm each, per head, in place of 1 / sqrt(d), and are then
    summed; so have the two results, of content and of position. With Norm.GROUP the similarities begin at
    1 / sqrt(d) times a learned scale.
    """

    def __init__(self, inputs: int, key_width: int, value_width: int, num_heads: int, norm: Norm) -> None:
        super().__init__()
        self.widths = (key_width, key_width, value_width)
        self.num_heads = num_heads
        self.qkv = conv_norm(inputs, sum(self.widths), norm, std=inputs**-0.5)
        self.query_positions = RelativePositions(key_width // num_heads)
        self.key_positions = RelativePositions(key_width // num_heads)
        self.value_positions = RelativePositions(value_width // num_heads)
        self.norm_similarity = logit_norm(norm, 3 * num_heads, group_scale=(key_width // num_heads) ** -0.5)
        self.norm_retrieved = norm_layer(norm, 2 * value_width)

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B V h w"]:
        batch, _, height, width = x.shape
        q, k, v = (self._columns(part) for part in self.qkv(x).split(self.widths, dim=1))
        content = q @ k.transpose(-2, -1)
        by_query = torch.einsum("nald,lmd->nalm", q, self.query_positions(q))
        by_key = torch.einsum("namd,lmd->nalm", k, self.key_positions(k))
        similarity = self.norm_similarity(torch.cat([content, by_query, by_key], dim=1))
        content, by_query, by_key = similarity.chunk(3, dim=1)
        weights = F.softmax(content + by_query + by_key, dim=-1, dtype=torch.float32).to(v.dtype)
        retrieved = torch.cat([weights @ v, torch.einsum("nalm,lmd->nald", weights, self.value_positions(v))], dim=1)
        maps = retrieved.reshape(batch, width, 2 * self.num_heads, height, -1).permute(0, 2, 4, 3, 1)
        content, position = self.norm_retrieved(maps.reshape(batch, -1, height, width)).chunk(2, dim=1)
        return content + position

    def _columns(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "N A h D"]:
        """Every column a sequence, N = B * w, of A heads."""
        batch, channels, height, width = x.shape
        heads = x.reshape(batch, self.num_heads, channels // self.num_heads, height, width)
        return heads.permute(0, 4, 1, 3, 2).flatten(0, 1)


class AxialAttention2d(nn.Module):
    """Attention along the columns, then along the rows (section 3.2); values twice as wide as keys."""

    def __init__(self, inputs: int, width: int, num_heads: int, norm: Norm) -> None:
        super().__init__()
        self.columns = AxialAttention(inputs, width, 2 * width, num_heads, norm)
        self.rows = AxialAttention(2 * width, width, 2 * width, num_heads, norm)

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B V h w"]:
        return self.rows(self.columns(x).transpose(2, 3)).transpose(2, 3)
