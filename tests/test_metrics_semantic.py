"""Semantic scores against scikit-learn, SciPy's erosion, hand-worked values and degenerate images."""

import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import binary_erosion
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, jaccard_score

from denselab.errors import InputError
from denselab.metrics import SemanticFigures, SemanticScore, confusion
from denselab.metrics.boundary import boundary_width_px, inner_boundary
from denselab.metrics.draw import confusion_picture


def regions(seed: int, height: int, width: int, classes: int, dtype: type = np.uint8) -> np.ndarray:
    """Random rectangles of random classes."""
    rng = np.random.default_rng(seed)
    ids = np.full((height, width), rng.integers(classes), dtype)
    for _ in range(12):
        y, x = rng.integers(height), rng.integers(width)
        ids[y : y + rng.integers(1, height + 1), x : x + rng.integers(1, width + 1)] = rng.integers(classes)
    return ids


def eroded_away(mask: np.ndarray, width_px: int) -> np.ndarray:
    """The authors' mask_to_boundary with SciPy's erosion: background outside the image."""
    return mask & ~binary_erosion(mask, np.ones((3, 3)), iterations=width_px, border_value=0)


def score(pred: object, truth: object, num_classes: int, **options: object) -> SemanticFigures:
    counted = SemanticScore(num_classes, **options)  # pyright: ignore[reportArgumentType]
    counted.update(np.array(pred, np.uint8), np.array(truth, np.uint8))
    return counted.compute()


def test_agrees_with_scikit_learn() -> None:
    counted = SemanticScore(5)
    preds, truths = [], []
    for seed in range(6):
        pred, truth = regions(seed, 40, 50, 5), regions(seed + 100, 40, 50, 5)
        truth[seed : seed + 5, 3:20] = 255
        counted.update(pred, truth)
        preds.append(pred[truth != 255])
        truths.append(truth[truth != 255])
    y_pred, y_true = np.concatenate(preds), np.concatenate(truths)
    figures = counted.compute()
    assert (figures.confusion[:, :5] == confusion_matrix(y_true, y_pred, labels=range(5))).all()
    assert (figures.confusion[:, 5] == 0).all()
    assert figures.iou == pytest.approx(jaccard_score(y_true, y_pred, labels=range(5), average=None))
    assert figures.miou == pytest.approx(jaccard_score(y_true, y_pred, labels=range(5), average="macro"))
    assert figures.fw_iou == pytest.approx(jaccard_score(y_true, y_pred, labels=range(5), average="weighted"))
    assert figures.pixel_accuracy == pytest.approx(accuracy_score(y_true, y_pred))
    assert figures.mean_accuracy == pytest.approx(balanced_accuracy_score(y_true, y_pred))


@pytest.mark.parametrize("width_px", [1, 2, 3, 5, 12])
@pytest.mark.parametrize("size", [(40, 61), (7, 30), (25, 25), (24, 80), (1, 1), (1, 9)])
def test_inner_boundary_is_what_erosion_removes(size: tuple[int, int], width_px: int) -> None:
    for seed in range(4):
        ids = regions(seed, *size, classes=4)
        boundary = inner_boundary(ids, width_px)
        for each in range(4):
            assert (boundary & (ids == each) == eroded_away(ids == each, width_px)).all()


def test_boundary_iou_agrees_with_erosion_per_class() -> None:
    counted = SemanticScore(4, ignore=(255, 9))
    overlap, union = np.zeros(4), np.zeros(4)
    for seed, size in enumerate([(120, 160), (90, 61), (200, 40)]):
        pred, truth = regions(seed, *size, classes=5), regions(seed + 50, *size, classes=4)
        truth[10:30, 5:25], truth[40:44, 30:], pred[50:60, :20] = 255, 9, 255
        counted.update(pred, truth)
        labelled = truth < 4
        width_px = max(1, round(0.02 * np.sqrt(size[0] ** 2 + size[1] ** 2)))
        for each in range(4):
            g = eroded_away(truth == each, width_px)
            p = eroded_away((pred == each) & labelled, width_px)
            overlap[each] += (g & p).sum()
            union[each] += (g | p).sum()
    figures = counted.compute()
    assert figures.boundary_iou_per_class == pytest.approx(overlap / union)
    assert figures.boundary_iou == pytest.approx(np.mean(overlap / union))


def test_boundary_width_is_two_percent_of_the_diagonal() -> None:
    assert boundary_width_px(360, 480) == 12
    assert boundary_width_px(1, 1) == 1
    assert boundary_width_px(75, 100) == 2  # 2.5 rounds to even, as in the authors' Python


def test_values_worked_by_hand() -> None:
    figures = score(pred=[[0, 0, 1], [1, 1, 1]], truth=[[0, 0, 0], [1, 1, 255]], num_classes=2)
    # labelled: class 0 has 3 px, 2 hit; class 1 has 2 px, 2 hit, 1 false; the void pixel is no error
    assert figures.iou == pytest.approx([2 / 3, 2 / 3])
    assert figures.miou == pytest.approx(2 / 3)
    assert figures.pixel_accuracy == pytest.approx(4 / 5)
    assert figures.mean_accuracy == pytest.approx((2 / 3 + 1) / 2)
    assert figures.fw_iou == pytest.approx(2 / 3)
    assert figures.share == pytest.approx([0.6, 0.4])
    assert figures.boundary_iou == pytest.approx(2 / 3)  # every region is thinner than its boundary


def test_boundary_iou_worked_by_hand() -> None:
    # 10x10, d = 1: the frame of 36 px, and truth splits at column 5, prediction at column 6
    truth, pred = np.zeros((2, 10, 10), np.uint8)
    truth[:, 5:], pred[:, 6:] = 1, 1
    figures = score(pred, truth, 2)
    assert figures.iou == pytest.approx([50 / 60, 40 / 50])
    # class 0: truth 5x10 minus 3x8 = 26, prediction 6x10 minus 4x8 = 28; shared: column 0, rows 0 and 9 of 1..4
    assert figures.boundary_iou_per_class == pytest.approx([18 / (26 + 28 - 18), 16 / (26 + 24 - 16)])


def test_counts_the_dataset_not_the_mean_of_images() -> None:
    """STYLE's example for metric names: per-image means differ from dataset-level counts."""
    counted = SemanticScore(2)
    counted.update(np.array([[0, 0, 0, 0]]), np.array([[0, 0, 0, 1]]))
    counted.update(np.array([[1, 1, 1, 1]]), np.array([[1, 1, 1, 1]]))
    assert counted.compute().iou == pytest.approx([3 / 4, 4 / 5])


def test_absent_class_is_nan_and_not_averaged() -> None:
    figures = score(pred=[[0, 1]], truth=[[0, 0]], num_classes=3)
    assert figures.iou[:2] == pytest.approx([0.5, 0])  # class 1: predicted only, so a miss
    assert math.isnan(figures.iou[2])
    assert figures.miou == pytest.approx(0.25)
    assert figures.mean_accuracy == pytest.approx(0.5)


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (4, 4)])
def test_nothing_labelled(shape: tuple[int, int]) -> None:
    figures = score(np.zeros(shape), np.full(shape, 255), 3)
    assert np.isnan(figures.iou).all()
    assert all(math.isnan(v) for v in (figures.miou, figures.pixel_accuracy, figures.fw_iou, figures.mean_accuracy))
    assert figures.boundary_iou is not None
    assert math.isnan(figures.boundary_iou)
    assert json.dumps(figures.to_dict(), allow_nan=False)


def test_prediction_outside_the_classes_is_wrong() -> None:
    figures = score(pred=[[0, 255], [7, 1]], truth=[[0, 0], [1, 1]], num_classes=2)
    assert figures.confusion.tolist() == [[1, 0, 1], [0, 1, 1]]
    assert figures.iou == pytest.approx([0.5, 0.5])
    assert figures.pixel_accuracy == pytest.approx(0.5)


def test_prediction_outside_the_classes_where_truth_is_ignored_is_no_error() -> None:
    assert score(pred=[[0, 200]], truth=[[0, 255]], num_classes=1).miou == 1


@pytest.mark.parametrize("num_classes", [20, 200, 255, 300])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.int64])
def test_no_overflow_with_many_classes(num_classes: int, dtype: type) -> None:
    top = min(num_classes, 255, np.iinfo(dtype).max)
    truth = regions(1, 60, 70, top, dtype)
    pred = regions(2, 60, 70, top, dtype)
    counts = confusion(pred, truth, num_classes, ignore=())
    assert counts.shape == (num_classes, num_classes + 1)
    expected = confusion_matrix(truth.ravel(), pred.ravel(), labels=range(num_classes))
    assert (counts[:, :-1] == expected).all()


def test_negative_ids() -> None:
    truth = np.array([[-1, 0, 1]])
    assert confusion(np.array([[0, -1, 1]]), truth, 2, ignore=-1).tolist() == [[0, 0, 1], [0, 1, 0]]
    with pytest.raises(InputError, match=r"truth has class ids -1; wanted 0\.\.1 or ignored \(255\)"):
        confusion(truth, truth, 2)


def test_merge_equals_one_pass_and_survives_pickle() -> None:
    parts = [SemanticScore(4), SemanticScore(4)]
    whole = SemanticScore(4)
    for seed in range(4):
        pair = regions(seed, 30, 40, 4), regions(seed + 9, 30, 40, 4)
        parts[seed % 2].update(*pair)
        whole.update(*pair)
    merged = pickle.loads(pickle.dumps(parts[0]))
    merged.merge(pickle.loads(pickle.dumps(parts[1])))
    assert merged.compute().to_dict() == whole.compute().to_dict()


@pytest.mark.parametrize("boundary", [True, False])
def test_confusion_is_the_same_with_and_without_boundary(boundary: bool) -> None:
    counted = SemanticScore(4, boundary=boundary)
    pred, truth = regions(3, 50, 60, 5), regions(4, 50, 60, 4)
    counted.update(pred, truth)
    figures = counted.compute()
    assert (figures.confusion == confusion(pred, truth, 4)).all()
    assert (figures.boundary_iou is not None) == boundary
    assert ("boundary" in figures.to_text()) == boundary


def test_void_in_the_shape_of_camvid() -> None:
    figures = score(pred=[[3, 3, 255]], truth=[[3, 11, 3]], num_classes=11, ignore=(11, 255))
    assert figures.iou[3] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("pred", "truth", "text"),
    [
        (np.zeros((4, 6), int), np.zeros((5, 6), int), "prediction is 6x4 px but truth is 6x5 px; write the predic"),
        (
            np.zeros((4, 6)),
            np.zeros((4, 6), int),
            r"prediction: must be integer class ids \[H, W\], got float64 \[4, 6",
        ),
        (
            np.zeros((4, 6), int),
            np.zeros((4, 6, 3), int),
            r"truth: must be integer class ids \[H, W\], got int64 \[4, 6",
        ),
        (np.zeros((1, 3), int), np.array([[0, 5, 9]]), r"class ids 5, 9; wanted 0\.\.1 or ignored \(255\): ignore"),
    ],
)
def test_errors_say_what_is_wrong(pred: np.ndarray, truth: np.ndarray, text: str) -> None:
    with pytest.raises(InputError, match=text):
        confusion(pred, truth, 2)


def test_merge_of_other_settings_and_wrong_names_are_refused() -> None:
    with pytest.raises(InputError, match=r"merge: scores must agree .* got \(2, \(255,\), True\) and \(3, "):
        SemanticScore(2).merge(SemanticScore(3))
    with pytest.raises(InputError, match="num_classes: must be at least 1, got 0"):
        SemanticScore(0)
    with pytest.raises(InputError, match="class_names: wanted 2, got 1"):
        SemanticScore(2).compute().to_text(["road"])


def test_table_is_aligned() -> None:
    text = score([[0, 1, 1]], [[0, 0, 1]], 3).to_text(["road", "pedestrian", "x"])
    lines = text.splitlines()
    assert lines[0] == "class          IoU  boundary IoU   share"
    assert lines[1] == "road         50.00         50.00   66.67"
    assert lines[3] == "x                -             -    0.00"
    assert lines[4] == "mean         50.00         50.00"


def test_camvid_against_itself(camvid: Path) -> None:
    with Image.open(camvid / "labels" / "test" / "0001TP_008550.png") as image:
        truth = np.asarray(image)
    figures = score(truth, truth, 11, ignore=11)
    present = figures.share > 0
    assert (figures.iou[present] == 1).all()
    assert figures.boundary_iou == 1
    assert figures.confusion.sum() == (truth != 11).sum()


@pytest.mark.parametrize("num_classes", [1, 11, 150])
def test_picture_of_the_confusion(num_classes: int) -> None:
    pred, truth = regions(5, 90, 90, num_classes + 1), regions(6, 90, 90, num_classes)
    picture = confusion_picture(confusion(pred, truth, num_classes), [f"class {i}" for i in range(num_classes)])
    assert picture.mode == "RGB"
    assert max(picture.size) < 4000
    assert len(picture.getcolors(1 << 24) or []) > 3


def test_picture_shades_by_share_of_the_truth() -> None:
    picture = confusion_picture(np.array([[9, 1], [0, 0]]), ["road", "car"])
    colours = {colour for _, colour in picture.getcolors(1 << 24) or []}
    assert (255, 255, 255) in colours
    with pytest.raises(InputError, match=r"confusion: wanted \[2, 2\] or \[2, 3\] for 2 names, got \[3, 3\]"):
        confusion_picture(np.zeros((3, 3), int), ["road", "car"])
    with pytest.raises(InputError, match="confusion: wanted at most 500 classes to draw, got 501; use the numbers"):
        confusion_picture(np.zeros((501, 501), int), ["x"] * 501)
