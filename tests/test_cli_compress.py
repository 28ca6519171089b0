"""denselab compress: what it writes, keeps, prints and refuses, on a classifier of timm's."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest
import typer
from torch import Tensor, nn
from typer.testing import CliRunner, Result

from denselab.cli.compress import compress
from denselab.cli.ticker import Ticker
from denselab.compress import file_stages, pipeline
from denselab.compress.classifier_file import CLASSIFIER_KEY
from denselab.compress.graph import Axis, Graph, capture
from denselab.errors import InputError
from denselab.runtime.session import open_session
from tiny_classifier import NAMES, SIDE_PX, photo, save, trained, write_photos

pytestmark = pytest.mark.usefixtures("one_thread", "one_registry")

app = typer.Typer()
app.command()(compress)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def refusal(*arguments: object) -> str:
    result = run(*arguments)
    assert isinstance(result.exception, InputError), result.output
    return str(result.exception)


@pytest.fixture(scope="module", autouse=True)
def traced_once() -> Iterator[None]:
    """Tracing is most of a run that keeps its stages; of the same weights it gives the same."""
    known: dict[bytes, Graph] = {}

    def capture_once(network: nn.Module, *example: Tensor, free: frozenset[Axis]) -> Graph:
        weights = b"".join(each.numpy().tobytes() for each in network.state_dict().values())
        if weights not in known:
            known[weights] = capture(network, *example, free=free)
        return known[weights]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "capture", capture_once)
        yield


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[object], Result]:
    """A folder with model, photos, the small file and everything on the way to it; what was asked; what came."""
    folder = tmp_path_factory.mktemp("compress")
    save(trained(), folder / "colours")
    write_photos(folder / "photos")
    write_photos(folder / "data" / "test", 3, seed=50)
    asked: list[object] = [
        *(f"timm:{folder / 'colours'}", "--calibrate", folder / "photos", "--images", 12, "--budget", "6bits"),
        *(
            "--method",
            "minmax",
            "-o",
            folder / "small.onnx",
            "--data",
            folder / "data",
            "--json",
            folder / "small.json",
        ),
        *("--report", folder / "small.html"),
    ]
    result = run(*asked)
    assert result.exit_code == 0, result.output
    return folder, asked, result


def test_the_file_runs_on_photos_and_says_what_it_is(done: tuple[Path, list[object], Result]) -> None:
    folder, _, _ = done
    session = open_session(folder / "small.onnx", "onnxruntime")
    for class_id in range(len(NAMES)):
        assert session.run(photo(class_id, 99))["logits"].argmax() == class_id
    props = {each.key: each.value for each in onnx.load(folder / "small.onnx").metadata_props}
    about = json.loads(props[CLASSIFIER_KEY])
    assert about["classes"] == list(NAMES)
    assert about["data"]["input_size"] == [3, SIDE_PX, SIDE_PX]
    assert about["compression"]["method"] == "minmax"
    assert 2 <= about["compression"]["mean_weight_bits"] <= 6


def test_what_is_printed_and_written(done: tuple[Path, list[object], Result]) -> None:
    folder, _, result = done
    receipt = json.loads((folder / "small.json").read_text())
    assert receipt["left_float"] == []
    (score,) = receipt["scores"]
    assert (score["name"], score["split"], score["images"], score["before"]) == ("top-1", "test", 12, 1.0)
    assert receipt["file_bytes"] == (folder / "small.onnx").stat().st_size
    assert "blocks.0.attn.qkv" in result.stdout
    assert "query" in result.stdout
    assert "top-1" in result.stdout
    assert f"{receipt['file_bytes']} bytes" in result.stdout
    assert "losses at 2 bits" in result.stderr
    assert (folder / "small.html").read_text().count("<svg") == 4
    bits = [spec["bits"] for spec in json.loads((folder / "small.work" / "plan.json").read_text())["sites"].values()]
    assert 2 <= min(bits) < 8


def test_a_second_run_keeps_every_stage_and_a_hand_edited_plan_is_used(
    done: tuple[Path, list[object], Result],
) -> None:
    folder, asked, _ = done
    assert "exists already; choose another name or give --overwrite" in refusal(*asked)
    again = run(*asked, "--overwrite")
    assert again.exit_code == 0, again.output
    assert again.stderr.count(": kept\n") == 9
    below = [each if each != "6bits" else "1bits" for each in asked]
    assert "1bits" in refusal(*below, "--overwrite")
    plan = folder / "small.work" / "plan.json"
    text = plan.read_text()
    key = "blocks.0.mlp.fc1/linear/weight"
    try:
        plan.write_text(text.replace(f'"{key}": {{"bits": ', f'"{key}": {{"bits": 1'))
        assert f"{plan}: {key}: bits: wanted a whole number from 2 to 8" in refusal(*asked, "--overwrite")
        plan.write_text(text.replace(key, "blocks.9.mlp.fc1/linear/weight"))
        assert "wanted keys of the model's sites, got 'blocks.9.mlp.fc1/linear/weight'" in refusal(
            *asked, "--overwrite"
        )
        at = ["--budget", "5bits"]
        assert "was edited by hand, and would be lost as budget changed" in refusal(*asked, "--overwrite", *at)
    finally:
        plan.write_text(text)


def test_plans_and_folders_of_others(done: tuple[Path, list[object], Result], tmp_path: Path) -> None:
    folder, asked, _ = done
    plan = json.loads((folder / "small.work" / "plan.json").read_text())
    given = [each for each in asked if each not in ("--budget", "6bits")]
    given[given.index("-o") + 1] = tmp_path / "small.onnx"
    given = [*given, "--overwrite", "--plan", tmp_path / "plan.json"]

    def refused(**changed: object) -> str:
        (tmp_path / "plan.json").write_text(json.dumps({**plan, **changed}))
        return refusal(*given)

    other = {"architecture": "0" * 64, "values": "0" * 64}
    assert "plan.json: wanted a file made for this model" in refused(model=other)
    assert "--method: wanted repq-vit, which" in refused(method="repq-vit")
    given = [each for each in given if each not in ("--method", "minmax")]
    assert "method: wanted one of auto, " in refused(method="my own")
    elsewhere = Path(shutil.copytree(folder / "colours", tmp_path / "other"))
    weights = elsewhere / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    theirs = [f"timm:{elsewhere}", *asked[1:], "--overwrite"]
    assert "small.work: wanted a work folder of this model, got one of other weights" in refusal(*theirs)


def test_what_is_refused_at_once(done: tuple[Path, list[object], Result], tmp_path: Path) -> None:
    folder = done[0]
    model, out = f"timm:{folder / 'colours'}", ("-o", tmp_path / "small.onnx")
    (tmp_path / "empty").mkdir()
    empty = (model, "--calibrate", tmp_path / "empty", "--budget", "8bits", *out)
    assert f"{tmp_path / 'empty'}: wanted at least one image there" in refusal(*empty)
    photos = (model, "--calibrate", folder / "photos", *out)
    assert "wanted one such as 4.0bits, 2.5MB, 0.25x or 8ms, or --plan FILE; got neither" in refusal(*photos)
    assert "got '4 parsecs'" in refusal(*photos, "--budget", "4 parsecs")
    unknown = run(*photos, "--budget", "8bits", "--method", "best")
    assert unknown.exit_code == 2
    assert "'best' is not one of" in unknown.stderr
    assert "wanted neither --budget nor --plan" in refusal(*photos, "--budget", "8bits", "--method", "i-vit")
    assert "--keep: wanted nothing by itself" in refusal(
        *photos, "--budget", "8bits", "--keep", "nothing", "--keep", "head"
    )
    write_photos(tmp_path / "data", 1, ("a", "b", "c", "d"))
    assert "each of the model's 4 classes (blue, green, grey, red), got 4 (a, b, c, d)" in refusal(
        *photos, "--budget", "8bits", "--data", tmp_path / "data"
    )
    flat = Path(shutil.copytree(folder / "photos" / NAMES[0], tmp_path / "flat"))
    few = (model, "--calibrate", flat, "--budget", "8bits", *out)
    assert "--calibrate: wanted at least 8 photos, got 4; add some" in refusal(*few)
    assert "got photos in no folder of a class; give the data" in refusal(*photos, "--budget", "8bits", "--data", flat)
    assert f"--plan: wanted a file, got {flat}, a folder; check" in refusal(*photos, "--plan", flat)
    assert "timm:: wanted timm:NAME, or timm:FOLDER" in refusal("timm:", *photos[1:], "--budget", "8bits")
    dense = ("street", *photos[1:], "--method", "i-vit")
    assert "--method i-vit: wanted a classifier, got a dense model" in refusal(*dense)
    (tmp_path / "empty.pth").write_bytes(b"")
    cut = (*photos, "--budget", "8bits", "--weights", tmp_path / "empty.pth")
    assert "torch cannot load it: it is empty or cut off" in refusal(*cut)
    weights = ("street", *photos[1:], "--budget", "8bits", "--weights", "w.pth")
    assert "--weights: wanted with timm:NAME alone" in refusal(*weights)
    by_path = [
        ("small.onnx", "wanted a network in PyTorch, got the artifact small.onnx, which only runs; give what it")
    ]
    by_path.append(("vit_tiny", "hf:NAME, kmax:FILE, timm:NAME or timm:FOLDER, got vit_tiny; correct it"))
    for source, text in by_path:
        assert text in refusal(source, *photos[1:], "--budget", "8bits")
    gone = (model, "--calibrate", tmp_path / "gone", "--budget", "8bits", *out)
    assert "gone: wanted a folder of photos, FILE.zip or FILE.zip/FOLDER, got a path that does not" in refusal(*gone)
    assert "wanted a file name that ends in .onnx" in refusal(*photos[:-1], tmp_path / "small.pt", "--budget", "8bits")


def test_help_needs_no_torch() -> None:
    program = "import sys; sys.modules['torch'] = None; sys.argv = ['denselab', 'compress', '--help']; "
    program += "import denselab.compress, denselab.cli; denselab.cli.main()"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "--calibrate" in result.stdout


def test_the_ticker_says_counted_texts_once_in_a_while(capsys: pytest.CaptureFixture[str]) -> None:
    with Ticker() as say:
        say("tracing")
        for number in range(1, 51):
            say(f"block {number} of 50")
        say("written")
    assert capsys.readouterr().err.splitlines() == ["tracing", "block 1 of 50", "block 50 of 50", "written"]


def test_ctrl_c_says_where_it_goes_on(
    done: tuple[Path, list[object], Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, asked, _ = done
    work = tmp_path / "again.work"
    shutil.copytree(folder / "small.work", work)
    (work / "plan.json").unlink()

    def ctrl_c(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "chosen_plan", ctrl_c)
    again = [*asked[: asked.index("-o")], "-o", tmp_path / "again.onnx"]
    result = run(*again)
    assert result.exit_code == 130
    assert f"interrupted; finished stages are in {work}, the same command does the rest" in result.stderr
    monkeypatch.undo()
    (work / "model.onnx").unlink()
    monkeypatch.setattr(file_stages, "_MOST_CHANGE", 0)
    result = run(*again)
    assert result.exit_code == 0, result.output
    assert f"{work / 'sensitivity.json'}: kept" in result.stderr
    assert re.search(r"sums stay in float: rounded, answers would be \d\.\d times as far", result.stderr)
