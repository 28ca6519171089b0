"""What the masks of a QueryOutput say, pixel by pixel."""

from collections.abc import Callable
from typing import assert_never

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
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


def at_source(
    maps: Float[Tensor, "B C h w"], stride: int, size_hw: tuple[int, int], network_hw: tuple[int, int] | None = None
) -> Float[Tensor, "B C H W"]:
    """Maps at the size of the input: upsampled bilinearly by their stride, padding cropped off.

    network_hw: the size at which the network saw the input, where that is not its own; the maps are resized again.
    """
    height, width = network_hw or size_hw
    if stride > 1:
        full_hw = (maps.shape[-2] * stride, maps.shape[-1] * stride)
        maps = F.interpolate(maps, size=full_hw, mode="bilinear", align_corners=False)
    maps = maps[:, :, :height, :width]
    return maps if network_hw is None else F.interpolate(maps, size=size_hw, mode="bilinear", align_corners=False)


def chosen_probs(
    mask_logits: Float[Tensor, "B Q h w"],
    slots: Int[Tensor, "B N"],
    spec: HeadSpec,
    size_hw: tuple[int, int],
    network_hw: tuple[int, int] | None = None,
) -> Float[Tensor, "B N H W"]:
    """Mask probabilities of some queries at the size of the input; logits are upsampled, which keeps thin things.

    Where masks compete over queries, those that are not chosen are upsampled as one: their log-sum-exp.
    """
    chosen = mask_logits.gather(1, slots[..., None, None].expand(-1, -1, *mask_logits.shape[-2:]))
    match spec.mask_norm:
        case MaskNorm.SIGMOID:
            return at_source(chosen, spec.mask_stride, size_hw, network_hw).sigmoid()
        case MaskNorm.SOFTMAX if slots.shape[1] == mask_logits.shape[1]:
            return at_source(chosen, spec.mask_stride, size_hw, network_hw).softmax(dim=1)
        case MaskNorm.SOFTMAX:
            taken = torch.zeros_like(mask_logits[:, :, 0, 0]).scatter(1, slots, 1.0)[..., None, None]
            others = (mask_logits - 1e4 * taken).logsumexp(dim=1, keepdim=True)
            every = at_source(torch.cat([chosen, others], dim=1), spec.mask_stride, size_hw, network_hw)
            return every.softmax(dim=1)[:, :-1]
        case _:
            assert_never(spec.mask_norm)


def prober(
    mask_logits: Float[Tensor, "B Q h w"],
    spec: HeadSpec,
    size_hw: tuple[int, int],
    network_hw: tuple[int, int] | None = None,
    at_once: int = 4,
) -> Callable[[Int[Tensor, "B N"]], Float[Tensor, "B N H W"]]:
    """A function from queries, of which some may be named twice, to their mask probabilities at the size of the input.

    To be asked of a few queries at a time, so that memory does not grow with their number. Where masks compete over
    queries, all of them are upsampled once before, `at_once` at a time, for the sum that each is a share of.
    """

    def upsampled(logits: Float[Tensor, "B N h w"]) -> Float[Tensor, "B N H W"]:
        return at_source(logits, spec.mask_stride, size_hw, network_hw)

    def chosen(slots: Int[Tensor, "B N"]) -> Float[Tensor, "B N H W"]:
        return upsampled(mask_logits.gather(1, slots[..., None, None].expand(-1, -1, *mask_logits.shape[-2:])))

    match spec.mask_norm:
        case MaskNorm.SIGMOID:
            return lambda slots: chosen(slots).sigmoid()
        case MaskNorm.SOFTMAX:
            first, *others = mask_logits.split(at_once, dim=1)
            log_sum = upsampled(first).logsumexp(dim=1, keepdim=True)
            for some in others:
                log_sum = torch.logaddexp(log_sum, upsampled(some).logsumexp(dim=1, keepdim=True))
            return lambda slots: (chosen(slots) - log_sum).exp()
        case _:
            assert_never(spec.mask_norm)
