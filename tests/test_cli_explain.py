"""denselab explain: what it writes, prints and refuses."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner, Result

from denselab.checkpoint import KEY, ModelCard, save_atomically
from denselab.cli.explain import explain
from denselab.errors import InputError
from tiny_models import CLASSES, adapt, photo

pytestmark = pytest.mark.usefixtures("one_thread")

app = typer.Typer()
app.command()(explain)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    card = ModelCard(("semantic",), "small", {}, CLASSES, (97, 129), None, "CC-BY-4.0")
    torch.manual_seed(0)
    state = {f"averaged.model.{name}": tensor for name, tensor in adapt(card.build()).state_dict().items()}
    path = tmp_path_factory.mktemp("run") / "best.ckpt"
    save_atomically({KEY: card.to_dict(), "state_dict": state}, path)
    return path


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(photo(53, 71)).save(path)
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def refusal(*arguments: object) -> str:
    result = run(*arguments)
    assert isinstance(result.exception, InputError), result.output
    return str(result.exception)


def test_picture_and_numbers(checkpoint: Path, picture: Path, tmp_path: Path) -> None:
    out, npy = tmp_path / "new" / "heat.png", tmp_path / "heat.npy"
    asked = (picture, "--model", checkpoint, "-o", out, "--npy", npy, "--at", "30,20")
    result = run(*asked)
    assert result.exit_code == 0, result.output
    assert "tracing the model at 71x53 px" in result.stderr
    assert " at 30,20; results in " in result.stdout
    relevance = np.load(npy)
    assert (relevance.shape, relevance.dtype) == ((53, 71), np.float32)
    assert np.isfinite(relevance).all()
    assert relevance.any()
    with Image.open(out) as heat:
        assert heat.width >= 71
        assert heat.height > 53
    assert sorted(path.name for path in tmp_path.iterdir()) == ["heat.npy", "new", "photo.png"]
    assert f"--out: {out} exists already; choose another name or give --overwrite" in refusal(*asked)
    before = relevance
    result = run(picture, "--model", checkpoint, "-o", out, "--npy", npy, "--method", "gradient", "--overwrite")
    assert result.exit_code == 0, result.output
    assert "tracing" not in result.stderr
    assert " % of the photo; results in " in result.stdout
    assert not np.array_equal(np.load(npy), before)


def test_a_class_found_nowhere_is_said(checkpoint: Path, tmp_path: Path) -> None:
    from denselab.export.torch_session import load_predictor

    grey = np.full((40, 48, 3), 128, np.uint8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    shares = load_predictor(checkpoint)(grey).shares()
    missing = [name for name, share in zip(CLASSES.names, shares, strict=True) if share == 0]
    assert missing
    asked = ("--model", checkpoint, "-o", tmp_path / "heat.png", "--method", "gradient", "--class", missing[0])
    result = run(tmp_path / "grey.png", *asked)
    assert result.exit_code == 0, result.output
    assert f"note: the model finds no {missing[0]} in the photo" in result.stderr
    assert f"{missing[0]}, found nowhere" in result.stdout


def test_misuse(checkpoint: Path, picture: Path, tmp_path: Path) -> None:
    out = ("-o", tmp_path / "heat.png")
    model = ("--model", checkpoint)
    assert "--class, --at: wanted one of them, got both" in refusal(picture, *out, "--class", "left", "--at", "1,2")
    assert "--at: wanted X,Y in px such as 320,200, got '1'" in refusal(picture, *out, "--at", "1")
    assert "--at: wanted X,Y in px such as 320,200, got 'a,b'" in refusal(picture, *out, "--at", "a,b")
    assert "--out: wanted a file name that ends in .png" in refusal(picture, "-o", tmp_path / "heat.jpg")
    assert "--npy: wanted a file name that ends in .npy" in refusal(picture, *out, "--npy", tmp_path / "heat.png")
    assert "did you mean 'left'?" in refusal(picture, *model, *out, "--class", "lef")
    assert "wanted X,Y within the photo, 0..70,0..52, got 71,0" in refusal(picture, *model, *out, "--at", "71,0")
    assert "got the artifact my.onnx, which only runs forward" in refusal(picture, *out, "--model", "my.onnx")
    assert "no.ckpt: wanted a checkpoint, got no such file" in refusal(picture, *out, "--model", "no.ckpt")
    (tmp_path / "text.png").write_text("text")
    assert "text.png: wanted an image" in refusal(tmp_path / "text.png", *model, *out)
    assert "gone.png: wanted an image, got no such file" in refusal(tmp_path / "gone.png", *model, *out)
    (tmp_path / "folder.png").mkdir()
    assert "got the folder" in refusal(picture, "-o", tmp_path / "folder.png")
    (tmp_path / "file").touch()
    unwritable = ("-o", tmp_path / "file" / "heat.png", "--method", "gradient")
    assert "cannot be written" in refusal(picture, *model, *unwritable)
    assert not (tmp_path / "heat.png").exists()


def test_without_torch(picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["denselab.cli.explain"], "find_spec", lambda _: None)
    text = refusal(picture, "-o", tmp_path / "heat.png")
    assert text == 'explain needs PyTorch; install it with: pip install "denselab[train]"'


def test_help_names_the_patent() -> None:
    assert "patented for commercial use" in " ".join(run("--help").output.replace("│", " ").split())
