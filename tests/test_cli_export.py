"""denselab export from a checkpoint: what it writes, prints and refuses."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner, Result

import denselab
from denselab.checkpoint import KEY, ModelCard
from denselab.cli.export import export
from denselab.errors import InputError
from denselab.export.torch_session import load_predictor
from denselab.runtime.artifact import read_info
from tiny_models import CLASSES, adapt, photo

app = typer.Typer()
app.command()(export)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def refusal(*arguments: object) -> str:
    result = run(*arguments)
    assert isinstance(result.exception, InputError), result.output
    return str(result.exception)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    card = ModelCard(("semantic",), "small", {}, CLASSES, (97, 129), None, "CC-BY-4.0")
    torch.manual_seed(0)
    state = {f"averaged.model.{name}": tensor for name, tensor in adapt(card.build()).state_dict().items()}
    path = tmp_path_factory.mktemp("run") / "best.ckpt"
    torch.save({KEY: card.to_dict(), "state_dict": state}, path)
    return path


@pytest.fixture(scope="module")
def data(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six photos whose masks are what the checkpoint says."""
    root = tmp_path_factory.mktemp("data")
    predictor = load_predictor(checkpoint)
    for split, seeds in (("train", range(3)), ("val", range(3, 6))):
        for folder in ("images", "masks"):
            (root / folder / split).mkdir(parents=True)
        for seed in seeds:
            image = photo(97, 129, seed)
            Image.fromarray(image).save(root / "images" / split / f"{seed}.png")
            Image.fromarray(predictor(image).class_ids).save(root / "masks" / split / f"{seed}.png")
    names = "".join(f"  - {name}\n" for name in CLASSES.names)
    (root / "dataset.yaml").write_text(f"names:\n{names}")
    return root


def test_a_checkpoint_predicts_in_torch(checkpoint: Path) -> None:
    predictor = denselab.load(checkpoint)
    assert predictor.session.engine == "torch"
    assert predictor.info.classes == CLASSES
    result = predictor(photo(33, 50))
    assert np.asarray(result).shape == (33, 50)
    read_only = photo(33, 50)
    read_only.flags.writeable = False
    np.testing.assert_array_equal(predictor(read_only).class_ids, result.class_ids)


def test_an_artifact_with_its_receipt(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine.onnx"
    arguments = (checkpoint, "-o", out, "--precision", "int8", "--data", data, "--max-score-drop", 20)
    result = run(*arguments, "--licence", "MIT", "--name", "ours")
    assert result.exit_code == 0, result.output
    info = read_info(out)
    assert (info.name, info.licence, info.precision, info.train_hw) == ("ours", "MIT", "int8", (97, 129))
    assert info.receipt["score"]["torch"] == {"mIoU": 1}
    assert info.receipt["image_source"] == f"{data.name} val"
    assert info.receipt["images"] == 3
    assert f"file size     {out.stat().st_size} bytes" in result.stdout
    assert result.stdout.endswith(f"{out}\n")
    assert "calibrating on 3 images" in result.stderr
    image = photo(97, 129, 4)
    agree = denselab.load(out)(image).class_ids == denselab.load(checkpoint)(image).class_ids
    assert agree.mean() > 0.95
    assert "exists already" in refusal(checkpoint, "-o", out)


def test_without_data_the_run_says_where_it_is(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources: list[tuple[str, int, Any]] = []

    def record(
        model: object, tasks: object, info: Any, out: Path, parity: Any, calibration: Any, *_: object, **__: object
    ) -> Any:
        sources.append((parity.source, len(parity.images), info))
        raise InputError("stop here")

    monkeypatch.setattr("denselab.export.artifact.export_artifact", record)
    alone = tmp_path / "last.ckpt"
    alone.write_bytes(checkpoint.read_bytes())
    arguments = (alone, "-o", tmp_path / "a.onnx", "--images", 2, "--calibration-images", 1)
    assert refusal(*arguments) == "stop here"
    (tmp_path / "run.yaml").write_text(f"data: {data}\n")
    assert refusal(*arguments) == "stop here"
    (tmp_path / "run.yaml").write_text(f"data: {tmp_path / 'moved'}\n")
    assert refusal(*arguments) == "stop here"
    assert [source[:2] for source in sources] == [
        ("rendered scenes", 2),
        (f"{data.name} val", 2),
        ("rendered scenes", 2),
    ]
    assert (sources[0][2].name, sources[0][2].licence) == ("a", "CC-BY-4.0")


def test_limits_are_options(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    arguments = (checkpoint, "-o", tmp_path / "a.onnx", "--data", data, "--precision", "bf16", "--max-score-drop", 20)
    assert "wanted the answers of torch on 100 % of pixels" in refusal(*arguments, "--min-agreement", 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--network-size", "512"], "--network-size: wanted WIDTHxHEIGHT in px such as 512x512, got 512"),
        (["--data", "nowhere"], "nowhere"),
    ],
)
def test_misuse(checkpoint: Path, tmp_path: Path, options: list[str], text: str) -> None:
    assert text in refusal(checkpoint, "-o", tmp_path / "a.onnx", *options)
    assert not (tmp_path / "a.onnx").exists()


def test_data_of_other_classes_is_refused(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for folder in ("images", "masks"):
        (other / folder).symlink_to(data / folder)
    (other / "dataset.yaml").write_text("names: [a, b, c]\n")
    assert "wanted the classes of the model" in refusal(checkpoint, "-o", tmp_path / "a.onnx", "--data", other)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    assert "wanted a checkpoint" in refusal(tmp_path / "none.ckpt", "-o", tmp_path / "a.onnx")
