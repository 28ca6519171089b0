"""denselab evaluate: the same numbers for a checkpoint and its artifact, and no torch for the latter."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from typer.testing import CliRunner, Result

from artifacts import task_artifact, tiny_artifact
from denselab.checkpoint import KEY, ModelCard, save_atomically
from denselab.classes import Classes
from denselab.cli import app
from denselab.data.descriptor import open_dataset
from denselab.errors import InputError
from denselab.evaluate import evaluate
from denselab.runtime.artifact import ArtifactInfo
from denselab.runtime.predictor import Predictor
from tiny_data import NAMES, write_tiny

RED = Classes.named(("other", "red"))


class RedFinder:
    """Class 1 where red is at least 128."""

    engine = "by hand"

    def run(self, image: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        return {"class_ids": (image[..., 0] >= 128).astype(np.uint8)}


def red_finder(classes: Classes = RED) -> Predictor:
    info = ArtifactInfo(("semantic",), "red", classes, 255, 1, None, "fp32", "MIT", None, {}, "0.1.0")
    return Predictor(RedFinder(), info)


@pytest.fixture
def red_data(tmp_path: Path) -> Path:
    """Four labelled pixels: one red found, one red missed, one other right, one other taken for red; one void."""
    image = np.zeros((1, 5, 3), np.uint8)
    image[0, :, 0] = (255, 0, 0, 255, 255)
    for folder, array in (("images", image), ("masks", np.array([[1, 1, 0, 0, 255]], np.uint8))):
        (tmp_path / folder / "test").mkdir(parents=True)
        Image.fromarray(array).save(tmp_path / folder / "test" / "a.png")
    (tmp_path / "dataset.yaml").write_text("names: [other, red]\n")
    return tmp_path


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def test_figures_by_hand(red_data: Path) -> None:
    evaluation = evaluate(red_finder(), open_dataset(red_data), "test")
    assert evaluation.figures["semantic"].confusion.tolist() == [[1, 1, 0], [1, 1, 0]]
    assert evaluation.figures["semantic"].miou == pytest.approx(1 / 3)
    assert (evaluation.to_dict()["split"], evaluation.to_dict()["images"]) == ("test", 1)


def test_images_come_in_order_and_all(tmp_path: Path) -> None:
    dataset = open_dataset(write_tiny(tmp_path, {"train": 1, "val": 11}, sizes=((64, 96), (48, 80))))
    seen: list[tuple[str, int]] = []

    def track(items, total, label):
        seen.append((label, total))
        return items

    classes = Classes.named(NAMES)
    evaluation = evaluate(red_finder(classes), dataset, "val", track)
    assert evaluation.images == 11
    assert evaluation.figures["semantic"].confusion.sum() == 6 * 64 * 96 + 5 * 48 * 80 - 11 * 4
    assert seen == [("evaluating val", 11)]


def test_classes_must_be_the_same(red_data: Path) -> None:
    with pytest.raises(InputError, match=r"classes of the model \(red, other\), got those of the data \(other, red\)"):
        evaluate(red_finder(Classes.named(("red", "other"))), open_dataset(red_data), "test")


def test_broken_file_and_missing_split_are_named(red_data: Path) -> None:
    with pytest.raises(InputError, match="wanted split val, got only test"):
        evaluate(red_finder(), open_dataset(red_data), "val")
    dataset = open_dataset(red_data)
    (red_data / "images" / "test" / "a.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"a\.png"):
        evaluate(red_finder(), dataset, "test")


def test_command_on_an_artifact_without_torch(red_data: Path, tmp_path: Path) -> None:
    model, figures, picture = tiny_artifact(tmp_path / "m.onnx"), tmp_path / "deep" / "f.json", tmp_path / "c.png"
    code = "import sys; sys.modules['torch'] = None; from denselab.cli import main; main()"
    arguments = ["evaluate", "--model", model, "--data", red_data, "--json", figures, "--confusion", picture]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "test: 1 images" in done.stdout
    assert "33.33" in done.stdout
    written = json.loads(figures.read_text())
    assert (written["engine"], written["split"], written["images"]) == ("openvino", "test", 1)
    assert written["miou"] == pytest.approx(1 / 3)
    with Image.open(picture) as drawn:
        drawn.verify()


def test_command_refuses_before_it_works(red_data: Path, tmp_path: Path) -> None:
    model = tiny_artifact(tmp_path / "m.onnx", classes=Classes.named(("a", "b")).to_dict())
    for arguments, text in (
        (("--model", model), r"classes of the model (a, b), got those of the data (other, red)"),
        (("--model", model, "--split", "val"), "wanted split val, got only test"),
        (("--model", tmp_path / "none.ckpt"), "no such model file"),
        (("--model", "streets"), "wanted street, an artifact"),
    ):
        error = invoke("--data", red_data, *arguments).exception
        assert isinstance(error, InputError)
        assert text in str(error)


def test_relative_depth_is_not_scored_in_metres(tmp_path: Path) -> None:
    for folder, array in (("images", np.zeros((2, 3, 3), np.uint8)), ("depth", np.full((2, 3), 900, np.uint16))):
        (tmp_path / folder / "test").mkdir(parents=True)
        Image.fromarray(array).save(tmp_path / folder / "test" / "a.png")
    (tmp_path / "dataset.yaml").write_text("scale: 0.001\n")
    options = ("--data", tmp_path, "--engine", "onnxruntime")
    model = task_artifact(tmp_path / "m.onnx", "depth", classes=None)
    assert "AbsRel" in invoke("--model", model, *options).output
    relative = task_artifact(tmp_path / "r.onnx", "depth", classes=None, depth_unit="relative")
    error = invoke("--model", relative, *options).exception
    assert isinstance(error, InputError)
    assert "wanted a model of depth in metres, got one of relative depth; label the images with" in str(error)


def test_checkpoint_and_its_artifact_give_the_same_numbers(tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "data", {"train": 2, "val": 4}, sizes=((64, 96), (51, 77)))
    card = ModelCard(("semantic",), "small", {"backbone": "small"}, Classes.named(NAMES), (64, 96), None, "CC0-1.0")
    torch.manual_seed(0)
    state = {f"averaged.model.{name}": value for name, value in card.build().state_dict().items()}
    save_atomically({KEY: card.to_dict(), "state_dict": state}, tmp_path / "m.ckpt")
    exported = CliRunner().invoke(
        app, ["export", str(tmp_path / "m.ckpt"), "-o", str(tmp_path / "m.onnx"), "--data", str(data), "--images", "2"]
    )
    assert exported.exit_code == 0, exported.exception
    scores: list[float] = []
    for model, engine in (("m.ckpt", "auto"), ("m.onnx", "onnxruntime"), ("m.onnx", "openvino")):
        figures = tmp_path / "figures.json"
        done = invoke(
            "--model", tmp_path / model, "--engine", engine, "--data", data, "--split", "val", "--json", figures
        )
        assert done.exit_code == 0, done.exception
        scores.append(json.loads(figures.read_text())["miou"])
    assert scores == pytest.approx([scores[0]] * 3, abs=1e-3)
