"""Depth errors against the formulas written out, hand-worked values, alignment, and pixels that nobody knows."""

import math
import pickle

import numpy as np
import pytest

from denselab.errors import InputError
from denselab.metrics import Align, DepthFigures, DepthScore, Headline


def score(pred: object, truth: object, **options: object) -> DepthFigures:
    counted = DepthScore(**options)  # pyright: ignore[reportArgumentType]
    counted.update(np.array(pred, np.float32), np.array(truth, np.float32))
    return counted.compute()


def kitti_style(pred: np.ndarray, truth: np.ndarray, min_m: float, max_m: float) -> dict[str, float]:
    """The evaluation that public KITTI code shares, written out."""
    known = (truth > min_m) & (truth < max_m)
    d, g = np.clip(pred[known], min_m, max_m).astype(np.float64), truth[known].astype(np.float64)
    worse, error = np.maximum(d / g, g / d), np.log(d) - np.log(g)
    return {
        "abs_rel": np.mean(np.abs(d - g) / g),
        "sq_rel": np.mean((d - g) ** 2 / g),
        "squared_relative_error_deeplab2": np.mean(((d - g) / g) ** 2),
        "rmse_m": np.sqrt(np.mean((d - g) ** 2)),
        "rmse_log": np.sqrt(np.mean(error**2)),
        "silog": 100 * np.sqrt(np.mean(error**2) - np.mean(error) ** 2),
        "log10": np.mean(np.abs(np.log10(d) - np.log10(g))),
        **{f"delta{n}": np.mean(worse < 1.25**n) for n in (1, 2, 3)},
    }


def test_agrees_with_the_formulas_as_a_mean_over_images() -> None:
    rng = np.random.default_rng(0)
    counted, expected = DepthScore(0.5, 10), []
    for size in ((20, 30), (5, 7), (40, 11)):
        truth = rng.uniform(0.1, 12, size).astype(np.float32)
        pred = (truth * rng.uniform(0.5, 1.9, size)).astype(np.float32)
        truth[rng.random(size) < 0.3] = 0
        counted.update(pred, truth)
        expected.append(kitti_style(pred, truth, 0.5, 10))
    figures = counted.compute()
    for name in expected[0]:
        assert getattr(figures.errors, name) == pytest.approx(np.mean([e[name] for e in expected])), name
    assert (figures.images, figures.bad_pixels) == (3, 0)


def test_values_worked_by_hand() -> None:
    figures = score([[2.0, 4.0]], [[1.0, 5.0]])
    e = figures.errors
    assert e.abs_rel == pytest.approx((1 + 0.2) / 2)
    assert e.sq_rel == pytest.approx((1 + 0.2) / 2)
    assert e.squared_relative_error_deeplab2 == pytest.approx((1 + 0.04) / 2)
    assert e.rmse_m == pytest.approx(1)
    assert e.silog == pytest.approx(100 * (math.log(2) - math.log(0.8)) / 2)
    assert e.log10 == pytest.approx((math.log10(2) + math.log10(1.25)) / 2)
    assert (e.delta1, e.delta2, e.delta3) == (0, 0.5, 0.5)  # 5 / 4 is not below 1.25; 2 is above 1.25^3
    assert figures.headline == Headline("AbsRel", e.abs_rel, higher_is_better=False)
    assert "AbsRel" in figures.to_text()
    assert "mean over 1 images" in figures.to_text()
    assert figures.to_dict()["rmse_m"] == e.rmse_m


def test_a_scale_does_not_change_silog() -> None:
    truth = np.random.default_rng(1).uniform(1, 20, (9, 9))
    assert score(truth * 1.5, truth).errors.silog == pytest.approx(0, abs=1e-4)


def test_pixels_count_alike_within_an_image_and_images_alike() -> None:
    counted = DepthScore()
    counted.update(np.full((1, 1), 2.0), np.full((1, 1), 1.0))
    counted.update(np.full((30, 30), 1.0), np.full((30, 30), 1.0))
    assert counted.compute().errors.abs_rel == 0.5


@pytest.mark.parametrize("unknown", [0, np.nan, np.inf, -1, 80, 1e-3])
def test_unknown_truth_is_left_out_and_images_of_it_are_counted(unknown: float) -> None:
    figures = score([[1.0, 7.0]], [[1.0, unknown]])
    assert (figures.errors.abs_rel, figures.known_pixels) == (0, 1)
    nothing = score([[1.0]], [[unknown]])
    assert math.isnan(nothing.errors.abs_rel)
    assert (nothing.images, nothing.skipped_images) == (0, 1)
    assert nothing.to_dict()["abs_rel"] is None
    assert "1 images without known depth left out" in nothing.to_text()


def test_bad_predictions_are_counted_and_clipped() -> None:
    figures = score([[0, -2, np.nan, np.inf, -np.inf, 4]], [[2, 2, 2, 2, 2, 2]], min_m=1, max_m=6)
    assert (figures.bad_pixels, figures.known_pixels) == (5, 6)
    assert figures.errors.rmse_m == pytest.approx(math.sqrt((4 * 1 + 16 + 4) / 6))
    assert "5 of 6 pixels predicted 0, negative or not finite: clipped" in figures.to_text()


def test_alignment_of_relative_depth() -> None:
    truth = np.random.default_rng(2).uniform(1, 9, (12, 12))
    assert score(truth / 7, truth).errors.abs_rel > 0.5
    assert score(truth / 7, truth, how=Align.MEDIAN).errors.abs_rel == pytest.approx(0, abs=1e-6)
    shifted = score(truth * -3 - 5, truth, how=Align.SCALE_SHIFT)
    assert shifted.errors.abs_rel == pytest.approx(0, abs=1e-6)
    assert shifted.bad_pixels == 0
    inverse = score(0.3 / truth - 2, truth, how=Align.INVERSE)
    assert (inverse.errors.abs_rel, inverse.bad_pixels) == (pytest.approx(0, abs=1e-6), 0)
    for how in Align:
        assert score(np.full((3, 3), np.nan), np.ones((3, 3)), how=how).bad_pixels == 9
    constant = score(np.ones((3, 3)), truth[:3, :3], how=Align.SCALE_SHIFT)
    assert constant.errors.rmse_m == pytest.approx(truth[:3, :3].std(), rel=1e-5)


def test_inverse_depths_fitted_by_hand() -> None:
    """True inverses 1, 0.5, 0.5, 0.25 over 4, 2, 2, 0: slope and offset are 0.1875."""
    figures = score([[4, 2, 2, 0]], [[1, 2, 2, 4]], how=Align.INVERSE)
    errors = [abs(1 / (0.1875 * p + 0.1875) - t) / t for p, t in ((4, 1), (2, 2), (2, 2), (0, 4))]
    assert figures.errors.abs_rel == pytest.approx(np.mean(errors))
    # The offset is -0.017 here: 0 is fitted to less than nothing, which is infinitely far.
    beyond = score([[3, 2, 0]], [[1, 2, 50]], how=Align.INVERSE, max_m=70)
    assert beyond.bad_pixels == 1


def test_merge_and_pickle() -> None:
    rng = np.random.default_rng(3)
    images = [(rng.uniform(1, 9, (6, 6)), rng.uniform(0, 9, (6, 6))) for _ in range(5)]
    images.append((np.ones((6, 6)), np.zeros((6, 6))))
    whole, forth, back = DepthScore(), DepthScore(), DepthScore()
    parts = []
    for pred, truth in images:
        whole.update(pred, truth)
        part = DepthScore()
        part.update(pred, truth)
        parts.append(pickle.loads(pickle.dumps(part)))
    for part in parts:
        forth.merge(part)
    for part in parts[::-1]:
        back.merge(part)
    for merged in (forth, back):
        assert merged.compute().to_dict() == pytest.approx(whole.compute().to_dict())
    with pytest.raises(InputError, match=r"merge: scores must agree in \(min_m, max_m, how\)"):
        whole.merge(DepthScore(max_m=10))


def test_what_is_refused() -> None:
    with pytest.raises(InputError, match="wanted 0 < min_m < max_m, both finite, got 0 and 80"):
        DepthScore(0)
    with pytest.raises(InputError, match="prediction is 2x1 px but truth is 1x1 px; write the prediction at the size"):
        score([[1, 2]], [[1]])
    with pytest.raises(InputError, match=r"truth: wanted metres as floats \[H, W\], got uint16 \[1, 1\]"):
        DepthScore().update(np.ones((1, 1)), np.ones((1, 1), np.uint16))  # pyright: ignore[reportArgumentType]
