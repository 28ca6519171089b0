"""Angles between normals against NumPy over all pixels at once, hand-worked values, and pixels without a direction."""

import math
import pickle

import numpy as np
import pytest

from denselab.errors import InputError
from denselab.metrics import Headline, NormalScore


def random_normals(seed: int, *size: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(*size, 3))
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def test_agrees_with_numpy_over_all_pixels() -> None:
    counted, angles = NormalScore(), []
    for seed, size in enumerate([(20, 30), (7, 5), (11, 40)]):
        truth = random_normals(seed, *size)
        pred = truth + np.float32(0.4) * random_normals(seed + 50, *size)
        truth[:3] = 0
        counted.update(pred, truth)
        p, t = (v[3:].reshape(-1, 3).astype(np.float64) for v in (pred, truth))
        cosine = (p * t).sum(1) / np.linalg.norm(p, axis=1) / np.linalg.norm(t, axis=1)
        angles.append(np.degrees(np.arccos(cosine.clip(-1, 1))))
    every = np.concatenate(angles)
    figures = counted.compute()
    assert figures.mean_deg == pytest.approx(every.mean())
    assert figures.median_deg == pytest.approx(np.median(every), abs=0.01)
    assert figures.rmse_deg == pytest.approx(np.sqrt((every**2).mean()))
    shares = (figures.under_11_25, figures.under_22_5, figures.under_30)
    assert shares == pytest.approx([(every < limit).mean() for limit in (11.25, 22.5, 30)])
    assert (figures.known_pixels, figures.images) == (every.size, 3)


def test_values_worked_by_hand() -> None:
    truth = np.tile(np.array([0, 0, 1.0]), (1, 4, 1))
    pred = np.array([[[0, 0, 5.0], [1, 0, 1], [1, 0, 0], [0, 0, -1]]])  # 0, 45, 90, 180 degrees
    counted = NormalScore()
    counted.update(pred, truth)
    figures = counted.compute()
    assert figures.mean_deg == pytest.approx(78.75)
    assert figures.median_deg == pytest.approx(67.5, abs=0.01)
    assert figures.rmse_deg == pytest.approx(math.sqrt((45**2 + 90**2 + 180**2) / 4))
    assert (figures.under_11_25, figures.under_30) == (0.25, 0.25)
    assert figures.headline == Headline("mean angle", figures.mean_deg, higher_is_better=False)
    assert "under 11.25 degrees (%)   25.00" in figures.to_text()


def test_bad_predictions_are_the_worst_and_counted() -> None:
    truth = np.tile(np.array([0, 0, 1.0]), (1, 3, 1))
    counted = NormalScore()
    counted.update(np.array([[[0, 0, 0], [np.nan, 0, 1], [0, 0, 1]]]), truth)
    figures = counted.compute()
    assert (figures.mean_deg, figures.bad_pixels) == (120, 2)
    assert "2 pixels predicted without a direction: counted as 180 degrees" in figures.to_text()


def test_nothing_known() -> None:
    counted = NormalScore()
    unknown = np.zeros((2, 2, 3))
    unknown[0, 0] = np.nan
    counted.update(np.ones((2, 2, 3)), unknown)
    figures = counted.compute()
    assert math.isnan(figures.mean_deg)
    assert (figures.known_pixels, figures.images, figures.skipped_images) == (0, 0, 1)
    assert figures.to_dict()["median_deg"] is None
    assert "1 images without known normals left out" in figures.to_text()


def test_merge_and_pickle() -> None:
    whole, merged = NormalScore(), NormalScore()
    for seed in range(4):
        pred, truth = random_normals(seed, 9, 9), random_normals(seed + 9, 9, 9)
        whole.update(pred, truth)
        part = NormalScore()
        part.update(pred, truth)
        part.merge(merged)
        merged = pickle.loads(pickle.dumps(part))
    assert merged.compute().to_dict() == pytest.approx(whole.compute().to_dict())


def test_what_is_refused() -> None:
    with pytest.raises(InputError, match=r"prediction: wanted floats \[H, W, 3\], got float64 \[3, 4, 4\]"):
        NormalScore().update(np.ones((3, 4, 4)), np.ones((4, 4, 3)))
    with pytest.raises(InputError, match="prediction is 4x5 px but truth is 4x4 px"):
        NormalScore().update(np.ones((5, 4, 3)), np.ones((4, 4, 3)))
