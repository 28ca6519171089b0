"""Layers that backbones, pixel decoders and heads share."""

import math
from collections import OrderedDict
from enum import Enum
from typing import assert_never

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def conv_bn_relu(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    """Convolution (same padding, no bias), batch norm, ReLU."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, dilation * (kernel // 2), dilation, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class Norm(Enum):
    """How a part normalises its activations.

    BATCH: batch norm, eps 1e-3 and momentum 0.01 as TensorFlow's; synchronised over processes where the trainer
    converts it. Wants some ten images per step.
    GROUP: group norm, which sees one image at a time and so trains at any batch size (Wu and He 2018). Logits, which
    have one or a few channels of their own meaning, get a learned scale and shift per channel instead.
    FROZEN: batch norm that keeps the statistics it was loaded with; its scale and shift train.
    """

    BATCH = "batch"
    GROUP = "group"
    FROZEN = "frozen"


class FrozenBatchNorm(nn.Module):
    """Batch norm by its running statistics, in training too, on [B, C, ...]; the state of nn.BatchNorm2d fits."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Float[Tensor, "B C *size"]) -> Float[Tensor, "B C *size"]:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class ChannelAffine(nn.Module):
    """A learned scale and shift per channel of [B, C, h, w]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        return x * self.weight + self.bias


def norm_layer(norm: Norm, channels: int, scale: float = 1.0, dims: int = 2) -> nn.Module:
    """The norm of activations [B, C, h, w] (dims 2) or [B, C, L] (dims 1); `scale`: what its weight begins as.

    Groups are of 16 channels (Wu and He 2018, Table 3), fewer where 16 does not divide the channels, all of them
    where even 4 does not.
    """
    match norm:
        case Norm.BATCH:
            layer = (nn.BatchNorm1d if dims == 1 else nn.BatchNorm2d)(channels, eps=1e-3, momentum=0.01)
        case Norm.FROZEN:
            layer = FrozenBatchNorm(channels, eps=1e-3)
        case Norm.GROUP:
            size = math.gcd(channels, 16)
            layer = nn.GroupNorm(channels // size if size >= 4 else 1, channels)
        case _:
            assert_never(norm)
    nn.init.constant_(layer.weight, scale)
    return layer


def logit_norm(norm: Norm, channels: int, scale: float = 1.0, group_scale: float = 1.0) -> nn.Module:
    """The norm of logits [B, C, h, w]; `scale`: what its weight begins as.

    GROUP: a learned scale and shift per channel. Nothing divides there by the deviation of the logits, so
    `group_scale`, about 1 / that deviation, multiplies the scale it begins as.
    """
    if norm is not Norm.GROUP:
        return norm_layer(norm, channels, scale)
    layer = ChannelAffine(channels)
    nn.init.constant_(layer.weight, scale * group_scale)
    return layer


def conv_norm(
    inputs: int,
    outputs: int,
    norm: Norm,
    *,
    kernel: int = 1,
    dilation: int = 1,
    depthwise: bool = False,
    bias: bool = False,
    dims: int = 2,
    gelu: bool = False,
    scale: float = 1.0,
    std: float | None = None,
) -> nn.Sequential:
    """Convolution (same padding) over maps (dims 2) or sequences (dims 1), norm, and GELU if asked for.

    scale: what the weight of the norm begins as. std: deviation of the normal distribution, cut at two deviations,
    from which the convolution is drawn; None: sqrt(2 / inputs), and Glorot's uniform one for a depthwise convolution.
    """
    kind = nn.Conv1d if dims == 1 else nn.Conv2d
    groups = inputs if depthwise else 1
    conv = kind(inputs, outputs, kernel, 1, dilation * (kernel // 2), dilation, groups, bias)
    if depthwise:
        nn.init.xavier_uniform_(conv.weight)
    else:
        truncated_normal_(conv.weight, math.sqrt(2 / inputs) if std is None else std)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    layers: list[tuple[str, nn.Module]] = [("conv", conv), ("norm", norm_layer(norm, outputs, scale, dims))]
    if gelu:
        layers.append(("gelu", nn.GELU()))
    return nn.Sequential(OrderedDict(layers))


def classifier(inputs: int, num_classes: int, dims: int = 2) -> nn.Conv1d | nn.Conv2d:
    """A 1x1 convolution that begins close to zero everywhere, over maps (dims 2) or sequences (dims 1)."""
    conv = (nn.Conv1d if dims == 1 else nn.Conv2d)(inputs, num_classes, 1)
    truncated_normal_(conv.weight, 0.01)
    nn.init.zeros_(conv.get_parameter("bias"))
    return conv


def truncated_normal_(weight: Tensor, std: float) -> Tensor:
    """Fill with draws from a normal distribution cut at two deviations."""
    return nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


class DropPath(nn.Module):
    """Drop a residual branch for some images of a batch, in training (Huang et al. 2016, stochastic depth).

    rate: share of images; the others are scaled by 1 / (1 - rate).
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: Float[Tensor, "B *rest"]) -> Float[Tensor, "B *rest"]:
        if not self.training or self.rate == 0:
            return branch
        kept = F.dropout(branch.new_ones(branch.shape[0]), self.rate)
        return branch * kept.view(-1, *[1] * (branch.ndim - 1))
