"""Logarithmic, AdaLog, SULQ, TanQ and ternary quantizers: by hand, what holds for all, degenerate data."""

import math

import pytest
import torch
from torch import Tensor, nn

from denselab.compress.quantizers import (
    AdaLog,
    Log2,
    LogSqrt2,
    Quantizer,
    Sulq,
    TanQ,
    Ternary,
    Uniform,
    ZeroCode,
    code_bits,
    fake_quantized,
    parameter_shape,
    quantized,
)
from denselab.errors import InputError


def scalar(number: float) -> Tensor:
    return torch.tensor(number)


def all_quantizers(bits: int) -> list[Quantizer]:
    scale = scalar(0.8)
    return [
        Uniform(scale / 2**bits, torch.tensor(1), bits),
        *(kind(scale, bits, zero) for kind in (Log2, LogSqrt2) for zero in ZeroCode),
        *(AdaLog(scale, torch.tensor(37), bits, scalar(0.17), zero) for zero in ZeroCode),
        AdaLog(scale, torch.tensor(52), bits),
        Sulq(scalar(0.01), scalar(-6.6), scalar(-0.02), bits),
        *(TanQ(scale, scalar(theta), bits) for theta in (0.01, 0.8, 1.5)),
        Ternary(scale, scalar(0.3)),
    ]


@pytest.mark.parametrize("bits", range(2, 9))
def test_what_holds_for_all(bits: int) -> None:
    x = torch.cat([torch.linspace(-1.2, 1.2, 977), torch.logspace(-30, 0, 200), torch.zeros(1)])
    for quantizer in all_quantizers(bits):
        codes, once = quantizer.codes(x), quantized(quantizer, x)
        assert codes.dtype == torch.int32
        assert int(codes.max() - codes.min()) < quantizer.levels <= 2 ** code_bits(quantizer)
        assert once.isfinite().all(), quantizer
        assert torch.equal(quantized(quantizer, once), once), quantizer
        assert len(once.unique()) <= quantizer.levels
        order = once[x.argsort()]
        assert (order.diff() >= 0).all(), quantizer
        assert torch.equal(fake_quantized(quantizer, x), once)
        extra = isinstance(quantizer, Log2 | LogSqrt2 | AdaLog) and quantizer.zero is ZeroCode.EXTRA
        assert code_bits(quantizer) == (2 if isinstance(quantizer, Ternary) else bits + extra)


def test_gradient_is_one_inside_and_zero_outside() -> None:
    for quantizer in all_quantizers(4):
        low, high = quantizer.bounds()
        if isinstance(quantizer, Ternary):
            low, high = scalar(-5.0), scalar(5.0)
        x = torch.linspace(low.item(), high.item(), 9)[1:-1].requires_grad_()
        fake_quantized(quantizer, x).sum().backward()
        assert x.grad is not None
        assert (x.grad == 1).all()
        outside = torch.stack([low - 0.1, high + 0.1]).requires_grad_()
        fake_quantized(quantizer, outside).sum().backward()
        assert outside.grad is not None
        assert (outside.grad == isinstance(quantizer, Ternary)).all()


def test_empty_single_zero_and_huge() -> None:
    for quantizer in all_quantizers(3):
        assert quantized(quantizer, torch.zeros(2, 0)).shape == (2, 0)
        assert quantized(quantizer, scalar(0.5)).shape == ()
        assert quantized(quantizer, torch.tensor([3e38, -3e38])).isfinite().all()
        if not isinstance(quantizer, Sulq | AdaLog):
            assert not quantized(quantizer, torch.zeros(5)).any()


def test_nan_and_infinity() -> None:
    for quantizer in all_quantizers(3):
        for bad in (float("nan"), float("inf")):
            with pytest.raises(InputError, match="x: 1 of 2 numbers are NaN or infinite"):
                quantized(quantizer, torch.tensor([0.1, bad]))


def test_other_widths_and_scales() -> None:
    one = scalar(1.0)
    for build in (
        lambda bits: Log2(one, bits),
        lambda bits: LogSqrt2(one, bits),
        lambda bits: AdaLog(one, torch.tensor(37), bits),
        lambda bits: Sulq(one, -one, one, bits),
        lambda bits: TanQ(one, one, bits),
    ):
        for bits in (1, 9):
            with pytest.raises(InputError, match=f"bits: wanted 2 to 8, got {bits}"):
                build(bits)
    for kind in (Log2, LogSqrt2):
        with pytest.raises(InputError, match="scale: wanted numbers above 0, got -1"):
            kind(-one, 4)


class ThroughAll(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(fake_quantized(each, x) for each in all_quantizers(4))


def test_they_can_be_exported() -> None:
    x = torch.linspace(-0.4, 0.9, 31)
    exported = torch.export.export(ThroughAll(), (x,)).module()
    for ours, traced in zip(ThroughAll()(x), exported(x), strict=True):
        assert torch.equal(ours, traced)


class TestLogarithm:
    def test_log2_by_hand(self) -> None:
        quantizer = Log2(scalar(2.0), 2)
        x = torch.tensor([5.0, 2.0, 1.5, 1.4, 1.0, 0.5, 0.36, 0.35, 0.0, -1.0])
        assert quantizer.codes(x).tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3, 3]
        assert quantizer.values(torch.arange(4)).tolist() == [2.0, 1.0, 0.5, 0.0]

    def test_the_extra_code_keeps_one_more_power(self) -> None:
        quantizer = Log2(scalar(2.0), 2, ZeroCode.EXTRA)
        assert quantizer.values(torch.arange(5)).tolist() == [2.0, 1.0, 0.5, 0.25, 0.0]
        assert (quantizer.levels, code_bits(quantizer)) == (5, 3)

    def test_log_sqrt2_is_a_shift_and_a_parity(self) -> None:
        quantizer = LogSqrt2(scalar(4.0), 3)
        root = math.sqrt(2)
        expected = torch.tensor([4, 2 * root, 2, root, 1, root / 2, 0.5, 0])
        assert torch.equal(quantizer.values(torch.arange(8)), expected)
        assert quantizer.codes(expected).tolist() == list(range(8))
        # Halfway in the exponent: 2^-1/4 of a level.
        assert quantizer.codes(torch.tensor([4 * 2**-0.24, 4 * 2**-0.26])).tolist() == [0, 1]

    def test_scale_per_head(self) -> None:
        quantizer = LogSqrt2(torch.tensor([1.0, 0.25]).view(1, 2, 1, 1), 4)
        x = torch.full((1, 2, 3, 3), 0.25)
        assert quantizer.codes(x)[0, :, 0, 0].tolist() == [4, 0]
        assert torch.equal(quantized(quantizer, x), x)

    def test_powers_below_float32_are_zero(self) -> None:
        assert quantized(Log2(scalar(1.0), 8), scalar(1e-40)).item() == pytest.approx(2**-133)
        assert Log2(scalar(1.0), 8).values(torch.tensor([200])).item() == 0


class TestAdaLog:
    def test_by_hand(self) -> None:
        # q = 37 is log2; the 3-bit mantissas are k / 6.
        quantizer = AdaLog(scalar(2.0), torch.tensor(37), 2)
        exponents, mantissas = quantizer.tables()
        assert exponents.tolist() == [0, 1, 2, 3]
        assert mantissas.tolist() == [6, 6, 6, 0]
        assert quantizer.values(torch.arange(4)).tolist() == [2.0, 1.0, 0.5, 0.0]
        # q = 20: exponents 0, 20/37, 40/37; 2^(-20/37) = 0.6875 is 4 / 6, 2^(-3/37) = 0.945 is 6 / 6.
        quantizer = AdaLog(scalar(1.0), torch.tensor(20), 2)
        assert [table.tolist() for table in quantizer.tables()] == [[0, 0, 1, 1], [6, 4, 6, 0]]
        torch.testing.assert_close(quantizer.values(torch.arange(4)), torch.tensor([1.0, 2 / 3, 0.5, 0.0]))

    @pytest.mark.parametrize("bits", [2, 4, 8])
    @pytest.mark.parametrize("q", [10, 37, 137])
    def test_integer_tables_reproduce_the_values_exactly(self, bits: int, q: int) -> None:
        quantizer = AdaLog(torch.tensor(0.7, dtype=torch.float64), torch.tensor(q), bits)
        exponents, mantissas = (table.tolist() for table in quantizer.tables())
        expected = [
            mantissa / quantizer.mantissa_unit * 2.0**-exponent * 0.7
            for exponent, mantissa in zip(exponents, mantissas, strict=True)
        ]
        assert quantizer.values(torch.arange(2**bits)).tolist() == pytest.approx(expected, rel=1e-15, abs=0)
        exact = [2 ** (-code * q / 37) for code in range(2**bits - 1)]
        got = (quantizer.values(torch.arange(2**bits - 1)) / 0.7).tolist()
        assert got == pytest.approx(exact, rel=1 / quantizer.mantissa_unit)

    @pytest.mark.parametrize("bits", [2, 3, 4, 8])
    def test_twice_is_once_where_bases_are_coarser_than_mantissas(self, bits: int) -> None:
        for q in range(1, 138):
            quantizer = AdaLog(scalar(0.7), torch.tensor(q), bits)
            if q / 74 > math.log2(1 + 1 / quantizer.mantissa_unit):
                once = quantized(quantizer, quantizer.values(torch.arange(2**bits)))
                assert torch.equal(quantized(quantizer, once), once), q

    def test_base_per_head(self) -> None:
        bases = torch.tensor([37, 74]).view(1, 2, 1, 1)
        quantizer = AdaLog(scalar(1.0), bases, 4)
        assert parameter_shape(quantizer) == (1, 2, 1, 1)
        assert quantizer.codes(torch.full((1, 2, 1, 1), 2.0**-4)).flatten().tolist() == [4, 2]
        exponents, _ = quantizer.tables()
        assert exponents.shape == (16, 1, 2, 1, 1)
        assert exponents[3].flatten().tolist() == [3, 6]

    def test_shift_reaches_the_negative_tail(self) -> None:
        quantizer = AdaLog(scalar(1.0), torch.tensor(37), 4, scalar(0.25))
        assert quantized(quantizer, torch.tensor([-0.25, 0.0, 0.25, 0.75, 5.0])).tolist() == [
            -0.25, 0.0, 0.25, 0.75, 0.75,
        ]  # fmt: skip

    def test_bad_bases(self) -> None:
        with pytest.raises(InputError, match="q: wanted numbers above 0, got 0"):
            AdaLog(scalar(1.0), torch.tensor(0), 4)
        with pytest.raises(InputError, match=r"q: wanted integers \(int32 or int64\), got torch.float32"):
            AdaLog(scalar(1.0), scalar(37.0), 4)


class TestSulq:
    def test_by_hand(self) -> None:
        # log2(x + 1/4) from -2 to 0 in steps of 2/3: exponents -2, -1.33, -0.67, 0, rounded -2, -1, -1, 0.
        quantizer = Sulq(scalar(0.25), scalar(-2.0), scalar(0.0), 2)
        assert quantizer.exponents(torch.arange(4)).tolist() == [-2, -1, -1, 0]
        assert quantizer.values(torch.arange(4)).tolist() == [0.0, 0.25, 0.25, 0.75]
        assert quantizer.codes(torch.tensor([0.0, 0.06, 0.08, 0.25, 0.75, 2.0, -3.0])).tolist() == [
            0, 0, 1, 2, 3, 3, 0,
        ]  # fmt: skip

    def test_range_without_width(self) -> None:
        quantizer = Sulq(scalar(0.25), scalar(-2.0), scalar(-2.0), 4)
        assert not quantized(quantizer, torch.zeros(3)).any()

    def test_bad_parameters(self) -> None:
        with pytest.raises(InputError, match="eta: wanted numbers above 0, got 0"):
            Sulq(scalar(0.0), scalar(-2.0), scalar(0.0), 4)
        with pytest.raises(InputError, match="max_log2: wanted at least min_log2"):
            Sulq(scalar(0.1), scalar(0.0), scalar(-2.0), 4)
        with pytest.raises(InputError, match="min_log2: 1 of 1 numbers are NaN or infinite"):
            Sulq(scalar(0.1), scalar(-torch.inf), scalar(0.0), 4)


class TestTanQ:
    def test_by_hand(self) -> None:
        # theta = pi/4: tan(theta) = 1, x^ = 1/2 + (2/pi) atan(2c/3 - 1).
        quantizer = TanQ(scalar(1.0), scalar(math.pi / 4), 2)
        inner = 0.5 - 2 / math.pi * math.atan(1 / 3)
        expected = torch.tensor([0.0, inner, 1 - inner, 1.0])
        torch.testing.assert_close(quantizer.values(torch.arange(4)), expected)
        assert quantizer.codes(expected).tolist() == [0, 1, 2, 3]

    @pytest.mark.parametrize("theta", [0.3, 1.0, 1.5])
    @pytest.mark.parametrize("bits", [2, 4, 8])
    def test_ends_are_exact_and_dense(self, theta: float, bits: int) -> None:
        values = TanQ(scalar(0.7), scalar(theta), bits).values(torch.arange(2**bits))
        assert values[0] == 0
        assert values[-1] == scalar(0.7)
        gaps = values.diff()
        assert gaps[0] < gaps[len(gaps) // 2]
        assert gaps[-1] < gaps[len(gaps) // 2]
        torch.testing.assert_close(values + values.flip(0), torch.full_like(values, 0.7))

    def test_small_angle_is_uniform(self) -> None:
        values = TanQ(scalar(1.0), scalar(1e-3), 4).values(torch.arange(16))
        torch.testing.assert_close(values, torch.linspace(0, 1, 16), atol=1e-5, rtol=0)

    def test_bad_angles(self) -> None:
        with pytest.raises(InputError, match="theta: wanted numbers above 0, got 0"):
            TanQ(scalar(1.0), scalar(0.0), 4)
        with pytest.raises(InputError, match=r"theta: wanted radians below pi / 2, got 1\.6"):
            TanQ(scalar(1.0), scalar(1.6), 4)


class TestTernary:
    def test_by_hand(self) -> None:
        quantizer = Ternary(scalar(2.0), scalar(0.5))
        x = torch.tensor([-9.0, -0.6, -0.5, 0.0, 0.5, 0.6])
        assert quantizer.codes(x).tolist() == [-1, -1, 0, 0, 0, 1]
        assert quantizer.values(torch.tensor([-1, 0, 1])).tolist() == [-2.0, 0.0, 2.0]
        assert (quantizer.levels, code_bits(quantizer)) == (3, 2)

    @pytest.mark.parametrize("threshold", [-0.1, 2.0])
    def test_bad_thresholds(self, threshold: float) -> None:
        with pytest.raises(InputError, match="threshold: wanted from 0 to below the scale"):
            Ternary(scalar(2.0), scalar(threshold))
