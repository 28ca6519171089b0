"""Panoptic quality against panopticapi's own numbers, Boundary PQ against erosion, values worked by hand, no pixels."""

import json
import math
import pickle
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import binary_erosion

from denselab.errors import InputError
from denselab.metrics import Headline, PanopticFigures, PanopticScore
from denselab.metrics.joint_areas import joint_areas
from denselab.metrics.panoptic import match_segments
from denselab.segments import Segment, Segments

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def golden(shared_data: Path) -> dict[str, np.ndarray]:
    path = shared_data.parent / "golden" / "panoptic_quality.npz"
    if not path.is_file():
        pytest.skip(f"no golden numbers at {path}")
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def segments(ids: object, *infos: tuple[int, int] | tuple[int, int, bool]) -> Segments:
    """infos: segment id, class id and, perhaps, whether it is a crowd."""
    return Segments(np.array([ids], np.int32), tuple(Segment(i[0], i[1], is_crowd=len(i) == 3) for i in infos))


def golden_images(golden: dict[str, np.ndarray]) -> list[tuple[Segments, Segments]]:
    class_ids = {int(category): index for index, category in enumerate(golden["class_ids"])}
    images = []
    for index in range(len(golden["gt_ids"])):
        pair = []
        for side in ("pred", "gt"):
            infos = json.loads(str(golden[f"{side}_segments"]))[index]
            described = [Segment(s["id"], class_ids[s["category_id"]], 1.0, s.get("iscrowd") == 1) for s in infos]
            pair.append(Segments(golden[f"{side}_ids"][index].astype(np.int32)[None], tuple(described)))
        images.append((pair[0], pair[1]))
    return images


def golden_score(golden: dict[str, np.ndarray], boundary: bool = False) -> PanopticScore:
    categories = json.loads(str(golden["categories"]))
    return PanopticScore(len(categories), [i for i, c in enumerate(categories) if c["isthing"]], boundary)


def score(pred: Segments, truth: Segments, num_classes: int = 2, **options: object) -> PanopticFigures:
    counted = PanopticScore(num_classes, **options)  # pyright: ignore[reportArgumentType]
    counted.update(pred, truth)
    return counted.compute()


def counts(figures: PanopticFigures) -> list[list[int]]:
    return [figures.tp.tolist(), figures.fp.tolist(), figures.fn.tolist()]


def test_agrees_with_panopticapi(golden: dict[str, np.ndarray]) -> None:
    counted = golden_score(golden)
    for (pred, truth), expected in zip(golden_images(golden), golden["per_image_per_class_iou_tp_fp_fn"], strict=True):
        matches = match_segments(pred, truth, counted.num_classes)
        assert matches.iou_sum == pytest.approx(expected[:, 0], abs=1e-12)
        assert (np.stack((matches.tp, matches.fp, matches.fn), axis=1) == expected[:, 1:]).all()
        counted.update(pred, truth)
    figures = counted.compute()
    assert counts(figures) == golden["per_class_iou_tp_fp_fn"][:, 1:].T.tolist()
    assert np.nan_to_num(np.stack((figures.pq, figures.sq, figures.rq), 1)) == pytest.approx(
        golden["per_class_pq_sq_rq"], abs=1e-12
    )
    for kind in ("all", "things", "stuff"):
        quality = getattr(figures, kind)
        assert (quality.pq, quality.sq, quality.rq, quality.classes) == pytest.approx(
            golden[f"{kind}_pq_sq_rq_n"], abs=1e-12
        )


def test_merges_in_any_order_and_pickles(golden: dict[str, np.ndarray]) -> None:
    parts = []
    for pred, truth in golden_images(golden):
        part = golden_score(golden, boundary=True)
        part.update(pred, truth)
        parts.append(pickle.loads(pickle.dumps(part)))
    one, other = golden_score(golden, boundary=True), golden_score(golden, boundary=True)
    for part in parts:
        one.merge(part)
    for part in parts[::-1]:
        other.merge(part)
    assert one.compute().all.pq == pytest.approx(other.compute().all.pq, abs=1e-15)
    assert one.compute().all.pq == pytest.approx(golden["all_pq_sq_rq_n"][0], abs=1e-12)
    with pytest.raises(InputError, match=r"merge: scores must agree in \(num_classes, things, boundary, covering\)"):
        one.merge(golden_score(golden))


def test_the_transcription_that_is_raced_agrees_with_panopticapi(
    golden: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    from panoptic_reference import count_image

    totals = {int(category): [0.0, 0, 0, 0] for category in golden["class_ids"]}
    for index in range(len(golden["gt_ids"])):
        truths, preds = (
            {s["id"]: s for s in json.loads(str(golden[f"{side}_segments"]))[index]} for side in ("gt", "pred")
        )
        count_image(golden["gt_ids"][index], golden["pred_ids"][index], truths, preds, totals)
    assert np.array(list(totals.values())) == pytest.approx(golden["per_class_iou_tp_fp_fn"], abs=1e-12)


def brute_force_boundary_iou(pred: np.ndarray, truth: np.ndarray, width_px: int, void: np.ndarray) -> float:
    p, t = (m & ~binary_erosion(m, np.ones((3, 3)), iterations=width_px, border_value=0) for m in (pred, truth))
    return (p & t).sum() / ((p | t) & ~(p & void)).sum()


def test_boundary_iou_is_the_lesser_of_both() -> None:
    truth_ids, pred_ids = np.zeros((2, 240, 320), np.int32)
    truth_ids[5:200, 10:260], truth_ids[200:, :] = 7, 9
    pred_ids[6:200, 11:263], pred_ids[190:, :40] = 3, 4
    truth, pred = segments(truth_ids, (7, 0), (9, 1)), segments(pred_ids, (3, 0), (4, 1))
    figures = score(pred, truth, boundary=True)
    # d = 2 % of 400 px
    expected = brute_force_boundary_iou(pred_ids == 3, truth_ids == 7, 8, truth_ids == 0)
    area, void = (pred_ids == 3).sum(), ((pred_ids == 3) & (truth_ids == 0)).sum()
    overlap = ((pred_ids == 3) & (truth_ids == 7)).sum()
    assert figures.sq[0] == pytest.approx(overlap / (area + 195 * 250 - overlap - void))
    assert figures.boundary is not None
    assert 0.5 < expected < figures.sq[0]
    assert figures.boundary.sq[0] == pytest.approx(expected)
    assert "boundary PQ" in figures.to_text()
    boundary = figures.to_dict()["boundary"]
    assert isinstance(boundary, dict)
    assert boundary["pq"] == figures.boundary.all.pq


def test_values_worked_by_hand() -> None:
    figures = score(segments([[1, 1], [1, 0]], (1, 0)), segments([[1, 1], [1, 1]], (1, 0)))
    assert figures.pq[0] == 0.75  # IoU 3/4, one true positive
    assert figures.headline == Headline("PQ", 0.75, higher_is_better=True)
    assert math.isnan(figures.pq[1])
    assert figures.all.classes == 1


def test_half_is_no_match_and_void_is_left_out_of_the_union() -> None:
    half = score(segments([[1, 1]], (1, 0)), segments([[1, 2]], (1, 0), (2, 1)))
    assert counts(half) == [[0, 0], [1, 0], [1, 1]]
    # one px of the prediction on the segment, one on void: the union is 1 px
    void = score(segments([[1, 1]], (1, 0)), segments([[1, 0]], (1, 0)))
    assert counts(void) == [[1, 0], [0, 0], [0, 0]]
    assert void.sq[0] == 1


def test_predictions_on_void_and_crowds_are_forgiven_above_half() -> None:
    three_of_four = score(segments([[1, 1, 1, 1]], (1, 0)), segments([[0, 0, 0, 5]], (5, 1)))
    assert counts(three_of_four) == [[0, 0], [0, 0], [0, 1]]
    just_half = score(segments([[1, 1, 1, 1]], (1, 0)), segments([[0, 0, 5, 5]], (5, 1)))
    assert counts(just_half) == [[0, 0], [1, 0], [0, 1]]
    crowd = segments([[6, 6, 0, 5]], (6, 0, True), (5, 1))
    assert counts(score(segments([[1, 1, 1, 1]], (1, 0)), crowd)) == [[0, 0], [0, 0], [0, 1]]
    # the crowd of another class forgives nothing, and a crowd is never a miss; segment 2 matches, as half of it is void
    assert counts(score(segments([[1, 1, 2, 2]], (1, 1), (2, 1)), crowd)) == [[0, 1], [0, 1], [0, 0]]


def test_only_the_last_crowd_of_a_class_forgives_as_in_the_reference() -> None:
    pred = segments([[1, 1, 2, 2]], (1, 0), (2, 0))
    truth = segments([[8, 8, 4, 4]], (8, 0, True), (4, 0, True))
    assert counts(score(pred, truth)) == [[0, 0], [1, 0], [0, 0]]


def test_things_and_stuff_and_names() -> None:
    pred, truth = segments([[1, 1, 2]], (1, 0), (2, 1)), segments([[1, 1, 3]], (1, 0), (3, 2))
    figures = score(pred, truth, 4, things=(0, 3))
    assert (figures.things.pq, figures.things.classes) == (1, 1)
    assert (figures.stuff.pq, figures.stuff.classes) == (0, 2)
    assert figures.all.pq == pytest.approx(1 / 3)
    data = figures.to_dict(["a", "b", "c", "d"])
    assert data["classes"][1] == {  # pyright: ignore[reportIndexIssue]
        "name": "b", "thing": False, "pq": 0, "sq": 0, "rq": 0, "tp": 0, "fp": 1, "fn": 0,
    }  # fmt: skip
    assert json.loads(json.dumps(data))["classes"][3]["pq"] is None
    lines = figures.to_text(["a", "b", "c", "d"]).splitlines()
    assert lines[1].split() == ["a", "100.00", "100.00", "100.00", "1", "0", "0"]
    assert lines[4].split() == ["d", "-", "-", "-", "0", "0", "0"]
    assert lines[-1].split() == ["stuff", "0.00", "0.00", "0.00", "2"]


def test_nothing_at_all() -> None:
    void = segments(np.zeros((4, 5), np.int32))
    figures = score(void, void, boundary=True)
    assert math.isnan(figures.all.pq)
    assert figures.to_dict()["pq"] is None
    assert counts(score(void, segments([[3] * 5] * 4, (3, 1)))) == [[0, 0], [0, 0], [0, 1]]


def test_large_ids_do_not_overflow() -> None:
    most = 2**31 - 1
    pred = segments([[most, most - 1]], (most, 0), (most - 1, 1))
    truth = segments([[most - 1, most]], (most, 1), (most - 1, 0))
    assert score(pred, truth).all.pq == 1
    assert joint_areas(truth.layers[0], pred.layers[0]) == {(most - 1, most): 1, (most, most - 1): 1}


def test_joint_areas_are_those_of_all_pixels() -> None:
    rng = np.random.default_rng(0)
    ids = np.array([-1, 0, 1, 7, 2**31 - 1], np.int32)
    for size in ((1, 1), (5, 1), (30, 40)):
        truth, pred = rng.choice(ids, (2, *size))
        expected = Counter(zip(truth.ravel().tolist(), pred.ravel().tolist(), strict=True))
        assert joint_areas(truth, pred) == expected


def test_what_is_refused() -> None:
    good = segments([[1, 2]], (1, 0), (2, 1))
    counted = PanopticScore(2)
    for pred, truth, text in (
        (segments([[1], [2]], (1, 0), (2, 1)), good, "prediction is 1x2 px but truth is 2x1 px; write the prediction"),
        (
            segments([[1, 9]], (1, 0)),
            good,
            "prediction: wanted a segment for every id in the map, got none for 9",
        ),
        (good, segments([[1, -4]], (1, 0)), "truth: wanted a segment for every id in the map, got none for -4"),
        (segments([[1, 1]], (1, 0), (2, 1)), good, "prediction: wanted pixels of every segment, got none of 2; leave"),
        (segments([[1, 1]], (1, 2)), good, r"prediction: wanted class ids in 0\.\.1, got 2; check num_classes"),
        (
            Segments(np.zeros((2, 1, 2), np.int32), ()),
            good,
            "prediction: wanted one layer, got 2; panoptic",
        ),
    ):
        with pytest.raises(InputError, match=text):
            counted.update(pred, truth)
    with pytest.raises(InputError, match="num_classes: must be at least 1, got 0"):
        PanopticScore(0)
    with pytest.raises(InputError, match=r"things: wanted class ids in 0\.\.1, got 2"):
        PanopticScore(2, (2,))
    unseen = match_segments(segments([[1, 1]], (1, 0)), segments([[1, 1]], (1, 0), (2, 1)), 2)
    assert (unseen.unseen_ids, unseen.fn.tolist()) == ((2,), [0, 1])
