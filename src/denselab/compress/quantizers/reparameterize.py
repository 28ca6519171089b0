"""From a quantizer per channel to one per tensor, exactly: the change is folded into the layers before and after.

Scale reparameterization: Li et al.: RepQ-ViT, ICCV 2023, arXiv:2212.08254;
zkkli/RepQ-ViT@a160561 classification/test_quant.py. The output x of a normalization has scales s_c and zero points z_c
per channel. With a target scale s and zero point z: r1_c = s_c / s, r2_c = s (z - z_c), and x' = x / r1 - r2 has the
same codes under (s, z) as x under (s_c, z_c). The affine part of the normalization absorbs x -> x', and every layer
that reads x absorbs the way back, so that the float network stays what it was. Re-calibrate those layers' weights
afterwards: their input channels are now r1 times as large.

Deviation: RepQ-ViT leaves the mean zero point a fraction, so that its codes are none. Here it is rounded and kept
among the codes, which costs nothing, as r2 makes up for any choice; `rounded=False` gives the published numbers.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Num
from torch import Tensor

from denselab.compress.quantizers.uniform import Uniform
from denselab.errors import InputError


@dataclass(frozen=True, eq=False)
class ChannelFold:
    """x' = x / ratio - offset, per channel; x' takes the one scale and zero point."""

    ratio: Float[Tensor, "C"]
    offset: Float[Tensor, "C"]
    scale: Float[Tensor, ""]
    zero_point: Num[Tensor, ""]

    def apply(self, x: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        """x', of numbers whose last dimension is channels."""
        return x / self.ratio - self.offset

    def undo(self, folded: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        """x again, for a reader of the normalization that cannot absorb the way back (a tap of a dense head)."""
        return (folded + self.offset) * self.ratio


def channel_fold(
    per_channel: Uniform,
    target_scale: Float[Tensor, ""] | None = None,
    target_zero_point: Num[Tensor, ""] | None = None,
    rounded: bool = True,
) -> ChannelFold:
    """The fold that makes an affine quantizer per channel one per tensor.

    per_channel: one scale and zero point per channel, of any shape with C elements. target_scale: default their mean
    (RepQ-ViT); `ranges.median_scale` resists outlying channels. target_zero_point: default the mean. rounded: the
    target zero point becomes the nearest code.
    Raises InputError for a symmetric quantizer.
    """
    if per_channel.zero_point is None:
        raise InputError("per_channel: wanted an affine quantizer with zero points, got a symmetric one")
    scale = per_channel.scale.flatten()
    zero_point = per_channel.zero_point.flatten().to(scale.dtype).expand_as(scale)
    target = scale.mean() if target_scale is None else target_scale
    target_zero = zero_point.mean() if target_zero_point is None else target_zero_point
    target_zero = target_zero.to(scale.dtype)
    offset_zero = target_zero
    if rounded:
        offset_zero = target_zero.round().clamp(per_channel.lowest, per_channel.highest)
        target_zero = offset_zero.to(torch.int32)
    return ChannelFold(scale / target, target * (offset_zero - zero_point), target, target_zero)


def folded_norm(
    fold: ChannelFold, weight: Float[Tensor, "C"] | None, bias: Float[Tensor, "C"] | None
) -> tuple[Float[Tensor, "C"], Float[Tensor, "C"]]:
    """Weight and bias of the normalization, so that it gives x'; None: it had none (1 and 0)."""
    weight = torch.ones_like(fold.ratio) if weight is None else weight
    bias = torch.zeros_like(fold.ratio) if bias is None else bias
    return weight / fold.ratio, bias / fold.ratio - fold.offset


def folded_reader(
    fold: ChannelFold, weight: Float[Tensor, "O C *kernel"], bias: Float[Tensor, "O"] | None
) -> tuple[Float[Tensor, "O C *kernel"], Float[Tensor, "O"]]:
    """Weight and bias of a layer that read x, so that it gives the same from x'; to be done for every such layer.

    Exact for linear layers and for convolutions without padding, groups 1 (padding puts 0 where x' is -offset).
    Raises InputError if the weight has another number of input channels.
    """
    if weight.ndim < 2 or weight.shape[1] != len(fold.ratio):
        raise InputError(
            f"weight: wanted [outputs, {len(fold.ratio)}, ...] as the normalization has channels, "
            f"got {list(weight.shape)}; a grouped convolution cannot absorb this fold"
        )
    kernel = (1,) * (weight.ndim - 2)
    new_weight = weight * fold.ratio.view(-1, *kernel)
    shift = (new_weight * fold.offset.view(-1, *kernel)).flatten(1).sum(1)
    return new_weight, shift if bias is None else bias + shift


def bias_without_shift(
    quantized_weight: Float[Tensor, "O C *kernel"], bias: Float[Tensor, "O"] | None, shift: Float[Tensor, ""]
) -> Float[Tensor, "O"]:
    """Bias of a layer that is fed `AdaLog.shifted_values`, so that it gives the same: b - shift * sum of its weights.

    Wu et al., AdaLog, ECCV 2024; GoatWu/AdaLog@75a57d2 quant_layers/linear.py. The weights are those that run,
    the quantized ones. Exact without padding, as above.
    """
    sums = quantized_weight.flatten(1).sum(1) * shift
    return -sums if bias is None else bias - sums
