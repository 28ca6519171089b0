"""EoMT of transformers: a plain vision transformer whose last blocks see the queries too.

Kerssies, Cavagnero, Hermans, Norouzi, Averta, Leibe, Dubbelman, de Geus: Your ViT is Secretly an Image Segmentation
Model, CVPR 2025, Fig. 2.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import EomtForUniversalSegmentation

from denselab.backbones.portable_resize import resize_cubic
from denselab.errors import InputError
from denselab.hub.parts import HubSettings, resize, to_map, to_tokens
from denselab.model import DensePredictor
from denselab.pixel_decoders.pass_through import PassThrough
from denselab.types import FeatureSpec, HeadSpec, MaskNorm, QueryOutput, ValueKind

_HIDDEN = -1e9
"""What transformers adds to the attention logits of a patch that a query must not see."""


class PlainTransformer(nn.Module):
    """The blocks before the queries: the map of the patches and, after it, the prefix tokens [B, P, C].

    The position embeddings are those of one square image; for other sizes they are resized (bicubic, antialiased).
    """

    def __init__(self, embeddings: Any, blocks: nn.ModuleList, settings: HubSettings) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.blocks = blocks
        self.features = (FeatureSpec(embeddings.config.hidden_size, embeddings.config.patch_size),)
        self.size_multiple = embeddings.config.patch_size
        self.mean, self.std = settings.mean, settings.std

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> tuple[Tensor, ...]:
        embeddings = self.embeddings
        height, width = pixels.shape[-2] // self.size_multiple, pixels.shape[-1] // self.size_multiple
        patches = to_map(embeddings.patch_embeddings(pixels), height, width)
        prefix = torch.cat([embeddings.cls_token, embeddings.register_tokens], dim=1).expand(len(pixels), -1, -1)
        tokens = to_tokens(prefix, patches + self.positions(height, width))
        tokens = embeddings.dropout(tokens)
        for block in self.blocks:
            tokens = block(tokens, None)
        return to_map(tokens[:, prefix.shape[1] :], height, width), tokens[:, : prefix.shape[1]]

    def positions(self, height: int, width: int) -> Float[Tensor, "1 C height width"]:
        """The position embeddings of a grid of patches."""
        side = self.embeddings.config.image_size // self.size_multiple
        return resize_cubic(to_map(self.embeddings.position_embeddings.weight[None], side, side), (height, width))


class QueryBlocksHead(nn.Module):
    """Queries join the tokens for the last blocks; then they say a class each, and cut a mask from the patches.

    masked: whether in each block queries look only at the patches of their mask so far. The published models were
    trained until that was no longer needed. aux: what the queries say before each block, while training.
    """

    def __init__(self, net: Any, inputs: tuple[FeatureSpec, ...], masked: tuple[bool, ...]) -> None:
        super().__init__()
        config = net.config
        self.query, self.layernorm = net.query, net.layernorm
        self.blocks = net.layers[-config.num_blocks :]
        self.upscale, self.embed_mask, self.classify = net.upscale_block, net.mask_head, net.class_predictor
        self.masked = masked
        self.num_heads: int = config.num_attention_heads
        stride, rest = divmod(inputs[0].stride, 2**config.num_upscale_blocks)
        if rest:
            raise InputError(
                f"config: patch_size: wanted a multiple of {2**config.num_upscale_blocks}, got {inputs[0]}"
            )
        queries, width = config.num_queries, config.num_labels + 1
        one = HeadSpec(queries, width, stride, MaskNorm.SIGMOID, ValueKind.CLASS_LOGITS)
        aux = (one,) * config.num_blocks
        self.spec = HeadSpec(queries, width, stride, MaskNorm.SIGMOID, ValueKind.CLASS_LOGITS, aux)

    def forward(self, maps: tuple[Tensor, ...]) -> QueryOutput:
        patches, prefix = maps
        height, width = patches.shape[-2:]
        queries = self.query.weight.expand(len(patches), -1, -1)
        tokens = to_tokens(torch.cat([queries, prefix], dim=1), patches)
        before = self.spec.num_queries + prefix.shape[1]
        aux: list[QueryOutput] = []
        hidden = None
        for block, masked in zip(self.blocks, self.masked, strict=True):
            if masked or self.training:
                aux.append(self.say(self.layernorm(tokens), before, height, width))
            if masked:
                hidden = self.hidden(aux[-1].mask_logits, before, height, width)
            tokens = block(tokens, hidden)
        last = self.say(self.layernorm(tokens), before, height, width)
        return QueryOutput(last.mask_logits, last.values, aux=tuple(aux) if self.training else ())

    def say(self, tokens: Float[Tensor, "B N C"], before: int, height: int, width: int) -> QueryOutput:
        """Masks and class logits of the queries; before: how many tokens come before the patches."""
        queries, patches = tokens[:, : self.spec.num_queries], to_map(tokens[:, before:], height, width)
        masks = torch.einsum("bqc,bchw->bqhw", self.embed_mask(queries), self.upscale(patches))
        return QueryOutput(masks, self.classify(queries))

    def hidden(
        self, masks: Float[Tensor, "B Q h w"], before: int, height: int, width: int
    ) -> Float[Tensor, "B heads N N"]:
        """What is added to attention logits: from queries to patches outside their masks, a large negative number.

        To all other logits one is added, as transformers does; a softmax takes no notice.
        """
        count = before + height * width
        inside: Bool[Tensor, "B Q patches"] = resize(masks, (height, width)).flatten(2) > 0
        rows = torch.cat([inside.new_ones(*inside.shape[:2], before), inside], dim=2)
        rest = inside.new_ones(inside.shape[0], count - inside.shape[1], count)
        seen = torch.cat([rows, rest], dim=1)[:, None].expand(-1, self.num_heads, -1, -1)
        return seen.float().masked_fill(~seen, _HIDDEN)


def masked_blocks(net: EomtForUniversalSegmentation) -> tuple[bool, ...]:
    """Whether each of the last blocks masks. Raises InputError where the training was stopped half-way."""
    probs: list[float] = net.attn_mask_probs.tolist()
    if any(0 < prob < 1 for prob in probs):
        raise InputError(
            f"attn_mask_probs: wanted 0 or 1 for every block, got {probs}: this training was stopped while masks were "
            "phased out, and the network answers at random; train it to the end"
        )
    return tuple(prob == 1 for prob in probs)


def eomt(net: EomtForUniversalSegmentation, settings: HubSettings) -> DensePredictor:
    """Its weights lie below `backbone.embeddings`, `backbone.blocks` (theirs: the first `layers`), `head.blocks` (the
    last), `head.query`, `head.layernorm`, `head.upscale` (`upscale_block`), `head.embed_mask` (`mask_head`) and
    `head.classify` (`class_predictor`).
    """
    backbone = PlainTransformer(net.embeddings, net.layers[: -net.config.num_blocks], settings)
    decoder = PassThrough(backbone.features)
    return DensePredictor(backbone, decoder, QueryBlocksHead(net, decoder.features, settings.masked_blocks))
