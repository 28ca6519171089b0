"""Fused attention, and what else hides matrix products, taken apart, so that a quantizer reaches the operands.

Vaswani et al.: Attention Is All You Need, NeurIPS 2017, eq. 1; the arguments are those of
`torch.nn.functional.scaled_dot_product_attention`.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from denselab.errors import InputError

aten = torch.ops.aten


def opened_attention(
    query: Float[Tensor, "*heads L E"],
    key: Float[Tensor, "*heads S E"],
    value: Float[Tensor, "*heads S D"],
    attn_mask: Bool[Tensor, "... L S"] | Float[Tensor, "... L S"] | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Float[Tensor, "*heads L D"]:
    """softmax(scale * query key^T + mask) value, in separate operations; scale None: 1 / sqrt(E).

    The scale goes to the logits, so that the query of the product is the one that the model made. Rows of which a mask
    leaves nothing give 0, as in torch. dropout_p: ignored, a captured model is in evaluation mode.
    Raises InputError for query heads that share keys (enable_gqa).
    """
    if enable_gqa:
        raise InputError("attention: wanted one key head per query head, got grouped queries (enable_gqa); repeat them")
    logits = (query @ key.transpose(-2, -1)) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        seen = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
        return logits.masked_fill(~seen, -torch.inf).softmax(dim=-1) @ value
    if attn_mask is None:
        return logits.softmax(dim=-1) @ value
    masked = logits.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else logits + attn_mask
    return aten._safe_softmax.default(masked, -1) @ value


@functools.cache
def decompositions() -> dict[Any, Callable[..., Any]]:
    """What `ExportedProgram.run_decompositions` takes apart: all else keeps the name that the model gave it."""
    those_of_torch = torch.export.default_decompositions()
    return {
        aten.scaled_dot_product_attention.default: opened_attention,
        **{op: those_of_torch[op] for op in (aten.einsum.default, aten.tensordot.default, aten.inner.default)},
    }
