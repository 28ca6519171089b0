"""What of an output is asked about: where relevance starts. Pure functions from an output to a number per image.

Published relevance starts at the logit of one class of an image (LRP-QViT, arXiv:2401.11243); of dense outputs these
are our own. Each is linear in what the model returns, up to choices held constant (which class, which mask), so that
relevance adds up to it. Any other function from an output to a number will do as well.
"""

from collections.abc import Callable
from typing import assert_never

import torch
from jaxtyping import Float
from torch import Tensor

from denselab.errors import InputError
from denselab.tasks.blend import mask_probs
from denselab.tasks.semantic import class_scores
from denselab.types import HeadSpec, MaskNorm, QueryOutput, ValueKind

PerImage = Float[Tensor, "B"]
Dense = Callable[[QueryOutput], PerImage]
Cell = tuple[int, int]
"""Row and column on the mask grid: those of an input px, divided by `HeadSpec.mask_stride`."""


def logit(class_logits: Float[Tensor, "B K"], class_id: int | None = None) -> PerImage:
    """The logit of one class, or of the winning one. Raises InputError for an unknown class."""
    _check_class(class_id, class_logits.shape[1])
    return class_logits.amax(dim=1) if class_id is None else class_logits[:, class_id]


def log_likelihood(class_logits: Float[Tensor, "B K *places"]) -> PerImage:
    """The log probability of the winning class, summed over pixels if there are any: a loss without labels."""
    best = class_logits.log_softmax(dim=1).amax(dim=1)
    return best.flatten(1).sum(dim=1) if best.ndim > 1 else best


def classes(spec: HeadSpec, class_id: int | None = None) -> Dense:
    """The logits of the winning classes, summed over pixels; or those of one class, over the pixels that it wins.

    Where queries say classes, a pixel counts the class logit and the mask logit of the query that says most of it.
    Raises InputError for an unknown class.
    """

    def start(output: QueryOutput) -> PerImage:
        scores = class_scores(output, spec)
        _check_class(class_id, scores.shape[1])
        winner = scores.argmax(dim=1, keepdim=True)
        match spec.value_kind:
            case ValueKind.CLASS_LOGITS:
                won = _said(output, spec, winner)
            case ValueKind.BLENDED:
                won = _answer(output, spec).gather(1, winner)
            case ValueKind.IDENTITY | ValueKind.CENTRE_OFFSET:
                won = scores.gather(1, winner)
            case _:
                assert_never(spec.value_kind)
        return (won if class_id is None else won * (winner == class_id)).sum(dim=(1, 2, 3))

    return start


def segments(spec: HeadSpec, least_prob: float = 0.5) -> Dense:
    """Class logit plus mean mask logit inside its mask, summed over the queries that are kept.

    The mean, so that a large mask does not drown its class. Kept are queries that say a class with at least this
    probability and have pixels (half of a pixel's probability, or the most where masks compete); where there are none,
    the one that says a class most surely. Raises InputError for heads whose queries say no classes.
    """

    def start(output: QueryOutput) -> PerImage:
        if spec.value_kind is not ValueKind.CLASS_LOGITS:
            raise InputError(
                f"segments: wanted a head whose queries say classes, got {spec.value_kind.value!r}; start from classes"
            )
        probs, labels = output.values.softmax(dim=-1)[..., :-1].max(dim=-1)
        inside = _inside(output, spec)
        pixels = inside.sum(dim=(2, 3))
        kept = (probs >= least_prob) & (pixels > 0)
        surest = torch.zeros_like(kept).scatter(1, probs.argmax(dim=1, keepdim=True), value=True)
        kept = torch.where(kept.any(dim=1, keepdim=True), kept, surest)
        class_logits = output.values.gather(2, labels[..., None])[..., 0]
        mask_logits = (output.mask_logits * inside).sum(dim=(2, 3)) / pixels.clamp(min=1)
        return ((class_logits + mask_logits) * kept).sum(dim=1)

    return start


def depth(spec: HeadSpec, at: Cell | None = None) -> Dense:
    """Metres at one cell of the mask grid, or their sum over all.

    Raises InputError for a cell outside of it, and for heads that say classes.
    """

    def start(output: QueryOutput) -> PerImage:
        depth_m = _answer(output, spec)[:, 0]
        if at is None:
            return depth_m.sum(dim=(1, 2))
        height, width = depth_m.shape[-2:]
        if not (0 <= at[0] < height and 0 <= at[1] < width):
            raise InputError(f"point: wanted a cell within {height}x{width}, got row {at[0]}, column {at[1]}")
        return depth_m[:, at[0], at[1]]

    return start


def normals(spec: HeadSpec) -> Dense:
    """The cosine to the model's own answer, summed over pixels.

    Its value is one at every pixel; lengths are held constant, as otherwise its gradient would be zero.
    Raises InputError for heads that say classes.
    """

    def start(output: QueryOutput) -> PerImage:
        raw = _answer(output, spec)
        length = raw.detach().norm(dim=1, keepdim=True).clamp(min=1e-6)
        return (raw / length * (raw.detach() / length)).sum(dim=(1, 2, 3))

    return start


def _answer(output: QueryOutput, spec: HeadSpec) -> Float[Tensor, "B D h w"]:
    """What `tasks.blend` gives; where values are blended by masks, each of the two gets half of the gradient.

    Raises InputError for heads that say classes of queries, or of pixels and centres.
    """
    match spec.value_kind:
        case ValueKind.IDENTITY:
            return output.mask_logits
        case ValueKind.BLENDED:
            probs = mask_probs(output.mask_logits, spec.mask_norm)
            first = torch.einsum("bqhw,bqd->bdhw", probs, output.values.detach())
            return (first + torch.einsum("bqhw,bqd->bdhw", probs.detach(), output.values)) / 2
        case ValueKind.CLASS_LOGITS | ValueKind.CENTRE_OFFSET:
            raise InputError(
                f"start: wanted a head that says a number or vector of every pixel, got {spec.value_kind.value!r}; "
                "start from its classes or segments"
            )
        case _:
            assert_never(spec.value_kind)


def _said(output: QueryOutput, spec: HeadSpec, winner: Tensor) -> Float[Tensor, "B 1 h w"]:
    """Class logit plus mask logit of the query that says most of a pixel's winning class."""
    batch, queries, height, width = output.mask_logits.shape
    probs = output.values.softmax(dim=-1)[..., :-1]
    each = winner.flatten(1)[:, None].expand(batch, queries, height * width)
    of_winner = probs.gather(2, each) * mask_probs(output.mask_logits, spec.mask_norm).flatten(2)
    speaker = of_winner.argmax(dim=1, keepdim=True)
    class_logits = output.values.gather(2, each).gather(1, speaker)
    mask_logits = output.mask_logits.flatten(2).gather(1, speaker)
    return (class_logits + mask_logits).unflatten(2, (height, width))


def _inside(output: QueryOutput, spec: HeadSpec) -> Tensor:
    """The pixels of every mask, bool [B, Q, h, w]."""
    if spec.mask_norm is MaskNorm.SIGMOID:
        return output.mask_logits > 0
    owner = output.mask_logits.argmax(dim=1, keepdim=True)
    return owner == torch.arange(output.mask_logits.shape[1], device=owner.device)[None, :, None, None]


def _check_class(class_id: int | None, count: int) -> None:
    if class_id is not None and not 0 <= class_id < count:
        raise InputError(f"class: wanted 0..{count - 1}, got {class_id}")
