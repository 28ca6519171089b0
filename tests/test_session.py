"""The two engines against each other and against torch-free arithmetic."""

from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import onnx
import pytest

from artifacts import tiny_artifact
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
    class_ids = tiny_session.run(image)
    assert class_ids.dtype == np.uint8
    assert np.array_equal(class_ids, image[:, :, 0] >= 128)


def test_views_and_bgr_images(tiny_session: Session) -> None:
    image = noise(20, 30)
    for view in (image[3:, 5:17], image[:, :, ::-1], image[::-1], image.transpose(1, 0, 2)):
        assert np.array_equal(tiny_session.run(view), view[:, :, 0] >= 128)


def test_a_result_outlives_the_next_run(tiny_session: Session) -> None:
    image = noise(24, 24)
    first = tiny_session.run(image)
    tiny_session.run(255 - image)
    assert np.array_equal(first, image[:, :, 0] >= 128)


@pytest.mark.parametrize("hw", SIZES)
def test_engines_agree(tmp_path: Path, hw: tuple[int, int]) -> None:
    path = block_artifact(tmp_path / "blocks.onnx")
    image = noise(*hw)
    by_openvino = OpenVinoSession(path, threads=1, precision="f32").run(image)
    by_onnxruntime = OnnxRuntimeSession(path, threads=1).run(image)
    assert by_openvino.shape == hw
    assert np.array_equal(by_openvino, by_onnxruntime)


def test_path_with_spaces_and_umlauts(tmp_path: Path) -> None:
    folder = tmp_path / "mein Ordner é 猫"
    folder.mkdir()
    path = tiny_artifact(folder / "größe.onnx")
    for engine in ENGINES:
        assert open_session(path, engine).run(noise(2, 3)).shape == (2, 3)


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
