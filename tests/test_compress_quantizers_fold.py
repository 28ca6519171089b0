"""Folding a quantizer per channel into one per tensor: exact in float64, codes unchanged, every reader served."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from denselab.compress.quantizers import (
    Uniform,
    bias_without_shift,
    channel_fold,
    folded_norm,
    folded_reader,
)
from denselab.compress.ranges import affine, extremes, median_scale
from denselab.errors import InputError

CHANNELS = 6


def doubles(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spread(*shape: int, seed: int = 0) -> Tensor:
    """Data whose channels differ in size and position, as after a LayerNorm."""
    return doubles(*shape, CHANNELS, seed=seed) * torch.logspace(-1, 1, CHANNELS) + torch.arange(CHANNELS) - 3


@pytest.mark.parametrize("rounded", [True, False])
@pytest.mark.parametrize("target", ["mean", "median", "given"])
def test_network_stays_what_it_was(target: str, rounded: bool) -> None:
    x, weight, bias = spread(4, 5, seed=1), doubles(CHANNELS, seed=2), doubles(CHANNELS, seed=3)
    readers = [(doubles(7, CHANNELS, seed=4), doubles(7, seed=5)), (doubles(3, CHANNELS, seed=6), None)]
    normed = F.layer_norm(x, (CHANNELS,), weight, bias)
    per_channel = affine(*extremes(normed, keep=(2,)), 4, with_zero=False)
    scales = {"mean": None, "median": median_scale(per_channel.scale), "given": torch.tensor(0.3).double()}
    fold = channel_fold(per_channel, scales[target], rounded=rounded)
    folded = F.layer_norm(x, (CHANNELS,), *folded_norm(fold, weight, bias))
    torch.testing.assert_close(folded, fold.apply(normed), rtol=0, atol=1e-12)
    torch.testing.assert_close(fold.undo(folded), normed, rtol=0, atol=1e-12)
    for reader_weight, reader_bias in readers:
        new_weight, new_bias = folded_reader(fold, reader_weight, reader_bias)
        after, before = F.linear(folded, new_weight, new_bias), F.linear(normed, reader_weight, reader_bias)
        torch.testing.assert_close(after, before, rtol=0, atol=1e-12)


def test_codes_per_tensor_are_those_per_channel() -> None:
    x = spread(200)
    per_channel = affine(*extremes(x, keep=(1,)), 4, with_zero=False)
    fold = channel_fold(per_channel)
    assert fold.zero_point.dtype == torch.int32
    per_tensor = Uniform(fold.scale, fold.zero_point, 4)
    assert torch.equal(per_tensor.codes(fold.apply(x)), per_channel.codes(x))
    torch.testing.assert_close(
        fold.undo(per_tensor.values(per_channel.codes(x))), per_channel.values(per_channel.codes(x))
    )


def test_by_hand() -> None:
    per_channel = Uniform(torch.tensor([1.0, 3.0]), torch.tensor([2, 5], dtype=torch.int32), 3)
    fold = channel_fold(per_channel)
    # Means 2 and 3.5, rounded to even 4: r1 = 1/2, 3/2; r2 = 2 (4 - 2), 2 (4 - 5).
    assert (fold.scale.item(), fold.zero_point.item()) == (2.0, 4)
    assert fold.ratio.tolist() == [0.5, 1.5]
    assert fold.offset.tolist() == [4.0, -2.0]
    weight, bias = folded_reader(fold, torch.tensor([[1.0, 2.0]]), torch.tensor([10.0]))
    assert weight.tolist() == [[0.5, 3.0]]
    assert bias.tolist() == [10 + 0.5 * 4 - 3 * 2]
    assert channel_fold(per_channel, rounded=False).zero_point.item() == 3.5


def test_zero_point_is_kept_among_the_codes_or_as_given() -> None:
    per_channel = Uniform(torch.tensor([1.0, 1.0]), torch.tensor([40, 60], dtype=torch.int32), 4)
    assert channel_fold(per_channel).zero_point.item() == 15
    middle = channel_fold(per_channel, target_zero_point=torch.tensor(8))
    assert middle.zero_point.item() == 8
    assert middle.offset.tolist() == [-32.0, -52.0]


def test_norm_without_affine_part() -> None:
    fold = channel_fold(Uniform(torch.tensor([1.0, 3.0]), torch.tensor([2, 5], dtype=torch.int32), 3))
    weight, bias = folded_norm(fold, None, None)
    assert torch.equal(weight, 1 / fold.ratio)
    assert torch.equal(bias, -fold.offset)


def test_convolution_without_padding() -> None:
    x, weight = doubles(2, 9, 9, CHANNELS), doubles(4, CHANNELS, 3, 3, seed=1)
    fold = channel_fold(affine(*extremes(x, keep=(3,)), 8))
    new_weight, new_bias = folded_reader(fold, weight, None)
    first = F.conv2d(fold.apply(x).permute(0, 3, 1, 2), new_weight, new_bias)
    torch.testing.assert_close(first, F.conv2d(x.permute(0, 3, 1, 2), weight), rtol=0, atol=1e-12)


def test_bad_input() -> None:
    scale = torch.ones(3)
    with pytest.raises(InputError, match="wanted an affine quantizer with zero points, got a symmetric one"):
        channel_fold(Uniform(scale, None, 4))
    fold = channel_fold(Uniform(scale, torch.zeros(3, dtype=torch.int32), 4))
    for shape in ((5, 4), (3,), (3, 1, 3, 3)):
        with pytest.raises(InputError, match=r"weight: wanted \[outputs, 3, ...\].*grouped convolution"):
            folded_reader(fold, torch.zeros(shape), None)


def test_bias_takes_a_shift() -> None:
    weight, x = doubles(4, CHANNELS), doubles(5, CHANNELS, seed=1)
    shift = torch.tensor(0.17, dtype=torch.float64)
    bias = bias_without_shift(weight, None, shift)
    torch.testing.assert_close(F.linear(x + shift, weight, bias), F.linear(x, weight))
