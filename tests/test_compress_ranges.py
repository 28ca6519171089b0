"""Finding ranges: torch's own quantiles and brute force as references, values by hand, degenerate data."""

import itertools

import pytest
import torch
from torch import Tensor

from denselab.compress.quantizers import AdaLog, Log2, LogSqrt2, TanQ, Uniform, code_bits, quantized
from denselab.compress.ranges import (
    ADALOG_BASES,
    adalog_bases,
    affine,
    chosen,
    extremes,
    fpcs,
    grid,
    least,
    least_error,
    lsq_start,
    median_scale,
    percentile_ranges,
    percentile_scales,
    squared_errors,
    sulq,
    symmetric,
    ternary,
)
from denselab.errors import InputError


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class TestRanges:
    def test_extremes_per_tensor_channel_and_head(self) -> None:
        x = randn(2, 3, 4, 5)
        low, high = extremes(x)
        assert (low.shape, high.item()) == ((), x.max().item())
        low, high = extremes(x, keep=(1,))
        assert torch.equal(low, x.amin((0, 2, 3), keepdim=True))
        assert torch.equal(extremes(x, keep=(-1, 0))[1], x.amax((1, 2), keepdim=True))

    @pytest.mark.parametrize("shares", [(0.9, 1.0), (0.999, 0.97), (0.5, 0.1, 0.0)])
    def test_percentiles_are_those_of_torch(self, shares: tuple[float, ...]) -> None:
        x = randn(40, 6)
        for (low, high), share in zip(percentile_ranges(x, shares, keep=(1,)), shares, strict=True):
            torch.testing.assert_close(high, x.quantile(share, 0, keepdim=True))
            torch.testing.assert_close(low, x.quantile(1 - share, 0, keepdim=True))
        for scale, share in zip(percentile_scales(x.exp(), shares), shares, strict=True):
            torch.testing.assert_close(scale, x.exp().quantile(share))

    def test_percentile_by_hand(self) -> None:
        ((low, high),) = percentile_ranges(torch.tensor([4.0, 0.0, 2.0, 1.0, 3.0]), [0.9])
        assert (low.item(), high.item()) == (pytest.approx(0.4), pytest.approx(3.6))

    def test_affine_by_hand(self) -> None:
        quantizer = affine(torch.tensor(-1.0), torch.tensor(2.0), 2)
        assert quantizer.zero_point is not None
        assert (quantizer.scale.item(), quantizer.zero_point.item()) == (1.0, 1)
        assert quantized(quantizer, torch.tensor([-1.0, 0.0, 1.0, 2.0])).tolist() == [-1.0, 0.0, 1.0, 2.0]

    def test_photos_of_mean_one_half_keep_their_values(self) -> None:
        pixels = (torch.arange(256) / 255 - 0.5) / 0.5
        quantizer = affine(*extremes(pixels), 8)
        assert quantizer.zero_point is not None
        assert quantizer.zero_point.item() == 127
        codes = (quantized(quantizer, pixels) / quantizer.scale).round().unique()
        assert len(codes) == 255  # black to white in 254 steps
        half_a_step = (pixels / quantizer.scale).frac().abs() == 0.5
        assert not half_a_step.any()

    def test_with_zero_or_without(self) -> None:
        low, high = torch.tensor([3.0, -6.0]), torch.tensor([6.0, -3.0])
        inside, outside = affine(low, high, 2), affine(low, high, 2, with_zero=False)
        assert inside.zero_point is not None
        assert outside.zero_point is not None
        assert inside.scale.tolist() == [2.0, 2.0]
        assert inside.zero_point.tolist() == [0, 3]
        assert outside.scale.tolist() == [1.0, 1.0]
        assert outside.zero_point.tolist() == [-3, 6]

    def test_symmetric_by_hand(self) -> None:
        quantizer = symmetric(torch.tensor(-7.0), torch.tensor(2.0), 4)
        assert (quantizer.scale.item(), quantizer.zero_point) == (1.0, None)

    @pytest.mark.parametrize("bits", range(2, 9))
    def test_error_within_the_range_is_half_a_step(self, bits: int) -> None:
        x = randn(5, 200, seed=bits) + torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0])[:, None]
        for quantizer in (
            affine(*extremes(x, keep=(0,)), bits),
            affine(*extremes(x, keep=(0,)), bits, with_zero=False),
            symmetric(*extremes(x, keep=(0,)), bits),
        ):
            error = (quantized(quantizer, x) - x).abs()
            assert (error <= quantizer.scale * 0.5001).all()


class TestDegenerate:
    @pytest.mark.parametrize("with_zero", [True, False])
    @pytest.mark.parametrize("bits", [2, 4, 8])
    def test_constants_are_kept(self, with_zero: bool, bits: int) -> None:
        x = torch.tensor([[0.0], [5.3], [-0.07], [1e-41], [3e30]]).expand(5, 4)
        quantizer = affine(*extremes(x, keep=(0,)), bits, with_zero)
        torch.testing.assert_close(quantized(quantizer, x), x, rtol=1e-6, atol=1e-40)
        assert quantizer.scale[0] == 1
        half = symmetric(*extremes(x, keep=(0,)), bits)
        torch.testing.assert_close(quantized(half, x), x, rtol=1e-6, atol=1e-40)

    def test_nearly_constant_far_from_zero(self) -> None:
        # Codes that far from their zero point must stay exact in float32.
        x = 1000 + torch.arange(16) * 1e-4
        quantizer = affine(*extremes(x), 4, with_zero=False)
        assert quantizer.zero_point is not None
        assert quantizer.zero_point.abs().item() <= 2**16
        assert ((quantized(quantizer, x) - x).abs() <= quantizer.scale).all()

    def test_one_element(self) -> None:
        x = torch.tensor([2.5])
        assert quantized(affine(*extremes(x), 4), x).item() == 2.5
        assert quantized(ternary(x), x).item() == 2.5
        assert least_error(x, [LogSqrt2(scale, 4) for scale in percentile_scales(x)]).scale.item() == 2.5

    def test_zeros(self) -> None:
        x = torch.zeros(3, 4)
        for quantizer in (
            affine(*extremes(x), 4),
            symmetric(*extremes(x), 4),
            ternary(x, keep=(0,)),
            lsq_start(x, 4),
            *(Log2(scale, 4) for scale in percentile_scales(x)),
            least_error(x, grid(affine(*extremes(x), 4))),
        ):
            assert not quantized(quantizer, x).any()
        assert (quantized(sulq(*extremes(x), 0.25, 4), x) == 0).all()

    def test_huge_outliers(self) -> None:
        x = torch.cat([randn(999), torch.tensor([-3e38, 3e38])])
        assert quantized(affine(*extremes(x), 8), x).isfinite().all()
        candidates = [affine(*each, 4) for each in ((torch.tensor(-4.0), torch.tensor(4.0)), extremes(x))]
        errors = squared_errors(x, candidates)
        assert errors.isfinite().all()
        assert errors[0] > errors[1]
        assert quantized(ternary(x), x).isfinite().all()

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_nan_and_infinity(self, bad: float) -> None:
        x = torch.tensor([1.0, bad, bad])
        one = torch.tensor(1.0)
        for search in (extremes, percentile_ranges, percentile_scales, ternary, lambda x: lsq_start(x, 4)):
            with pytest.raises(InputError, match="x: 2 of 3 numbers are NaN or infinite"):
                search(x)
        with pytest.raises(InputError, match="x: 2 of 3"):
            squared_errors(x, [Log2(one, 4)])
        with pytest.raises(InputError, match="weights: 2 of 3"):
            squared_errors(torch.ones(3), [Log2(one, 4)], weights=x)
        with pytest.raises(InputError, match="errors: 2 of 3"):
            chosen([Log2(one, 4)] * 3, x)
        with pytest.raises(InputError, match="low: 1 of 1"):
            affine(torch.tensor(bad), one, 4)
        with pytest.raises(InputError, match="error: 1 of 1"):
            least([Log2(one, 4)], lambda _: bad)

    def test_no_data_and_no_candidates(self) -> None:
        for search in (extremes, percentile_ranges, percentile_scales, ternary):
            with pytest.raises(InputError, match=r"x: wanted at least one number, got an empty tensor \[0, 3\]"):
                search(torch.zeros(0, 3))
        for search in (lambda: squared_errors(torch.ones(3), []), lambda: least([], lambda _: 0.0)):
            with pytest.raises(InputError, match="candidates: wanted at least one"):
                search()

    def test_bad_ranges(self) -> None:
        with pytest.raises(InputError, match="high: wanted at least low"):
            affine(torch.tensor(1.0), torch.tensor(0.0), 4)
        with pytest.raises(InputError, match=r"shares: wanted shares of the data from 0 to 1, got \[99\.9\]"):
            percentile_ranges(torch.ones(3), [99.9])


class TestChoice:
    def test_errors_are_sums_per_channel_and_add_up_over_batches(self) -> None:
        x = randn(6, 3, 7)
        candidates = [affine(*each, 3) for each in percentile_ranges(x, (0.8, 0.9, 1.0), keep=(1,))]
        errors = squared_errors(x, candidates)
        assert errors.shape == (3, 1, 3, 1)
        for candidate, error in zip(candidates, errors, strict=True):
            expected = (quantized(candidate, x) - x).double().square().sum((0, 2), keepdim=True)
            torch.testing.assert_close(error, expected)
        halves = squared_errors(x[:2], candidates) + squared_errors(x[2:], candidates)
        torch.testing.assert_close(halves, errors)

    def test_every_channel_takes_its_own(self) -> None:
        x = torch.stack([randn(100), randn(100).where(torch.arange(100) > 0, 50.0)])
        candidates = [affine(*each, 3) for each in percentile_ranges(x, (0.98, 1.0), keep=(0,))]
        best = least_error(x, candidates)
        per_row = [
            least_error(x[row], [affine(*each, 3) for each in percentile_ranges(x[row], (0.98, 1.0))]) for row in (0, 1)
        ]
        assert torch.equal(best.scale.flatten(), torch.stack([each.scale for each in per_row]))
        assert best.zero_point is not None
        assert best.zero_point.flatten().tolist() == [each.zero_point for each in per_row]

    def test_first_of_equals(self) -> None:
        one, two = (Log2(torch.tensor(scale), 4) for scale in (1.0, 2.0))
        assert chosen([one, two], torch.zeros(2)).scale == 1
        assert least([two, one], lambda _: 1.0) is two

    def test_weights_decide(self) -> None:
        x = torch.tensor([0.1, 0.2, 0.3, 8.0])
        candidates = grid(affine(*extremes(x), 2))
        wide, narrow = (
            least_error(x, candidates, torch.tensor(weights)) for weights in ((1.0, 1, 1, 1e3), (1.0, 1, 1, 0.0))
        )
        assert quantized(wide, x)[3].item() == pytest.approx(8, abs=0.1)
        assert narrow.scale < wide.scale / 2
        assert torch.equal(least_error(x, candidates, torch.ones(())).scale, least_error(x, candidates).scale)

    def test_kinds_cannot_be_mixed_per_element_but_as_a_whole(self) -> None:
        x = torch.rand(200, generator=torch.Generator().manual_seed(0)) ** 6
        scale = x.max()
        mixed = [Log2(scale, 4), LogSqrt2(scale, 4), TanQ(scale, torch.tensor(1.0), 4), affine(*extremes(x), 4)]
        with pytest.raises(InputError, match="candidates: must be of one kind and width, got LogSqrt2 and Log2"):
            least_error(x, mixed)
        with pytest.raises(InputError, match="with bits 4 and 3"):
            least_error(x, [Log2(scale, 3), Log2(scale, 4)])
        errors = [squared_errors(x, [each]).item() for each in mixed]
        best = least(mixed, lambda each: squared_errors(x, [each]).item())
        assert best is mixed[errors.index(min(errors))]

    def test_grid_holds_the_base_and_all_pairs(self) -> None:
        base = affine(torch.tensor(-0.5), torch.tensor(7.0), 4)
        candidates = grid(base, (1.0, 0.5), zero_point_steps=2)
        assert len(candidates) == 10
        assert candidates[0].zero_point == base.zero_point == 1
        assert {int(each.zero_point) for each in candidates if each.zero_point is not None} == {0, 1, 2, 3}
        assert {each.scale.item() for each in candidates} == {0.5, 0.25}
        outside = Uniform(torch.tensor(1.0), torch.tensor(-3), 4)
        assert [int(z) for z in (each.zero_point for each in grid(outside, (1.0,), 1)) if z is not None] == [-3, -3, -2]
        assert all(each.zero_point is None for each in grid(symmetric(*extremes(randn(9)), 4)))

    def test_grid_beats_extremes_on_long_tails(self) -> None:
        x = randn(4, 500) ** 3
        for base in (affine(*extremes(x, keep=(0,)), 4), symmetric(*extremes(x, keep=(0,)), 4)):
            best = least_error(x, grid(base, zero_point_steps=1))
            errors = squared_errors(x, [base, best])
            assert (errors[1] < 0.95 * errors[0]).all()

    def test_base_of_adalog_by_output_error(self) -> None:
        attention = (randn(2, 6, 6) * 2).softmax(-1)
        values = randn(2, 6, 4, seed=1)
        candidates = adalog_bases(torch.ones(()), 3)
        assert [each.q.item() for each in candidates] == list(ADALOG_BASES)

        def output_error(quantizer: AdaLog) -> float:
            return (quantized(quantizer, attention) @ values - attention @ values).square().sum().item()

        best = least(candidates, output_error)
        assert output_error(best) == min(map(output_error, candidates))
        log2 = next(each for each in candidates if each.q == 37)
        assert output_error(best) <= output_error(log2)


class TestSmallOnes:
    def test_ternary_by_hand(self) -> None:
        # Mean |x| = 2, threshold 1.4, above it 3 and 4.
        x = torch.tensor([[1.0, 0.0, -3.0, 4.0], [0.0, 0.0, 0.0, 0.0]])
        quantizer = ternary(x, keep=(0,))
        assert quantizer.threshold[0].item() == pytest.approx(1.4)
        assert quantized(quantizer, x).tolist() == [[0.0, 0.0, -3.5, 3.5], [0.0, 0.0, 0.0, 0.0]]

    def test_ternary_scale_is_the_best_for_its_codes(self) -> None:
        x = randn(300)
        quantizer = ternary(x)
        codes = quantizer.codes(x)
        best = (x * codes).sum() / (codes != 0).sum()
        torch.testing.assert_close(quantizer.scale, best)

    def test_lsq_start_by_hand(self) -> None:
        # 2 * mean 3 / sqrt(7)
        quantizer = lsq_start(torch.tensor([[1.0, -5.0], [3.0, 3.0]]), 4, keep=(0,))
        assert quantizer.scale.flatten().tolist() == pytest.approx([6 / 7**0.5] * 2)

    def test_sulq_by_hand(self) -> None:
        quantizer = sulq(torch.tensor(0.0), torch.tensor(0.75), 0.25, 4)
        assert (quantizer.min_log2.item(), quantizer.max_log2.item()) == (-2.0, 0.0)
        assert code_bits(quantizer) == 4

    def test_median_has_the_least_distance(self) -> None:
        scales = randn(8).abs().view(1, 1, 8)
        median = median_scale(scales)
        distances = [(scales - each).abs().mean().item() for each in scales.flatten()]
        assert (scales - median).abs().mean().item() == pytest.approx(min(distances))
        assert median in scales
        assert median_scale(torch.tensor([1.0, 2.0, 99.0])).item() == 2.0


class TestFpcs:
    def test_finds_the_best_pair_finer_than_the_grid(self) -> None:
        scales, others = torch.linspace(0, 7, 8) + 0.5, torch.arange(16)
        best_scale, best_other = fpcs(scales, others, lambda s, o: (s - 3.1416).square() + (o - 11).abs())
        assert best_other.item() == 11
        assert best_scale.item() == pytest.approx(3.1416, abs=1e-3)

    def test_per_channel_as_by_brute_force(self) -> None:
        x = randn(5, 60) * torch.logspace(-1, 1, 5)[:, None]
        low, high = extremes(x, keep=(0,))
        width = (high - low) / 7
        scales = torch.stack([width * share for share in torch.linspace(0.5, 1, 8)])

        def score(scale: Tensor, zero_point: Tensor) -> Tensor:
            return torch.stack(
                [squared_errors(x, [Uniform(s, z, 3)])[0] for s, z in zip(scale, zero_point, strict=True)]
            )

        scale, zero_point = fpcs(scales, torch.arange(8, dtype=torch.int32), score, steps=4, beam=4, budget=16)
        assert scale.shape == zero_point.shape == (5, 1)
        found = squared_errors(x, [Uniform(scale, zero_point, 3)])[0]
        coarse = [Uniform(s, torch.tensor(z), 3) for s, z in itertools.product(scales, range(8))]
        fine = [
            Uniform(width * share, torch.tensor(z), 3)
            for share, z in itertools.product(torch.linspace(0.5, 1, 200), range(8))
        ]
        assert (found <= squared_errors(x, coarse).amin(0)).all()
        assert (found <= 1.02 * squared_errors(x, fine).amin(0)).all()

    def test_no_round_loses_the_best(self) -> None:
        # The optimum is a coarse scale itself; new scales never hit it (an even number around the survivors).
        scales = torch.linspace(1, 4, 4)
        scale, _ = fpcs(scales, torch.zeros(1), lambda s, _: (s != 2).double(), beam=2, budget=8)
        assert scale.item() == 2

    def test_one_step_is_the_coarse_grid(self) -> None:
        scale, other = fpcs(torch.tensor([1.0, 2.0]), torch.tensor([5, 6]), lambda s, o: -(s * o), steps=1)
        assert (scale.item(), other.item()) == (2.0, 6)

    def test_scales_stay_above_zero(self) -> None:
        seen: list[Tensor] = []

        def score(scale: Tensor, _: Tensor) -> Tensor:
            seen.append(scale)
            return scale

        fpcs(torch.tensor([0.1, 1.0]), torch.zeros(1), score, beam=1, budget=8)
        assert torch.cat(seen).min().item() == pytest.approx(0.05)

    def test_bad_settings(self) -> None:
        two = torch.tensor([1.0, 2.0])
        with pytest.raises(InputError, match=r"fpcs: wanted at least 2 scales.*got 1 scales"):
            fpcs(two[:1], two, lambda s, _: s)
        with pytest.raises(InputError, match="budget 16, beam 16"):
            fpcs(two, two, lambda s, _: s, budget=16)
        with pytest.raises(InputError, match="errors: 4 of 4 numbers are NaN"):
            fpcs(two, two, lambda s, _: s * float("nan"))
        with pytest.raises(InputError, match=r"score: wanted errors \[4\], as the scales, got \[2\]"):
            fpcs(two, two, lambda s, _: s[:2])
