"""Encoder-only mask transformer: the last blocks of a plain vision transformer are the decoder.

Kerssies, Cavagnero, Hermans, Norouzi, Averta, Leibe, Dubbelman, de Geus: Your ViT is Secretly an Image Segmentation
Model, CVPR 2025 (EoMT), section 3.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from denselab.backbones.simple_pyramid import ChannelNorm
from denselab.types import FeatureSpec, HeadSpec, MaskNorm, QueryOutput, ValueKind


def annealed(progress: float, block: int, num_blocks: int, power: float = 0.9) -> float:
    """Probability that a query of `block` (0 the first of num_blocks) is masked, when `progress` of training is over.

    1 until the block's turn, then (1 - share of its turn)^power, then 0. Each turn lasts a sixth of the training;
    the first begins after one sixth, the last ends one sixth before the end, the rest evenly between (the step
    counts in the authors' settings; the paper's section 3.3 says only that earlier blocks come first).
    """
    last = max(num_blocks - 1, 1)
    begin = 1 / 6 + block / last / 2
    return (1 - min(max((progress - begin) * 6, 0.0), 1.0)) ** power


class UpscaleBlock(nn.Sequential):
    """2x2 transposed convolution of stride 2, GELU, depthwise 3x3 convolution, layer norm (section 3.2)."""

    def __init__(self, width: int) -> None:
        super().__init__(
            nn.ConvTranspose2d(width, width, 2, 2),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False),
            ChannelNorm(width, eps=1e-6),
        )


class EomtHead(nn.Module):
    """Queries that join the tokens of a plain transformer before its last blocks, and there become masks and classes.

    inputs: the patch tokens, and the class token and registers if there are any, as PlainTokens gives them; blocks,
    norm: the rest of that transformer, which this head owns (both from `backbones.plain_tokens.split_transformer`).
    rope: the rotary embedding of that transformer (`PlainTokens.rope`), if it has one; queries have no place and are
    not turned, as the class token is not. timm's for DINOv3 makes numbers of the sides of the grid, so that such a
    model traces at one size only.
    The mask of a query is the dot product of an MLP of it with the patch tokens, which are upscaled to stride 4, and
    always at least once. In training, masks and classes are predicted before each block too; there a query attends,
    among the patches, only to those that its mask of that moment claims, with a probability that `set_progress`
    anneals from 1 to 0 block by block (section 3.3). Until it is first called the probability is 0, so that a
    training without a schedule trains what is then run.
    Deviation: in evaluation no query is ever masked, also in the middle of a training, where the authors' validation
    still masks: what is measured is what is exported.
    """

    def __init__(
        self,
        inputs: tuple[FeatureSpec, ...],
        blocks: nn.ModuleList,
        norm: nn.Module,
        num_classes: int,
        num_queries: int = 200,
        rope: nn.Module | None = None,
    ) -> None:
        super().__init__()
        width, stride = inputs[0].channels, inputs[0].stride
        upscalings = max(1, round(math.log2(stride)) - 2)
        self.blocks = blocks
        self.norm = norm
        self.rope: Any = rope
        if rope is not None:
            attentions: list[Any] = [block.attn for block in blocks]
            for attention in attentions:
                attention.num_prefix_tokens += num_queries
        self.queries = nn.Parameter(torch.randn(num_queries, width))
        self.classify = nn.Linear(width, num_classes + 1)
        self.mask_kernel = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)
        )
        self.upscale = nn.Sequential(*(UpscaleBlock(width) for _ in range(upscalings)))
        self.mask_probs: Tensor
        self.register_buffer("mask_probs", torch.zeros(len(blocks)), persistent=False)
        mask_stride = stride // 2**upscalings
        one = HeadSpec(num_queries, num_classes + 1, mask_stride, MaskNorm.SIGMOID, ValueKind.CLASS_LOGITS)
        self.spec = replace(one, aux=(one,) * len(blocks))

    def set_progress(self, progress: float) -> None:
        """Set how often each block masks its attention, for a training of which the share `progress`, 0..1, is over."""
        count = len(self.blocks)
        self.mask_probs.copy_(torch.tensor([annealed(progress, block, count) for block in range(count)]))

    def forward(self, maps: tuple[Tensor, ...]) -> QueryOutput:
        batch = maps[0].shape[0]
        grid_hw = (maps[0].shape[-2], maps[0].shape[-1])
        parts = [self.queries.expand(batch, -1, -1)]
        parts += [m.flatten(2).transpose(1, 2) for m in (*maps[1:], maps[0])]
        tokens = torch.cat(parts, dim=1)
        places = {} if self.rope is None else {"rope": self.rope.get_embed(grid_hw)}
        earlier: list[QueryOutput] = []
        for block, mask_prob in zip(self.blocks, self.mask_probs, strict=True):
            if not self.training:
                tokens = block(tokens, **places)
                continue
            earlier.append(self._predict(tokens, grid_hw))
            tokens = block(tokens, attn_mask=self._allowed(tokens, earlier[-1], grid_hw, mask_prob), **places)
        return replace(self._predict(tokens, grid_hw), aux=tuple(earlier))

    def _predict(self, tokens: Float[Tensor, "B T C"], grid_hw: Sequence[int]) -> QueryOutput:
        tokens = self.norm(tokens)
        queries = tokens[:, : self.spec.num_queries]
        patches = tokens[:, -(grid_hw[0] * grid_hw[1]) :].transpose(1, 2).unflatten(2, grid_hw)
        mask_logits = torch.einsum("bqc,bchw->bqhw", self.mask_kernel(queries), self.upscale(patches))
        return QueryOutput(mask_logits, self.classify(queries))

    @torch.no_grad()
    def _allowed(
        self, tokens: Float[Tensor, "B T C"], output: QueryOutput, grid_hw: Sequence[int], mask_prob: Tensor
    ) -> Bool[Tensor, "B 1 T T"]:
        """Which token attends to which: all to all, but masked queries, among the patches, to those of their mask."""
        batch, count = tokens.shape[:2]
        queries = self.spec.num_queries
        mask_logits = F.interpolate(output.mask_logits, size=grid_hw, mode="bilinear", align_corners=False)
        unmasked = torch.rand(batch, queries, 1, device=tokens.device) >= mask_prob
        allowed = torch.ones(batch, count, count, dtype=torch.bool, device=tokens.device)
        allowed[:, :queries, -(grid_hw[0] * grid_hw[1]) :] = (mask_logits.flatten(2) > 0) | unmasked
        return allowed[:, None]
