"""The two engines against each other and against torch-free arithmetic."""

from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import onnx
import pytest

from artifacts import TASKS, task_artifact, tiny_artifact
from block_network import block_artifact, noise
from denselab.errors import InputError
from denselab.runtime import session as session_module
from denselab.runtime.session import ENGINES, OnnxRuntimeSession, OpenVinoSession, Session, open_session

SIZES = [(1, 1), (1, 7), (40, 64), (361, 479), (64, 40)]


@pytest.fixture(params=ENGINES)
def tiny_session(request: pytest.FixtureRequest, tmp_path: Path) -> Session:
    return open_session(tiny_artifact(tmp_path / "tiny.onnx"), request.param, threads=1)


@pytest.mark.parametrize("hw", SIZES)
def test_any_size(tiny_session: Session, hw: tuple[int, int]) -> None:
    image = noise(*hw)
    class_ids = tiny_session.run(image)["class_ids"]
    assert class_ids.dtype == np.uint8
    assert np.array_equal(class_ids, image[:, :, 0] >= 128)


def test_views_and_bgr_images(tiny_session: Session) -> None:
    image = noise(20, 30)
    for view in (image[3:, 5:17], image[:, :, ::-1], image[::-1], image.transpose(1, 0, 2)):
        assert np.array_equal(tiny_session.run(view)["class_ids"], view[:, :, 0] >= 128)


def test_a_result_outlives_the_next_run(tiny_session: Session) -> None:
    image = noise(24, 24)
    first = tiny_session.run(image)["class_ids"]
    tiny_session.run(255 - image)
    assert np.array_equal(first, image[:, :, 0] >= 128)


@pytest.mark.parametrize("hw", SIZES)
def test_engines_agree(tmp_path: Path, hw: tuple[int, int]) -> None:
    path = block_artifact(tmp_path / "blocks.onnx")
    image = noise(*hw)
    by_openvino = OpenVinoSession(path, threads=1, precision="f32").run(image)["class_ids"]
    by_onnxruntime = OnnxRuntimeSession(path, threads=1).run(image)["class_ids"]
    assert by_openvino.shape == hw
    assert np.array_equal(by_openvino, by_onnxruntime)


@pytest.mark.parametrize("engine", ENGINES)
def test_outputs_go_by_their_names(tmp_path: Path, engine: str) -> None:
    """In whatever order the file lists them, two of them one tensor, and without their batch axis."""
    path = task_artifact(tmp_path / "all.onnx", *TASKS)
    model = onnx.load(path)
    for output in reversed(list(model.graph.output)):
        model.graph.output.remove(output)
        model.graph.output.append(output)
    onnx.save(model, path)
    image = noise(5, 7)
    red = image[:, :, 0]
    is_red = red >= 128
    answers = open_session(path, engine, threads=1).run(image)
    assert len(answers) == 9
    assert np.array_equal(answers["class_ids"], is_red)
    assert np.array_equal(answers["panoptic_ids"], np.where(is_red, 1, 2))
    assert answers["segment_classes"].tolist() == [1, 0, 1]
    assert answers["segment_scores"].tolist() == [0.75, 0.5, 0.25]
    assert np.array_equal(answers["instance_masks"][:2], [image[:, :, 1] >= 128, is_red])
    assert answers["instance_classes"].tolist() == [0, 1, 1, 1, 1]
    assert answers["instance_scores"].tolist() == [0.5, 0.75, 0.875, 0.03125, 0]
    assert answers["depth_m"] == pytest.approx(red / 10, rel=0.01)
    assert np.array_equal(answers["normals"], [is_red, 0 * is_red, is_red - 1.0])
    kinds = {name: answer.dtype for name, answer in answers.items()}
    assert {name for name, kind in kinds.items() if kind == np.float32} == {
        "segment_scores",
        "instance_scores",
        "depth_m",
        "normals",
    }


def test_path_with_spaces_and_umlauts(tmp_path: Path) -> None:
    folder = tmp_path / "mein Ordner é 猫"
    folder.mkdir()
    path = tiny_artifact(folder / "größe.onnx")
    for engine in ENGINES:
        assert open_session(path, engine).run(noise(2, 3))["class_ids"].shape == (2, 3)


def test_auto_prefers_openvino_and_falls_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_artifact(tmp_path / "tiny.onnx")
    assert open_session(path).engine == "openvino"
    _install_only("onnxruntime", monkeypatch)
    assert open_session(path).engine == "onnxruntime"


def test_missing_engines_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _install_only("openvino", monkeypatch)
    with pytest.raises(InputError, match=r"engine onnxruntime: not installed; .*pip install onnxruntime"):
        open_session(tmp_path / "tiny.onnx", "onnxruntime")
    _install_only("", monkeypatch)
    with pytest.raises(InputError, match=r"engine openvino: not installed; .*pip install openvino"):
        open_session(tmp_path / "tiny.onnx")


def _install_only(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "find_spec", lambda name: ModuleSpec(name, None) if name == engine else None)


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="engine: wanted auto, openvino or onnxruntime, got 'tpu'"):
        open_session(tmp_path / "tiny.onnx", "tpu")
    with pytest.raises(InputError, match="threads: wanted 1 or more, got 0"):
        open_session(tmp_path / "tiny.onnx", threads=0)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_model_the_engine_refuses(tmp_path: Path, engine: str) -> None:
    path = tiny_artifact(tmp_path / "tiny.onnx")
    model = onnx.load(path)
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, path)
    with pytest.raises(InputError, match=rf"tiny.onnx: {engine} cannot open this model \(.+\); export it again"):
        open_session(path, engine)
