"""A network as a program of integers: from int8 codes of an image to int32 logits, with no float in between.

I-ViT (Li & Gu, ICCV 2023, arXiv:2207.01405, section 3, figure 2): operands of products are 8 bits and symmetric, their
sums int32; residuals and inputs of norms are 16 bits; requantization is dyadic; softmax, GELU and LayerNorm are those
of this folder. Scales are constants that were folded into the steps when the program was made (`build`).

Every step is written once for numpy arrays and torch tensors (`arrays`), and once more as ONNX (`program_onnx`).
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, assert_never

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from denselab.compress.integer.arrays import (
    Integers,
    expanded,
    greater,
    int32,
    joined,
    like,
    padded,
    permuted,
    sum_over,
)
from denselab.compress.integer.layer_norm import IntegerLayerNorm, layer_norm
from denselab.compress.integer.requantize import Dyadic, requantize, requantized_sum
from denselab.compress.integer.shiftgelu import ShiftGELU, shiftgelu
from denselab.compress.integer.shiftmax import Shiftmax, shiftmax
from denselab.errors import InputError

IMAGES = "images"
"""What the input of every program is called."""

MOST_SUMMED = 2**16
"""Products of 8 bits that an int32 holds beside a bias of 2^30."""


@dataclass(frozen=True, eq=False)
class Linear:
    """x W^T + b over the last axis. weight: int8 [out, in]; bias: int32 [out]."""

    weight: NDArray[np.int8]
    bias: NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Conv:
    """Cross-correlation of maps [B, in, h, w]. weight: int8 [out, in / groups, kh, kw]; bias: int32 [out].

    stride, padding, dilation: down and right, in cells; what is padded are zeros.
    """

    weight: NDArray[np.int8]
    bias: NDArray[np.int32]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    def out_hw(self, in_hw: tuple[int, int]) -> tuple[int, int]:
        """Cells of the output."""
        height, width = (
            (length + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
            for length, pad, dilation, kernel, stride in zip(
                in_hw, self.padding, self.dilation, self.weight.shape[2:], self.stride, strict=True
            )
        )
        return height, width


@dataclass(frozen=True)
class MatMul:
    """The product of two activations over their last two axes."""


@dataclass(frozen=True, eq=False)
class Requantize:
    """To another scale, saturated to `bits`."""

    dyadic: Dyadic
    bits: int


@dataclass(frozen=True, eq=False)
class Add:
    """The sum of two activations, each at its own scale, saturated to `bits`."""

    dyadic: Dyadic
    other_dyadic: Dyadic
    bits: int


@dataclass(frozen=True, eq=False)
class Constant:
    """Codes that no image changes: a class token, a position embedding, a mask."""

    codes: NDArray[np.int32]


@dataclass(frozen=True)
class Relu:
    """The greater of x and 0."""


@dataclass(frozen=True)
class Maximum:
    """The greater of two."""


@dataclass(frozen=True)
class Sum:
    """Over some axes; a mean is that at a smaller scale."""

    axes: tuple[int, ...]
    keep: bool


@dataclass(frozen=True)
class Reshape:
    """To a shape; -1 is what the number of images makes it."""

    shape: tuple[int, ...]


@dataclass(frozen=True)
class Permute:
    """Axes in another order."""

    order: tuple[int, ...]


@dataclass(frozen=True)
class Slice:
    """Every step-th from start, before stop, of one axis."""

    axis: int
    start: int
    stop: int
    step: int


@dataclass(frozen=True)
class Concat:
    """One after another along an axis."""

    axis: int


@dataclass(frozen=True)
class Expand:
    """Repeated to a shape along axes of length one; -1 is the number of images."""

    shape: tuple[int, ...]


@dataclass(frozen=True)
class Pad:
    """So many codes of one value before and after, along every axis."""

    widths: tuple[tuple[int, int], ...]
    value: int


Operation = (
    Linear
    | Conv
    | MatMul
    | Requantize
    | Add
    | Constant
    | Relu
    | Maximum
    | Sum
    | Shiftmax
    | ShiftGELU
    | IntegerLayerNorm
    | Reshape
    | Permute
    | Slice
    | Concat
    | Expand
    | Pad
)


@dataclass(frozen=True, eq=False)
class Step:
    """One operation on values by name, and the name of what it makes."""

    output: str
    operation: Operation
    inputs: tuple[str, ...]


@dataclass(frozen=True)
class Code:
    """What a code stands for: it is so many times the scale, and within signed integers of so many bits."""

    scale: float
    bits: int

    @property
    def least(self) -> int:
        """The least code."""
        return -(2 ** (self.bits - 1))

    @property
    def most(self) -> int:
        """The greatest code."""
        return 2 ** (self.bits - 1) - 1

    def of(self, x: NDArray[np.floating[Any]]) -> NDArray[np.int32]:
        """Codes of numbers, half to even, saturated."""
        return np.rint(np.asarray(x, np.float64) / self.scale).clip(self.least, self.most).astype(np.int32)

    def stored(self, x: NDArray[np.floating[Any]]) -> NDArray[np.signedinteger[Any]]:
        """Codes of numbers in the type that they fit, int8 or int16."""
        return self.of(x).astype(np.int8 if self.bits == 8 else np.int16)


@dataclass(frozen=True, eq=False)
class IntegerProgram:
    """Steps in order, the last of which gives the logits.

    image_shape: [3, H, W]. images: how many at once, None for any number. image_code: of pixels as the captured model
    takes them, int8, or int16 where the image meets something else than a convolution. logit_shape: of what it returns,
    -1 for the number of images; logit_scale: of the int32 logits.
    """

    image_shape: tuple[int, ...]
    images: int | None
    image_code: Code
    steps: tuple[Step, ...]
    logit_shape: tuple[int, ...]
    logit_scale: float

    def run(self, codes: Integers) -> Integers:
        """int32 logits of image codes. Raises InputError for other shapes and types."""
        *_, (_, logits) = self.values(codes)
        return logits

    def values(self, codes: Integers) -> Iterator[tuple[str, Integers]]:
        """What every step makes, by name, in order. Raises InputError as `run`."""
        self._check(codes)
        unread = Counter(name for step in self.steps for name in step.inputs)
        known = {IMAGES: int32(codes)}
        for step in self.steps:
            value = evaluate(step.operation, [known[name] for name in step.inputs], codes)
            unread.subtract(step.inputs)
            for name in {*step.inputs}:
                if not unread[name]:
                    del known[name]
            known[step.output] = value
            yield step.output, value

    def logits(self, pixels: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
        """What the captured model would return for images [B, 3, H, W], by `run` on torch integers."""
        codes = torch.from_numpy(self.image_code.stored(pixels))
        return (self.run(codes).numpy() * self.logit_scale).astype(np.float32)

    def as_module(self) -> nn.Module:
        """A module with the forward of the captured model, for what evaluates modules."""
        return Evaluated(self.logits)

    def _check(self, codes: Integers) -> None:
        shape, wanted = tuple(codes.shape), f"int{self.image_code.bits}"
        images = "B" if self.images is None else self.images
        if shape[1:] != self.image_shape or self.images not in (None, shape[0]) or not shape[0]:
            raise InputError(f"codes: wanted images {[images, *self.image_shape]}, got {list(shape)}; resize them")
        if str(codes.dtype).removeprefix("torch.") != wanted:
            raise InputError(f"codes: wanted {wanted}, got {codes.dtype}; see Code.stored")


class Evaluated(nn.Module):
    """A module that asks an integer program for its logits."""

    def __init__(self, logits: Callable[[NDArray[np.floating[Any]]], NDArray[np.float32]]) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "..."]:
        """Logits, float32, without gradients."""
        return torch.from_numpy(self.logits(pixels.detach().cpu().numpy())).to(pixels.device)


def evaluate(operation: Operation, inputs: Sequence[Integers], images: Integers) -> Integers:
    """One step on int32 values. images: the image codes, which say how many there are and where numbers lie."""
    match operation:
        case Linear():
            return inputs[0] @ int32(like(operation.weight, images)).T + like(operation.bias, images)
        case Conv():
            return _convolved(inputs[0], operation)
        case MatMul():
            return inputs[0] @ inputs[1]
        case Requantize():
            return requantize(inputs[0], operation.dyadic, operation.bits)
        case Add():
            return requantized_sum(inputs[0], operation.dyadic, inputs[1], operation.other_dyadic, operation.bits)
        case Constant():
            return like(operation.codes, images)
        case Relu():
            return inputs[0].clip(min=0)
        case Maximum():
            return greater(inputs[0], inputs[1])
        case Sum():
            return sum_over(inputs[0], operation.axes, operation.keep)
        case Shiftmax():
            return shiftmax(inputs[0], operation)
        case ShiftGELU():
            return shiftgelu(inputs[0], operation)
        case IntegerLayerNorm():
            return layer_norm(inputs[0], operation)
        case Reshape():
            return inputs[0].reshape(operation.shape)
        case Permute():
            return permuted(inputs[0], operation.order)
        case Slice():
            return _sliced(inputs[0], operation)
        case Concat():
            return joined(inputs, operation.axis)
        case Expand():
            shape = tuple(len(images) if length == -1 else length for length in operation.shape)
            return expanded(inputs[0], shape)
        case Pad():
            return padded(inputs[0], operation.widths, operation.value)
        case _:
            assert_never(operation)


def _sliced(x: Integers, part: Slice) -> Integers:
    return x[(slice(None),) * part.axis + (slice(part.start, part.stop, part.step),)]


def _convolved(x: Integers, conv: Conv) -> Integers:
    """One matrix product for every cell of the kernel."""
    (height, width), groups = conv.out_hw((x.shape[2], x.shape[3])), conv.groups
    down, right = conv.padding
    x = padded(x, ((0, 0), (0, 0), (down, down), (right, right)), 0)
    weight = int32(like(conv.weight, x)).reshape(groups, -1, *conv.weight.shape[1:])
    total = like(conv.bias, x).reshape(groups, -1, 1)
    for row, column in np.ndindex(*conv.weight.shape[2:]):
        top, left = row * conv.dilation[0], column * conv.dilation[1]
        seen = x[
            :,
            :,
            top : top + (height - 1) * conv.stride[0] + 1 : conv.stride[0],
            left : left + (width - 1) * conv.stride[1] + 1 : conv.stride[1],
        ]
        total = total + weight[..., row, column] @ seen.reshape(len(x), groups, -1, height * width)
    return total.reshape(len(x), -1, height, width)
