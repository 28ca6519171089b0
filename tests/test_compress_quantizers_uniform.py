"""Uniform quantization: torch's own as reference, values by hand, LSQ's gradients, degenerate data."""

import pytest
import torch
from torch import Tensor

from denselab.compress.quantizers import (
    Uniform,
    code_bits,
    fake_quantized,
    lsq_scale,
    parameter_shape,
    quantized,
)
from denselab.errors import InputError


def ints(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def scalar(number: float) -> Tensor:
    return torch.tensor(number)


class TestAgainstTorch:
    @pytest.mark.parametrize("bits", range(2, 9))
    def test_per_tensor(self, bits: int) -> None:
        x = torch.randn(500, generator=torch.Generator().manual_seed(bits)) * 3
        zero_point = 2**bits // 3
        reference = torch.fake_quantize_per_tensor_affine(x, 0.125, zero_point, 0, 2**bits - 1)
        assert torch.equal(quantized(Uniform(scalar(0.125), torch.tensor(zero_point), bits), x), reference)
        half = 2 ** (bits - 1)
        reference = torch.fake_quantize_per_tensor_affine(x, 0.125, 0, -half, half - 1)
        assert torch.equal(quantized(Uniform(scalar(0.125), None, bits), x), reference)

    def test_per_channel(self) -> None:
        x = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
        scale, zero_point = torch.tensor([0.5, 0.25, 0.0625]), ints(1, 9, 15)
        reference = torch.fake_quantize_per_channel_affine(x, scale, zero_point, 0, 0, 15)
        assert torch.equal(quantized(Uniform(scale[:, None], zero_point[:, None], 4), x), reference)


class TestByHand:
    def test_affine(self) -> None:
        quantizer = Uniform(scalar(0.5), torch.tensor(2), 2)
        x = torch.tensor([-9.0, -1.0, -0.3, -0.2, 0.0, 0.25, 0.3, 0.5, 0.75, 9.0])
        assert quantizer.codes(x).tolist() == [0, 0, 1, 2, 2, 2, 3, 3, 3, 3]
        assert quantizer.values(ints(0, 1, 2, 3)).tolist() == [-1.0, -0.5, 0.0, 0.5]
        assert (quantizer.lowest, quantizer.highest, quantizer.levels, code_bits(quantizer)) == (0, 3, 4, 2)
        assert [bound.item() for bound in quantizer.bounds()] == [-1.0, 0.5]

    def test_symmetric(self) -> None:
        quantizer = Uniform(scalar(2.0), None, 3)
        assert quantizer.codes(torch.tensor([-99.0, -8.0, -3.0, 0.9, 1.0, 3.0, 6.0, 99.0])).tolist() == [
            -4, -4, -2, 0, 0, 2, 3, 3,
        ]  # fmt: skip
        assert (quantizer.lowest, quantizer.highest) == (-4, 3)
        assert [bound.item() for bound in quantizer.bounds()] == [-8.0, 6.0]

    def test_eight_bits_are_256_levels(self) -> None:
        quantizer = Uniform(scalar(1.0), torch.tensor(128), 8)
        x = torch.linspace(-200, 200, 4001)
        assert len(quantized(quantizer, x).unique()) == 256

    def test_parameters_broadcast_per_head(self) -> None:
        quantizer = Uniform(torch.tensor([1.0, 0.1]).view(1, 2, 1, 1), torch.zeros(1, 2, 1, 1, dtype=torch.int32), 4)
        x = torch.full((3, 2, 4, 5), 0.6)
        assert parameter_shape(quantizer) == (1, 2, 1, 1)
        assert quantized(quantizer, x)[:, 0].unique().tolist() == [1.0]
        torch.testing.assert_close(quantized(quantizer, x)[:, 1].unique(), torch.tensor([0.6]))

    def test_dtype_is_that_of_the_parameters(self) -> None:
        x = torch.tensor([0.3, 0.6])
        for dtype in (torch.float32, torch.float64):
            quantizer = Uniform(torch.tensor(0.25, dtype=dtype), None, 4)
            for given in (torch.bfloat16, torch.float32, torch.float64):
                assert quantized(quantizer, x.to(given)).dtype == dtype
                assert fake_quantized(quantizer, x.to(given)).dtype == dtype


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("zero_point", [None, 0, 1, -40, 300])
def test_properties(bits: int, zero_point: int | None) -> None:
    generator = torch.Generator().manual_seed(bits)
    scale = torch.rand(4, 1, generator=generator) + 0.01
    quantizer = Uniform(scale, None if zero_point is None else torch.tensor(zero_point), bits)
    low, high = quantizer.bounds()
    x = low - 2 + torch.rand(4, 300, generator=generator) * (high - low + 4)
    codes, once = quantizer.codes(x), quantized(quantizer, x)
    assert codes.dtype == torch.int32
    assert codes.min() >= quantizer.lowest
    assert codes.max() <= quantizer.highest
    assert torch.equal(quantized(quantizer, once), once)
    assert torch.equal(quantizer.codes(once), codes)
    assert torch.equal(fake_quantized(quantizer, x), once)
    inside = (x >= low) & (x <= high)
    tolerance = (scale / 2 + x.abs() * 1e-6).expand_as(x)
    assert ((once - x).abs()[inside] <= tolerance[inside]).all()
    assert torch.equal(once[x < low], low.expand_as(x)[x < low])
    assert torch.equal(once[x > high], high.expand_as(x)[x > high])


class TestGradients:
    def test_of_data_is_one_inside_and_zero_outside(self) -> None:
        x = torch.tensor([-9.0, -1.0, 0.3, 0.5, 9.0], requires_grad=True)
        fake_quantized(Uniform(scalar(0.5), torch.tensor(2), 2), x).sum().backward()
        assert x.grad is not None
        assert x.grad.tolist() == [0, 1, 1, 1, 0]

    def test_of_scale_is_that_of_lsq(self) -> None:
        # Eq. 3: round(v) - v inside, the end of the range outside; v = x / s = -18, -1.4, 0.4, 0.6, 18.
        scale = torch.tensor(0.5, requires_grad=True)
        for x, expected in ((-9.0, -2.0), (-0.7, 0.4), (0.2, -0.4), (0.3, 0.4), (9.0, 1.0)):
            (gradient,) = torch.autograd.grad(fake_quantized(Uniform(scale, None, 2), scalar(x)), scale)
            assert gradient.item() == pytest.approx(expected, abs=1e-6)

    def test_of_scale_is_the_slope_where_the_codes_are_fixed(self) -> None:
        # Outside the range x^ = s * end exactly, so that the gradient must be the true derivative.
        scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        x = torch.tensor([-9.0, 9.0], dtype=torch.float64)
        assert torch.autograd.gradcheck(lambda s: fake_quantized(Uniform(s, torch.tensor(1), 2), x), scale)

    def test_per_channel_scales_each_get_theirs(self) -> None:
        scale = torch.tensor([[0.5], [1.0]], requires_grad=True)
        x = torch.tensor([[9.0, 9.0], [0.25, 0.25]])
        fake_quantized(Uniform(scale, None, 3), x).sum().backward()
        assert scale.grad is not None
        assert scale.grad.tolist() == [[6.0], [-0.5]]

    def test_lsq_scale_changes_the_gradient_only(self) -> None:
        scale = torch.tensor(0.3, requires_grad=True)
        slowed = lsq_scale(scale, elements=25, highest=4)
        assert slowed.item() == scale.item()
        slowed.backward()
        assert scale.grad is not None
        assert scale.grad.item() == pytest.approx(0.1)


class TestDegenerate:
    def test_empty_single_and_huge(self) -> None:
        quantizer = Uniform(scalar(1.0), torch.tensor(3), 4)
        assert quantized(quantizer, torch.zeros(0, 3)).shape == (0, 3)
        assert quantized(quantizer, scalar(2.2)).item() == 2.0
        assert quantizer.codes(torch.tensor([-3e38, 3e38])).tolist() == [0, 15]
        assert Uniform(scalar(1e-38), None, 8).codes(scalar(3e38)).item() == 127

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
    def test_nan_and_infinity(self, bad: float) -> None:
        with pytest.raises(InputError, match=r"x: 1 of 3 numbers are NaN or infinite"):
            Uniform(scalar(1.0), None, 4).codes(torch.tensor([1.0, bad, 2.0]))

    @pytest.mark.parametrize("bits", [0, 1, 9, 32])
    def test_other_widths(self, bits: int) -> None:
        with pytest.raises(InputError, match=f"bits: wanted 2 to 8, got {bits}"):
            Uniform(scalar(1.0), None, bits)

    def test_parameters_that_are_none(self) -> None:
        with pytest.raises(InputError, match="scale: wanted numbers above 0, got 0"):
            Uniform(torch.tensor([1.0, 0.0]), None, 4)
        with pytest.raises(InputError, match="scale: 1 of 1 numbers are NaN"):
            Uniform(scalar(float("nan")), None, 4)
        with pytest.raises(InputError, match=r"zero_point: wanted integers, got torch.float32; round it first"):
            Uniform(scalar(1.0), scalar(8.2), 4)
