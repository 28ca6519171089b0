"""The k-means mask transformer: queries are cluster centres, and cross-attention is a step of k-means.

Yu, Wang, Qiao, Collins, Zhu, Adam, Yuille, Chen: k-means Mask Transformer, ECCV 2022, section 3.2; in the form of
kmax-deeplab@f8e1d04 kmax_transformer_decoder.py, which also sets what the paper leaves open: centres move by sums,
not means, and self-attention sees the queries from before that. Deviations: a choice of norm; the masks of a layer
stay at the stride of its map; the semantic branch sees the pixel decoder's maps, not the backbone's.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from denselab.errors import InputError
from denselab.heads.deeplab_semantic import DeepLabSemantic, separable
from denselab.heads.per_pixel import identity_values
from denselab.layers import DropPath, Norm, classifier, conv_norm, logit_norm, norm_layer, truncated_normal_
from denselab.types import FeatureSpec, HeadSpec, MaskNorm, QueryOutput, ValueKind

NO_OBJECT_PRIOR = 0.9


def kmeans_update(mask_logits: Float[Tensor, "B Q h w"], values: Float[Tensor, "B D h w"]) -> Float[Tensor, "B D Q"]:
    """Per query the sum of the values of its pixels; a pixel is of the query with its highest logit (eq. 5 and 6).

    Zeros for a query without pixels; no gradient through the choice. The one-hot assignment is applied by a matrix
    product, which every engine runs, in integers too.
    """
    owner = mask_logits.flatten(2).argmax(dim=1, keepdim=True)
    queries = torch.arange(mask_logits.shape[1], device=owner.device)[:, None]
    return values.flatten(2) @ (owner == queries).to(values.dtype).transpose(1, 2)


class MaskPredictor(nn.Module):
    """Mask logits, class logits and pixel embedding, from a map and the embedded queries.

    A mask logit is the product of a unit vector per pixel and a vector per query; one norm over all of them begins at
    a tenth. A constant lets "no object" begin at a probability of 0.9 (deeplab2@7a01a71 decoder/max_deeplab.py:60).
    """

    def __init__(self, channels: int, num_classes: int, width: int, embed_width: int, norm: Norm) -> None:
        super().__init__()
        project = conv_norm(width, embed_width, norm, bias=True, std=0.01)
        self.embed = nn.Sequential(*separable(channels, width, norm), project)
        self.mask_kernel = conv_norm(width, embed_width, norm, dims=1)
        self.norm_logits = logit_norm(norm, 1, scale=0.1)
        self.classify = classifier(width, num_classes + 1, dims=1)
        prior = torch.zeros(num_classes + 1)
        prior[-1] = math.log(num_classes * NO_OBJECT_PRIOR / (1 - NO_OBJECT_PRIOR))
        self.prior: Tensor
        self.register_buffer("prior", prior, persistent=False)

    def forward(
        self, pixels: Float[Tensor, "B C h w"], for_masks: Float[Tensor, "B E Q"], for_classes: Float[Tensor, "B E Q"]
    ) -> QueryOutput:
        pixel_embed = F.normalize(self.embed(pixels), dim=1)
        products = self.mask_kernel(for_masks).transpose(1, 2) @ pixel_embed.flatten(2)
        mask_logits = self.norm_logits(products[:, None]).squeeze(1).unflatten(2, pixel_embed.shape[-2:])
        class_logits = self.classify(for_classes).transpose(1, 2) + self.prior
        return QueryOutput(mask_logits, class_logits, pixel_embed)


class QueryAttention(nn.Module):
    """Self-attention of the queries: a norm per head on the similarities in place of 1 / sqrt(d), norm, GELU.

    With Norm.GROUP the similarities begin at 1 / sqrt(d) times a learned scale.
    """

    def __init__(self, key_width: int, value_width: int, num_heads: int, norm: Norm) -> None:
        super().__init__()
        self.widths = (key_width, key_width, value_width)
        self.num_heads = num_heads
        self.norm_similarity = logit_norm(norm, num_heads, group_scale=(key_width // num_heads) ** -0.5)
        self.norm_retrieved = norm_layer(norm, value_width, dims=1)

    def forward(self, qkv: Float[Tensor, "B C Q"]) -> Float[Tensor, "B V Q"]:
        q, k, v = (part.unflatten(1, (self.num_heads, -1)) for part in qkv.split(self.widths, dim=1))
        similarity = self.norm_similarity(q.transpose(2, 3) @ k)
        weights = F.softmax(similarity, dim=-1, dtype=torch.float32).to(v.dtype)
        return F.gelu(self.norm_retrieved((v @ weights.transpose(2, 3)).flatten(1, 2)))


class KMaXLayer(nn.Module):
    """Predict masks, move every centre by the pixels it owns, let the queries attend to each other, feed forward."""

    def __init__(
        self,
        channels: int,
        num_classes: int,
        width: int,
        embed_width: int,
        ffn_width: int,
        num_heads: int,
        drop_path: float,
        norm: Norm,
    ) -> None:
        super().__init__()
        key_width, std = width // 2, width**-0.5
        self.queries = conv_norm(width, width, norm, dims=1, gelu=True)
        self.pixels = conv_norm(channels, width, norm, gelu=True)
        self.predictor = MaskPredictor(width, num_classes, width, embed_width, norm)
        self.pixel_values = conv_norm(width, width, norm, std=std)
        self.norm_update = norm_layer(norm, width, dims=1)
        self.update = conv_norm(width, width, norm, dims=1, scale=0)
        self.query_qkv = conv_norm(width, 2 * key_width + width, norm, dims=1, std=std)
        self.attention = QueryAttention(key_width, width, num_heads, norm)
        self.attention_update = conv_norm(width, width, norm, dims=1, scale=0)
        self.ffn = nn.Sequential(
            conv_norm(width, ffn_width, norm, dims=1, gelu=True), conv_norm(ffn_width, width, norm, dims=1, scale=0)
        )
        self.drop_path = DropPath(drop_path)

    def forward(
        self, pixels: Float[Tensor, "B C h w"], queries: Float[Tensor, "B E Q"]
    ) -> tuple[Float[Tensor, "B E Q"], QueryOutput]:
        pixels = self.pixels(F.gelu(pixels))
        embedded = self.queries(queries)
        prediction = self.predictor(pixels, embedded, embedded)
        update = self.norm_update(kmeans_update(prediction.mask_logits, self.pixel_values(pixels)))
        queries = queries + self.drop_path(self.update(update))
        attended = self.attention_update(self.attention(self.query_qkv(embedded)))
        queries = F.gelu(queries + self.drop_path(attended))
        return F.gelu(queries + self.drop_path(self.ffn(queries))), prediction


class KMaXHead(nn.Module):
    """Q masks with class logits, "no object" last, at the stride of the finest map.

    inputs: of the pixel decoder, finest first. The finest serves the final masks.
    layers: of the transformer per map, coarsest map first; None: two at each but the finest, at three maps at most.
    width: of queries and hidden maps. embed_width: of the pixel embedding. Queries begin as draws from N(0, 1).
    drop_path: 0.2 with published training (configs/coco/panoptic_segmentation/kmax_r50.yaml).
    semantic_width: of the semantic decoder that is trained beside the masks (its class logits come last in `aux`), on
    the coarsest and the two finest maps; None: there is none. It costs nothing after training.
    align_corners: see `denselab.pixel_decoders.kmax.resize`; of the semantic decoder.
    While training, `aux` holds the outputs of all layers, then the semantic one.
    Raises InputError: layers for more maps than there are, none at all, or a width that the heads do not divide.
    """

    def __init__(
        self,
        inputs: tuple[FeatureSpec, ...],
        num_classes: int,
        num_queries: int = 128,
        layers: tuple[int, ...] | None = None,
        width: int = 256,
        embed_width: int = 128,
        ffn_width: int = 2048,
        num_heads: int = 8,
        drop_path: float = 0.0,
        norm: Norm = Norm.BATCH,
        semantic_width: int | None = 256,
        align_corners: bool | None = False,
    ) -> None:
        super().__init__()
        layers = (2,) * max(1, min(3, len(inputs) - 1)) if layers is None else layers
        _check(inputs, layers, width, num_heads)
        self.levels = [len(inputs) - 1 - step for step, repeats in enumerate(layers) for _ in range(repeats)]
        sources = [inputs[level] for level in self.levels]
        self.layers = nn.ModuleList(
            KMaXLayer(source.channels, num_classes, width, embed_width, ffn_width, num_heads, drop_path, norm)
            for source in sources
        )
        self.centres = nn.Parameter(truncated_normal_(torch.empty(width, num_queries), 1.0))
        self.for_masks = conv_norm(width, width, norm, dims=1, gelu=True)
        self.for_classes = conv_norm(width, width, norm, dims=1, gelu=True)
        self.predictor = MaskPredictor(inputs[0].channels, num_classes, width, embed_width, norm)

        def masks(stride: int, aux: tuple[HeadSpec, ...] = ()) -> HeadSpec:
            return HeadSpec(num_queries, num_classes + 1, stride, MaskNorm.SOFTMAX, ValueKind.CLASS_LOGITS, aux)

        aux = [masks(source.stride) for source in sources]
        self.semantic: DeepLabSemantic | None = None
        if semantic_width is not None:
            self.semantic_levels = sorted({0, min(1, len(inputs) - 1), len(inputs) - 1})
            chosen = tuple(inputs[level] for level in self.semantic_levels)
            self.semantic = DeepLabSemantic(chosen, num_classes, semantic_width, norm=norm, align_corners=align_corners)
            aux.append(HeadSpec(num_classes, num_classes, inputs[0].stride, MaskNorm.SOFTMAX, ValueKind.IDENTITY))
        self.spec = masks(inputs[0].stride, tuple(aux))

    def forward(self, maps: tuple[Tensor, ...]) -> QueryOutput:
        queries = self.centres.expand(maps[0].shape[0], -1, -1)
        aux: list[QueryOutput] = []
        for level, layer in zip(self.levels, self.layers, strict=True):
            queries, prediction = layer(maps[level], queries)
            aux.append(prediction)
        final = self.predictor(maps[0], self.for_masks(queries), self.for_classes(queries))
        if not self.training:
            return final
        if self.semantic is not None:
            class_logits = self.semantic(tuple(maps[level] for level in self.semantic_levels))
            aux.append(QueryOutput(class_logits, identity_values(class_logits)))
        return QueryOutput(final.mask_logits, final.values, final.pixel_embed, tuple(aux))


def _check(inputs: tuple[FeatureSpec, ...], layers: tuple[int, ...], width: int, num_heads: int) -> None:
    if len(layers) > len(inputs) or not any(layers) or min(layers) < 0:
        strides = ", ".join(str(f.stride) for f in inputs)
        raise InputError(
            f"layers: wanted how many at each of at most {len(inputs)} maps (strides {strides}), and some at all, "
            f"got {layers}; leave layers out for two at each coarser map"
        )
    if width % (2 * num_heads):
        raise InputError(
            f"width: wanted a multiple of {2 * num_heads}, twice the {num_heads} heads, got {width}; "
            "change width or num_heads"
        )
