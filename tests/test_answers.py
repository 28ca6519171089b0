"""Outputs of graphs become results, and predictors of every task."""

from pathlib import Path

import numpy as np
import pytest

import denselab
from artifacts import TASKS, task_artifact
from denselab.classes import Classes
from denselab.errors import InputError
from denselab.results import DepthMap, InstanceSet, JointResult, NormalMap, PanopticMap, SemanticMap
from denselab.rle import encode
from denselab.runtime import predictor as predictor_module
from denselab.runtime.answers import PER_PIXEL, outputs_of, to_result
from denselab.runtime.artifact import TASKS as TASK_NAMES
from denselab.runtime.artifact import ArtifactInfo
from denselab.runtime.predictor import Predictor

CLASSES = Classes.named(["a", "b"], things=[1])


def colours(hw: tuple[int, int]) -> np.ndarray:
    """Left third red, right third green, the rest black."""
    image = np.zeros((*hw, 3), np.uint8)
    image[:, : hw[1] // 3, 0] = 200
    image[:, 2 * hw[1] // 3 :, 1] = 250
    return image


@pytest.fixture
def joint(tmp_path: Path) -> Predictor:
    return denselab.load(task_artifact(tmp_path / "all.onnx", *TASKS), "onnxruntime", threads=1)


def test_every_task_at_once(joint: Predictor) -> None:
    image = colours((6, 9))
    result = joint(image)
    assert isinstance(result, JointResult)
    assert result.task == joint.info.task == "semantic+panoptic+instance+depth+normals"
    is_red = image[:, :, 0] > 0
    labels, segments, objects, depth, normals = result.values()
    assert isinstance(labels, SemanticMap)
    assert np.array_equal(labels.class_ids, is_red)
    assert isinstance(segments, PanopticMap)
    assert np.array_equal(segments.ids, np.where(is_red, 1, 2))
    assert [(s.id, s.class_id, s.score) for s in segments.segments] == [(1, 1, 0.75), (2, 0, 0.5)]
    assert isinstance(objects, InstanceSet)
    assert objects.scores.tolist() == [0.75, 0.5]
    assert objects.class_ids.tolist() == [1, 0]
    assert [mask.tolist() for mask in objects.decoded()] == [is_red.tolist(), (image[:, :, 1] > 0).tolist()]
    assert isinstance(depth, DepthMap)
    assert depth.metres == pytest.approx(20 * is_red.astype(float))
    assert np.array_equal(depth.valid, is_red)
    assert isinstance(normals, NormalMap)
    assert normals.xyz[0, [0, 8]].tolist() == [[1, 0, 0], [0, 0, -1]]
    assert all(part.model == "tiny" and part.timing_ms["total"] > 0 for part in result.values())


@pytest.mark.parametrize("task", TASKS)
def test_one_task_gives_its_result(tmp_path: Path, task: str) -> None:
    metadata = {} if task in ("semantic", "panoptic", "instance") else {"classes": None}
    predict = denselab.load(task_artifact(tmp_path / "one.onnx", task, **metadata), "onnxruntime")
    result = predict(colours((4, 6)))
    assert result.task == task
    assert result.hw == (4, 6)
    assert list(result.timing_ms) == ["engine", "total"]


def test_least_score(joint: Predictor) -> None:
    image = colours((3, 6))
    joint.min_score = 0.6
    result = joint(image)
    assert isinstance(result, JointResult)
    assert np.asarray(result["instance"]).max() == 1
    # What is measured is not cut: of the five slots one is empty and one unused.
    measured = joint.results_at_own_size(image)["instance"]
    assert isinstance(measured, InstanceSet)
    assert measured.scores.tolist() == [0.75, 0.5, 0.03125]


def test_results_have_the_size_of_the_image(joint: Predictor) -> None:
    joint.long_side = 6
    image = colours((20, 30))
    result = joint(image)
    assert isinstance(result, JointResult)
    assert joint.answers(image)["depth_m"].shape == (20, 30)
    is_red = image[:, :, 0] > 0
    assert {part.hw for part in result.values()} == {(20, 30)}
    assert np.array_equal(np.asarray(result["semantic"]), is_red)
    assert np.array_equal(np.asarray(result["panoptic"]), np.where(is_red, 1, 2))
    assert np.array_equal(np.asarray(result["instance"]) == 1, is_red)
    depth = result["depth"]
    assert isinstance(depth, DepthMap)
    assert depth.valid[is_red].all()
    assert depth.metres[:, :2] == pytest.approx(20)  # further right, shrinking has mixed red and black
    assert np.asarray(result["normals"]).shape == (20, 30, 3)


def test_what_needs_one_piece_is_shrunk(joint: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictor_module, "WHOLE_PX", 60)
    joint.long_side = "native"
    assert joint.asked_hw((20, 30)) == (20, 30)
    assert joint.seen_hw((20, 30)) == (6, 9)
    assert joint.seen_hw((6, 10)) == (6, 10)
    assert joint.seen_hw((1, 4000)) == (1, 60)
    assert joint.seen_hw((4000, 1)) == (60, 1)
    image = colours((20, 30))
    assert joint.answers(image)["depth_m"].shape == (6, 9)
    assert joint.results_at_own_size(image)["panoptic"].hw == (20, 30)


def test_only_semantic_labels_are_made_by_tiles(tmp_path: Path, joint: Predictor) -> None:
    with pytest.raises(InputError, match="tile_px: wanted None, for only semantic labels are made by tiles"):
        Predictor(joint.session, joint.info, tile_px=100)
    semantic = denselab.load(task_artifact(tmp_path / "a.onnx", "semantic"), long_side="native")
    assert semantic.seen_hw((9000, 12000)) == (9000, 12000)


def test_a_file_without_an_output_says_so(joint: Predictor) -> None:
    class Silent:
        engine = "none"

        def run(self, image: np.ndarray) -> dict[str, np.ndarray]:
            return {"class_ids": image[:, :, 0]}

    info = ArtifactInfo(**{**vars(joint.info), "tasks": ("semantic", "panoptic")})
    with pytest.raises(InputError, match=r"wanted outputs .*'panoptic_ids'.* for the task panoptic, got .*class_ids"):
        Predictor(Silent(), info)(np.zeros((2, 2, 3), np.uint8))


def test_names_of_outputs() -> None:
    assert set(TASKS) == set(TASK_NAMES)
    names = [name for task in TASK_NAMES for name in outputs_of(task)]
    assert len(set(names)) == len(names) == 9
    assert set(names) > PER_PIXEL


def test_panoptic_slots_without_pixels_are_no_segments() -> None:
    answers = {
        "panoptic_ids": np.array([[0, 3, 3, 5]], np.int32),
        "segment_classes": np.array([0, 0, 1, 0, 1], np.int32),
        "segment_scores": np.arange(5, dtype=np.float32) / 8,
    }
    result = to_result("panoptic", answers, CLASSES)
    assert isinstance(result, PanopticMap)
    assert [(s.id, s.class_id, s.score) for s in result.segments] == [(3, 1, 0.25), (5, 1, 0.5)]
    answers["panoptic_ids"] = np.array([[6]], np.int32)
    with pytest.raises(InputError, match=r"ids: wanted 0 \(void\) or the id of a segment, got \[6\]"):
        to_result("panoptic", answers, CLASSES)


def test_instances_are_enlarged_one_by_one() -> None:
    masks = np.random.default_rng(0).integers(0, 2, (3, 5, 7), dtype=np.uint8)
    answers = {
        "instance_masks": masks,
        "instance_classes": np.array([0, 1, 0], np.int32),
        "instance_scores": np.array([0.9, 0.5, 0.7], np.float32),
    }
    result = to_result("instance", answers, CLASSES, (10, 21), min_score=0.6)
    assert isinstance(result, InstanceSet)
    assert result.scores.tolist() == pytest.approx([0.9, 0.7])
    for mask, wanted in zip(result.masks, masks[[0, 2]], strict=True):
        large = wanted.repeat(2, 0).repeat(3, 1).astype(bool)
        assert mask.counts.tolist() == encode(large).counts.tolist()


def test_depth_that_is_not_above_0_is_unknown_and_nan_is_refused() -> None:
    result = to_result("depth", {"depth_m": np.array([[-1, 0, 2]], np.float32)}, None)
    assert np.asarray(result).tolist() == [[0, 0, 2]]
    with pytest.raises(InputError, match="metres: wanted finite depths"):
        to_result("depth", {"depth_m": np.array([[np.nan]], np.float32)}, None)


def test_normals_are_made_unit_again() -> None:
    """As an engine in 16 bits leaves them; zeros stay unknown, nan is refused."""
    rough = np.array([[[3.0]], [[0.0]], [[4.0]]], np.float32)
    result = to_result("normals", {"normals": rough}, None)
    assert np.asarray(result)[0, 0] == pytest.approx([0.6, 0, 0.8])
    assert not np.asarray(to_result("normals", {"normals": 0 * rough}, None)).any()
    with pytest.raises(InputError, match="xyz: wanted unit vectors"):
        to_result("normals", {"normals": rough * np.nan}, None)


def test_tasks_that_name_classes_need_them() -> None:
    with pytest.raises(InputError, match="classes: wanted those of the task semantic, got none"):
        to_result("semantic", {"class_ids": np.zeros((1, 1), np.uint8)}, None)
