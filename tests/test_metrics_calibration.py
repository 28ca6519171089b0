"""Calibration against the definition written out, scikit-learn's log loss, hand-worked values and empty bins."""

import json
import math
import pickle

import numpy as np
import pytest
from sklearn.metrics import log_loss

from denselab.errors import InputError
from denselab.metrics import CalibrationScore, Headline
from denselab.metrics.draw import reliability_picture


def random_image(seed: int, classes: int = 4, side: int = 24) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    logits = 2 * rng.normal(size=(classes, side, side))
    probs = np.exp(logits) / np.exp(logits).sum(axis=0)
    return probs.astype(np.float32), rng.integers(0, classes, (side, side)).astype(np.uint8)


def test_agrees_with_the_definition_and_scikit_learn() -> None:
    counted, all_probs, all_truth = CalibrationScore(10), [], []
    for seed in range(3):
        probs, truth = random_image(seed)
        truth[:2] = 255
        counted.update(probs, truth)
        all_probs.append(probs[:, 2:].reshape(4, -1).T)
        all_truth.append(truth[2:].ravel())
    probs, truth = np.concatenate(all_probs).astype(np.float64), np.concatenate(all_truth)
    confidence, hit = probs.max(1), probs.argmax(1) == truth
    gaps = []
    for m in range(10):
        inside = (confidence > m / 10) & (confidence <= (m + 1) / 10)
        if inside.any():
            gaps.append((inside.mean(), abs(hit[inside].mean() - confidence[inside].mean())))
    figures = counted.compute()
    assert figures.ece == pytest.approx(sum(share * gap for share, gap in gaps))
    assert figures.mce == pytest.approx(max(gap for _, gap in gaps))
    rescaled = probs / probs.sum(1, keepdims=True)
    assert figures.nll == pytest.approx(log_loss(truth, rescaled, labels=range(4)), rel=1e-5)
    assert figures.brier == pytest.approx(((probs - np.eye(4)[truth]) ** 2).sum(1).mean())


def test_confidence_of_the_predicted_class_gives_the_same_bins() -> None:
    whole, part = CalibrationScore(10), CalibrationScore(10)
    probs, truth = random_image(3)
    truth[:2] = 255
    whole.update(probs, truth)
    part.update_confidence(probs.max(0), probs.argmax(0), truth)
    ours, theirs = part.compute(), whole.compute()
    assert (ours.ece, ours.mce) == (theirs.ece, theirs.mce)
    assert ours.pixels.tolist() == theirs.pixels.tolist()
    assert math.isnan(ours.nll)
    part.merge(whole)
    assert part.compute().nll == theirs.nll
    part.update_confidence(np.ones((2, 2)), np.zeros((2, 2), int), np.full((2, 2), 255))
    assert part.compute().pixels.sum() == 2 * theirs.pixels.sum()


@pytest.mark.parametrize(
    ("confidence", "ids", "text"),
    [
        (
            np.ones((2, 2), int),
            np.zeros((2, 2), int),
            r"confidence: wanted probabilities as floats \[H, W\], got",
        ),
        (
            np.full((2, 2), np.nan),
            np.zeros((2, 2), int),
            r"wanted probabilities 0\.\.1, got values from nan",
        ),
        (np.full((2, 2), -0.1), np.zeros((2, 2), int), "wanted probabilities 0..1, got values from -0.1 to -0.1; give"),
        (np.ones((2, 3)), np.zeros((2, 2), int), "prediction is 3x2 px but truth is 2x2 px"),
        (np.ones((2, 2)), np.zeros((2, 2)), r"prediction: must be integer class ids \[H, W\], got float64 \[2, 2\]"),
    ],
)
def test_confidences_that_are_none(confidence: np.ndarray, ids: np.ndarray, text: str) -> None:
    with pytest.raises(InputError, match=text):
        CalibrationScore().update_confidence(confidence, ids, np.zeros((2, 2), int))


def test_values_worked_by_hand() -> None:
    # 4 px with confidence 0.75, three right: calibrated; 1 px sure and wrong
    probs = np.array([[0.75, 0.75, 0.75, 0.75, 1.0], [0.25, 0.25, 0.25, 0.25, 0.0]])[:, None]
    counted = CalibrationScore(bins=2)
    counted.update(probs[..., :4], np.array([[0, 0, 0, 1]]))
    assert counted.compute().ece == 0
    counted.update(probs[..., 4:], np.array([[1]]))
    figures = counted.compute()
    assert figures.ece == pytest.approx(abs(4.0 - 3.0) / 5)
    assert figures.pixels.tolist() == [0, 5]
    assert math.isnan(figures.accuracy[0])
    assert figures.brier == pytest.approx((3 * 2 * 0.0625 + 2 * 0.5625 + 2) / 5)
    assert figures.nll == pytest.approx((-3 * math.log(0.75) - math.log(0.25) - math.log(1e-12)) / 5)
    assert figures.headline == Headline("ECE", figures.ece, higher_is_better=False)
    assert json.loads(json.dumps(figures.to_dict()))["bins"][0] == {"confidence": None, "accuracy": None, "pixels": 0}
    assert "ECE (%)   20.00" in figures.to_text()


def test_a_bin_is_closed_above() -> None:
    counted = CalibrationScore(bins=4)
    counted.update(np.array([[[0.5]], [[0.5]]]), np.array([[0]]))
    assert counted.compute().pixels.tolist() == [0, 1, 0, 0]


def test_nothing_known_and_a_picture_of_it() -> None:
    counted = CalibrationScore()
    counted.update(random_image(0)[0], np.full((24, 24), 255))
    figures = counted.compute()
    assert math.isnan(figures.ece)
    assert figures.to_dict()["ece"] is None
    assert reliability_picture(figures).mode == "RGB"
    counted.update(*random_image(0))
    picture = np.asarray(reliability_picture(counted.compute()))
    assert (picture == (8, 64, 129)).all(axis=2).sum() > 1000


def test_merge_and_pickle() -> None:
    whole, merged = CalibrationScore(), CalibrationScore()
    for seed in range(3):
        whole.update(*random_image(seed))
        part = CalibrationScore()
        part.update(*random_image(seed))
        merged.merge(pickle.loads(pickle.dumps(part)))
    assert merged.compute().ece == pytest.approx(whole.compute().ece)
    with pytest.raises(InputError, match=r"merge: scores must agree in \(bins, ignore\)"):
        whole.merge(CalibrationScore(3))


def test_what_is_refused() -> None:
    probs, truth = random_image(0)
    for bad_probs, bad_truth, text in (
        (probs * 3, truth, r"class_probs: wanted probabilities that sum to 1 .* take the softmax first"),
        (probs[0], truth, r"class_probs: wanted probabilities as floats \[K, H, W\], got float32 \[24, 24\]"),
        (probs, truth + 7, r"truth has class ids from 7 to 10; wanted 0\.\.3 or ignored \(255\)"),
        (probs, truth[:3], "prediction is 24x24 px but truth is 24x3 px"),
        (probs, truth.astype(float), r"truth: must be integer class ids \[H, W\], got float64"),
    ):
        with pytest.raises(InputError, match=text):
            CalibrationScore().update(bad_probs, bad_truth)
    with pytest.raises(InputError, match="bins: must be at least 1, got 0"):
        CalibrationScore(0)
