"""The transformer decoder of Mask2Former: queries attend to where their own masks are.

Cheng, Misra, Schwing, Kirillov, Girdhar: Masked-attention Mask Transformer for Universal Image Segmentation,
CVPR 2022, section 3.2.
"""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from denselab.types import FeatureSpec, HeadSpec, MaskNorm, QueryOutput, ValueKind


def sine_positions(map_: Float[Tensor, "B C h w"], channels: int) -> Float[Tensor, "1 P channels"]:
    """Positions of the P = h * w cells of a map of any size: half the channels say how far down, half how far right.

    Sines and cosines, interleaved, of wavelengths 2 pi .. 2 pi * 10000 of the place in the map, 0 .. 2 pi
    (Vaswani et al. 2017, section 3.5, in two dimensions as in Carion et al. 2020, appendix A.4).
    """
    pairs = torch.arange(channels // 4, device=map_.device)
    frequencies = 10000 ** (-4 * pairs / channels)

    def along(size: int) -> Float[Tensor, "size half"]:
        place = torch.arange(1, size + 1, device=map_.device)
        phase = (place / (place[-1] + 1e-6) * 2 * math.pi)[:, None] * frequencies
        return torch.stack([phase.sin(), phase.cos()], dim=2).flatten(1)

    height, width = map_.shape[-2:]
    down = along(height)[:, None].expand(-1, width, -1)
    right = along(width)[None].expand(height, -1, -1)
    return torch.cat([down, right], dim=2).flatten(0, 1)[None].to(map_.dtype)


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, section 3.2.2), its residual, and layer norm after it."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.project = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(
        self,
        queries: Float[Tensor, "B Q C"],
        query_positions: Float[Tensor, "1 Q C"],
        tokens: Float[Tensor, "B P C"],
        token_positions: Float[Tensor, "1 P C"],
        allowed: Bool[Tensor, "B Q P"] | None = None,
    ) -> Float[Tensor, "B Q C"]:
        query = self._heads(self.query(queries + query_positions))
        key = self._heads(self.key(tokens + token_positions))
        value = self._heads(self.value(tokens))
        mask = None if allowed is None else allowed[:, None]
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.norm(queries + self.project(attended.transpose(1, 2).flatten(2)))

    def _heads(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B heads N c"]:
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


class MaskedAttentionLayer(nn.Module):
    """Masked cross-attention, self-attention and feed-forward network, each with residual and norm (Fig. 2, right)."""

    def __init__(self, width: int, num_heads: int, feed_forward: int) -> None:
        super().__init__()
        self.cross_attention = Attention(width, num_heads)
        self.self_attention = Attention(width, num_heads)
        self.expand = nn.Linear(width, feed_forward)
        self.contract = nn.Linear(feed_forward, width)
        self.norm = nn.LayerNorm(width)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(
        self,
        queries: Float[Tensor, "B Q C"],
        query_positions: Float[Tensor, "1 Q C"],
        tokens: Float[Tensor, "B P C"],
        token_positions: Float[Tensor, "1 P C"],
        allowed: Bool[Tensor, "B Q P"],
    ) -> Float[Tensor, "B Q C"]:
        queries = self.cross_attention(queries, query_positions, tokens, token_positions, allowed)
        queries = self.self_attention(queries, query_positions, queries, query_positions)
        return self.norm(queries + self.contract(F.relu(self.expand(queries))))


class MaskedAttentionHead(nn.Module):
    """Queries that say a class and a mask each, refined by layers that attend to the maps from coarse to fine.

    inputs: the finest map gives the mask features, on whose grid the masks are; up to `num_scales` of the others
    are attended to in round robin, coarsest first (a single map is both). num_layers: 9, three rounds of three
    scales. Before the first layer and after each one every query says its mask and class; in training all of these
    are returned. A query attends only to the cells that its previous mask claims, mask_prob >= 0.5 after bilinear
    resizing to the map of the layer, and to all cells where it claims none (eq. 2, 3).

    Masks of the layers are resized before they are computed: resizing the mask features once per scale, and only
    then taking their dot product with a query, gives the same numbers for a fraction of the work.
    No dropout, as in section 3.2.2. Cells of the padding take part, as in the authors' code.
    """

    def __init__(
        self,
        inputs: tuple[FeatureSpec, ...],
        num_classes: int,
        num_queries: int = 100,
        num_layers: int = 9,
        num_scales: int = 3,
        width: int = 256,
        num_heads: int = 8,
        feed_forward: int = 2048,
    ) -> None:
        super().__init__()
        self.attended = (inputs[1:] or inputs)[-num_scales:]
        self.projections = nn.ModuleList(
            nn.Conv2d(f.channels, width, 1) if f.channels != width else nn.Identity() for f in self.attended
        )
        self.level_embeddings = nn.Parameter(torch.randn(len(self.attended), width))
        self.query_features = nn.Parameter(torch.randn(num_queries, width))
        self.query_positions = nn.Parameter(torch.randn(num_queries, width))
        self.layers = nn.ModuleList(MaskedAttentionLayer(width, num_heads, feed_forward) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)
        self.classify = nn.Linear(width, num_classes + 1)
        self.mask_kernel = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, inputs[0].channels)
        )
        one = HeadSpec(num_queries, num_classes + 1, inputs[0].stride, MaskNorm.SIGMOID, ValueKind.CLASS_LOGITS)
        self.spec = replace(one, aux=(one,) * num_layers)

    def forward(self, maps: tuple[Tensor, ...]) -> QueryOutput:
        mask_features = maps[0]
        scales = maps[-len(self.attended) :]
        tokens: list[Tensor] = []
        for scale, project, embedding in zip(scales, self.projections, self.level_embeddings, strict=True):
            tokens.append(project(scale).flatten(2).transpose(1, 2) + embedding)
        positions = [sine_positions(scale, self.query_features.shape[1]) for scale in scales]
        resized = [_resize(mask_features.detach(), scale) for scale in scales]

        query_positions = self.query_positions[None]
        queries = self.query_features.expand(mask_features.shape[0], -1, -1)
        earlier: list[QueryOutput] = []
        for index, layer in enumerate(self.layers):
            if self.training:
                earlier.append(self._predict(queries, mask_features))
            at = -1 - index % len(scales)  # coarsest first
            allowed = where_masks_are(self.mask_kernel(self.norm(queries)).detach(), resized[at])
            queries = layer(queries, query_positions, tokens[at], positions[at], allowed)
        return replace(self._predict(queries, mask_features), aux=tuple(earlier))

    def _predict(self, queries: Float[Tensor, "B Q C"], mask_features: Float[Tensor, "B C2 h w"]) -> QueryOutput:
        queries = self.norm(queries)
        mask_logits = torch.einsum("bqc,bchw->bqhw", self.mask_kernel(queries), mask_features)
        return QueryOutput(mask_logits, self.classify(queries))


def where_masks_are(kernels: Float[Tensor, "B Q C"], mask_features: Float[Tensor, "B C h w"]) -> Bool[Tensor, "B Q P"]:
    """Whether a query may attend to a cell: in its mask, or anywhere where its mask is empty."""
    mask_logits = kernels @ mask_features.flatten(2)
    return (mask_logits >= 0) | (mask_logits.amax(dim=2, keepdim=True) < 0)


def _resize(mask_features: Float[Tensor, "B C h w"], like: Float[Tensor, "B C2 h2 w2"]) -> Tensor:
    return F.interpolate(mask_features, size=like.shape[-2:], mode="bilinear", align_corners=False)
