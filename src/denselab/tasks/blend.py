"""What the masks of a QueryOutput say, pixel by pixel."""

from typing import assert_never

import torch
from jaxtyping import Float
from torch import Tensor

from denselab.types import HeadSpec, MaskNorm, QueryOutput, ValueKind


def blended(output: QueryOutput, spec: HeadSpec) -> Float[Tensor, "B D h w"]:
    """The answer on the mask grid: the masks themselves, or sum_q mask_prob[q] * value[q] (PolyMaX, eq. 5)."""
    match spec.value_kind:
        case ValueKind.IDENTITY:
            return output.mask_logits
        case ValueKind.BLENDED:
            return torch.einsum("bqhw,bqd->bdhw", mask_probs(output.mask_logits, spec.mask_norm), output.values)
        case ValueKind.CLASS_LOGITS | ValueKind.CENTRE_OFFSET:
            raise TypeError(f"value_kind: wanted IDENTITY or BLENDED, got {spec.value_kind}")
        case _:
            assert_never(spec.value_kind)


def mask_probs(mask_logits: Float[Tensor, "B Q h w"], norm: MaskNorm) -> Float[Tensor, "B Q h w"]:
    """Probability that a pixel belongs to a mask: over queries, or of each query by itself."""
    match norm:
        case MaskNorm.SOFTMAX:
            return mask_logits.softmax(dim=1)
        case MaskNorm.SIGMOID:
            return mask_logits.sigmoid()
        case _:
            assert_never(norm)
