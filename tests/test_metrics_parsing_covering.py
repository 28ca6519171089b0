"""Parsing Covering against masks compared one by one, hand-worked values, absent classes and crowds."""

import math
import pickle

import numpy as np
import pytest

from denselab.errors import InputError
from denselab.metrics import CoveringScore
from denselab.metrics.parsing_covering import coverings
from denselab.segments import Segment, Segments


def segments(ids: object, *infos: tuple[int, int] | tuple[int, int, bool]) -> Segments:
    return Segments(np.array([ids], np.int32), tuple(Segment(i[0], i[1], is_crowd=len(i) == 3) for i in infos))


def regions(seed: int, height: int, width: int) -> Segments:
    rng = np.random.default_rng(seed)
    ids = np.zeros((height, width), np.int32)
    for number in range(1, 9):
        y, x = rng.integers(height), rng.integers(width)
        ids[y : y + rng.integers(3, 20), x : x + rng.integers(3, 20)] = number
    return segments(ids, *((int(number), int(number) % 3) for number in np.unique(ids) if number))


def test_agrees_with_masks_compared_one_by_one() -> None:
    counted = CoveringScore(3, things=(0,))
    covered, total = np.zeros((2, 3))
    for seed, size in enumerate([(30, 40), (25, 25), (60, 20)]):
        pred, truth = regions(seed, *size), regions(seed + 10, *size)
        counted.update(pred, truth)
        known = truth.layers[0] > 0
        for region in truth.segments:
            mask = truth.mask(region)
            ious = [0.0]
            for other in pred.segments:
                if other.class_id == region.class_id:
                    theirs = pred.mask(other) & known
                    ious.append((mask & theirs).sum() / (mask | theirs).sum())
            covered[region.class_id] += mask.mean() * max(ious)
            total[region.class_id] += mask.mean()
    figures = counted.compute()
    assert figures.covering == pytest.approx(covered / total)
    assert figures.pc == pytest.approx((covered / total).mean())
    assert figures.things_pc == pytest.approx(covered[0] / total[0])


def test_values_worked_by_hand() -> None:
    # class 0: 3 px covered with IoU 2/3 and 1 px with 1/2; class 1 is missed
    truth = segments([[1, 1, 1, 2, 3]], (1, 0), (2, 0), (3, 1))
    pred = segments([[5, 5, 0, 6, 6]], (5, 0), (6, 0))
    counted = CoveringScore(3)
    counted.update(pred, truth)
    figures = counted.compute()
    assert figures.covering[:2] == pytest.approx([(3 * 2 / 3 + 1 / 2) / 4, 0])
    assert math.isnan(figures.covering[2])
    assert figures.headline.name == "PC"
    assert figures.to_text(["a", "b", "c"]).splitlines()[1:4] == ["a        62.50", "b         0.00", "c            -"]
    assert figures.to_dict()["stuff_pc"] == figures.pc


def test_crowds_are_void_and_images_weigh_alike() -> None:
    truth = segments([[1, 2, 2, 0]], (1, 0), (2, 0, True))
    pred = segments([[4, 4, 4, 4]], (4, 0))
    covered, total = coverings(pred, truth, 1)
    assert (covered[0], total[0]) == (0.25, 0.25)
    counted = CoveringScore(1)
    counted.update(pred, truth)
    missed = segments(np.ones((40, 50), np.int32), (1, 0))
    counted.update(segments(np.zeros((40, 50), np.int32)), missed)
    assert counted.compute().pc == pytest.approx(0.25 / 1.25)


def test_merge_pickle_and_what_is_refused() -> None:
    one, both = CoveringScore(3), CoveringScore(3)
    for seed in range(2):
        part = CoveringScore(3)
        part.update(regions(seed, 20, 20), regions(seed + 5, 20, 20))
        one.merge(pickle.loads(pickle.dumps(part)))
        both.update(regions(seed, 20, 20), regions(seed + 5, 20, 20))
    assert one.compute().pc == both.compute().pc
    with pytest.raises(InputError, match=r"merge: scores must agree in \(num_classes, things\)"):
        one.merge(CoveringScore(2))
    with pytest.raises(InputError, match="prediction is 1x1 px but truth is 20x20 px"):
        one.update(segments([[0]]), regions(0, 20, 20))
    with pytest.raises(InputError, match=r"truth: wanted class ids in 0\.\.2"):
        one.update(segments([[0]]), segments([[1]], (1, 3)))
    assert math.isnan(CoveringScore(2).compute().pc)
