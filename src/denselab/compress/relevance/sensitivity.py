"""How far the output moves when one site alone is quantized: the sensitivity that needs no gradient.

Mix-QViT (arXiv:2501.06357) measures it as the loss of one layer at one precision with the others at a baseline, here
float; as the divergence of outputs: Cai et al.: ZeroQ, CVPR 2020.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, assert_never

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils import _pytree as pytree

from denselab.compress.graph import Graph
from denselab.compress.quantizers import Quantizer, quantized
from denselab.compress.relevance.scores import Batches, Relevance, Score, Start, scores_of
from denselab.errors import InputError
from denselab.types import HeadSpec, MaskNorm, QueryOutput

Change = Callable[[Any, Any], Float[Tensor, "B"]]
"""How far an output is from the wanted one, for every image: 0 if they are the same, else above."""


def sensitivity(
    graph: Graph, batches: Batches, quantizers: Mapping[str, Quantizer], change: Change
) -> dict[str, Score]:
    """The change of the output, in the mean over images, when one site is quantized and the others stay float.

    quantizers: of the sites by key, at the bits that are asked about. It takes a pass forward per site and batch.
    Raises InputError for no images, unknown keys, and NaN or infinity, naming the site.
    """
    changes: dict[str, list[float]] = {key: [] for key in quantizers}
    found = False
    with torch.no_grad():
        for pixels in batches:
            found = True
            wanted = graph.run(pixels)
            for key, quantizer in quantizers.items():
                output = graph.run(pixels, hooks={key: partial(quantized, quantizer)})
                changes[key].extend(change(output, wanted).tolist())
    if not found:
        raise InputError("images: wanted at least one to measure sensitivity with, got none")
    return scores_of(changes, changes)


def by_sensitivity(quantizers: Mapping[str, Quantizer], change: Change) -> Relevance:
    """`sensitivity` as a `Relevance`, for which the whole output counts whatever the start."""

    def relevance(graph: Graph, batches: Batches, start: Start) -> dict[str, Score]:
        return sensitivity(graph, batches, quantizers, change)

    return relevance


def squared_change(output: Any, wanted: Any) -> Float[Tensor, "B"]:
    """sum (y - w)^2 / sum w^2 of every image, in the mean over the tensors of an output; a `Change` for any model."""
    changes: list[Tensor] = []
    for got, kept in zip(pytree.tree_leaves(output), pytree.tree_leaves(wanted), strict=True):
        if isinstance(kept, Tensor) and kept.is_floating_point():
            error, size = (each.double().square().flatten(1).sum(dim=1) for each in (got - kept, kept))
            changes.append(error / size.clamp(min=torch.finfo(torch.float32).tiny))
    return torch.stack(changes).mean(dim=0)


def kl_change(
    temperature: float = 1.0, dim: int = 1, logits: Callable[[Any], Tensor] = lambda output: output
) -> Change:
    """The divergence KL(wanted || output) of the classes along a dimension, in the mean over pixels.

    logits: picks them from the output, as in `lambda output: output.mask_logits`. temperature: they are divided by it.
    """

    def change(output: Any, wanted: Any) -> Float[Tensor, "B"]:
        return _divergence(logits(output) / temperature, logits(wanted) / temperature, dim)

    return change


def segments_change(spec: HeadSpec) -> Change:
    """KL of the classes of queries plus KL of whose every pixel is: for heads of masks and values.

    Masks that compete are one distribution over queries, others are yes or no for every query.
    """

    def change(output: QueryOutput, wanted: QueryOutput) -> Float[Tensor, "B"]:
        classes = _divergence(output.values, wanted.values, dim=-1)
        match spec.mask_norm:
            case MaskNorm.SOFTMAX:
                return classes + _divergence(output.mask_logits, wanted.mask_logits, dim=1)
            case MaskNorm.SIGMOID:
                both, kept = (
                    torch.stack([each, torch.zeros_like(each)]) for each in (output.mask_logits, wanted.mask_logits)
                )
                divided = F.kl_div(both.log_softmax(0), kept.log_softmax(0), reduction="none", log_target=True)
                return classes + divided.sum(dim=0).flatten(1).mean(dim=1)
            case _:
                assert_never(spec.mask_norm)

    return change


def _divergence(logits: Tensor, wanted: Tensor, dim: int) -> Float[Tensor, "B"]:
    each = F.kl_div(logits.log_softmax(dim), wanted.log_softmax(dim), reduction="none", log_target=True)
    return each.sum(dim=dim).flatten(1).mean(dim=1) if each.ndim > 2 else each.sum(dim=dim)
