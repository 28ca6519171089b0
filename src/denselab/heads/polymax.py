"""One head for every dense task: masks that share out the pixels, and what each mask says.

Yang, Yuan, Wilber, Sharma, Gu, Qiao, Debats, Wang, Adam, Sirotenko, Chen: PolyMaX: General Dense Prediction with Mask
Transformer, WACV 2024, section 3.
"""

from dataclasses import replace

from torch import Tensor, nn

from denselab.heads.kmax import KMaXHead
from denselab.heads.values import Values, activated, spread
from denselab.layers import Norm
from denselab.types import FeatureSpec, HeadSpec, QueryOutput, ValueKind


class PolyMaXHead(nn.Module):
    """The queries of kMaX-DeepLab, each with a value instead of class logits; the answer is blended by their masks.

    The answer at a pixel is sum_q softmax_q(mask_logits) * value_q (eq. 3): depths are adaptive bins, normals are
    3-vectors, class logits stay logits. In training the answers of all layers are returned too, on their own maps.
    The values of the queries begin spread over what can be said (`denselab.heads.values.spread`), which the paper
    leaves open: that way the first answers are in the middle of the range, and every query has a part of it.

    inputs, num_queries, layers, width, embed_width, ffn_width, num_heads, drop_path, norm: as for KMaXHead.
    Raises InputError: as KMaXHead does.
    """

    def __init__(
        self,
        inputs: tuple[FeatureSpec, ...],
        values: Values,
        num_queries: int = 128,
        layers: tuple[int, ...] | None = None,
        width: int = 256,
        embed_width: int = 128,
        ffn_width: int = 2048,
        num_heads: int = 8,
        drop_path: float = 0.0,
        norm: Norm = Norm.BATCH,
    ) -> None:
        super().__init__()
        self.values = values
        self.decoder = KMaXHead(
            inputs,
            values.dim,
            num_queries,
            layers,
            width,
            embed_width,
            ffn_width,
            num_heads,
            drop_path,
            norm,
            semantic_width=None,
        )
        self.start: Tensor
        self.register_buffer("start", spread(values, num_queries), persistent=False)
        self.spec = replace(self._spec(self.decoder.spec), aux=tuple(map(self._spec, self.decoder.spec.aux)))

    def _spec(self, spec: HeadSpec) -> HeadSpec:
        return replace(spec, value_dim=self.values.dim, value_kind=ValueKind.BLENDED)

    def forward(self, maps: tuple[Tensor, ...]) -> QueryOutput:
        output: QueryOutput = self.decoder(maps)
        return replace(self._say(output), aux=tuple(self._say(each) for each in output.aux))

    def _say(self, output: QueryOutput) -> QueryOutput:
        raw = output.values[..., :-1]  # kMaX's last is "no object", which no blend has a use for
        return QueryOutput(output.mask_logits, activated(raw + self.start, self.values))
