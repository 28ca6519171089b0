"""denselab score on folders of label pictures: figures, naming, every refusal and exit code."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import typer
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from denselab.cli.score import score
from denselab.errors import InputError
from denselab.metrics import SemanticScore

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(score)

Write = Callable[..., Path]


def run(*arguments: object) -> Result:
    """Run the command; an InputError is raised, other endings are in `exit_code`."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write ids as a grey PNG to a path below the test's folder."""

    def save(name: str, ids: object, dtype: type = np.uint8) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.array(ids, dtype)).save(path)
        return path

    return save


@pytest.fixture
def folders(tmp_path: Path, write: Write) -> list[object]:
    """Two pairs, one in a subfolder; arguments that score them. IoU: class 0 3 of 4 px, class 1 2 of 3."""
    write("gt/a.png", [[0, 0, 1]])
    write("gt/sub/b é.png", [[1, 1, 0, 255]])
    write("pred/a.png", [[0, 0, 0]])
    write("pred/sub/b é.labels.png", [[1, 1, 0, 1]])
    return ["--pred", tmp_path / "pred", "--gt", tmp_path / "gt", "--num-classes", 2]


def test_table_json_and_picture(folders: list[object], tmp_path: Path) -> None:
    out, picture = tmp_path / "new" / "out.json", tmp_path / "confusion.png"
    result = run(*folders, "--names", "road, car", "--json", out, "--confusion", picture)
    assert result.exit_code == 0
    assert "road    75.00         75.00   50.00" in result.stdout
    assert "car     66.67         66.67   50.00" in result.stdout
    assert "pixel accuracy           83.33" in result.stdout
    assert "2 pairs" in result.stdout
    figures = json.loads(out.read_text("utf-8"))
    assert figures["miou"] == pytest.approx((3 / 4 + 2 / 3) / 2)
    assert figures["classes"][1]["name"] == "car"
    assert figures["classes"][1]["pixels"] == 3
    assert figures["confusion"] == [[3, 0, 0], [1, 2, 0]]
    assert (figures["pairs"], figures["failed"], figures["ignore"]) == (2, [], [255])
    with Image.open(picture) as image:
        image.load()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["confusion.png", "gt", "new", "pred"]


def test_no_boundary_and_processes(folders: list[object], tmp_path: Path) -> None:
    run(*folders, "--json", tmp_path / "one.json")
    result = run(*folders, "--json", tmp_path / "two.json", "--jobs", 2)
    assert result.exit_code == 0
    assert (tmp_path / "one.json").read_text() == (tmp_path / "two.json").read_text()
    result = run(*folders, "--no-boundary", "--json", tmp_path / "plain.json")
    assert "boundary" not in result.stdout
    assert json.loads((tmp_path / "plain.json").read_text())["boundary_iou"] is None


def test_palette_and_16_bit_and_what_else_predict_writes(folders: list[object], tmp_path: Path, write: Write) -> None:
    palette = Image.fromarray(np.array([[0, 0, 0]], np.uint8), "L").convert("P")
    palette.putdata([0, 0, 0])
    palette.putpalette([9, 9, 9, 200, 0, 0])
    palette.save(tmp_path / "pred/a.labels.png")
    write("pred/a.png", np.zeros((7, 7, 3)))  # the photo itself: x.labels.png goes before x.png
    write("pred/a.overlay.png", np.zeros((7, 7, 3)))
    (tmp_path / "pred/a.json").write_text("{}")
    write("gt/sub/b é.png", [[1, 1, 0, 255]], np.uint16)
    result = run(*folders)
    assert result.exit_code == 0
    assert "0       75.00" in result.stdout


def test_void_of_camvid_and_several_ignored(tmp_path: Path, write: Write) -> None:
    write("gt/a.png", [[3, 3, 11, 255]])
    write("pred/a.png", [[3, 255, 3, 3]])
    result = run(
        "--pred", tmp_path / "pred", "--gt", tmp_path / "gt", "--num-classes", 11, "--ignore", "11,255",
        "--json", tmp_path / "out.json",
    )  # fmt: skip
    assert result.exit_code == 0
    assert json.loads((tmp_path / "out.json").read_text())["miou"] == 0.5


def test_classes_from_a_dataset_description(folders: list[object], tmp_path: Path) -> None:
    described = tmp_path / "dataset.yaml"
    described.write_text("names: {0: road, 1: car, 2: void}\nignore: 2\n")
    result = run(*folders[:4], "--classes", described, "--json", tmp_path / "out.json")
    assert "car " in result.stdout
    assert json.loads((tmp_path / "out.json").read_text())["ignore"] == [2, 255]
    described.with_suffix(".json").write_text('{"names": ["way", "truck"]}')
    assert "truck" in run(*folders, "--classes", described.with_suffix(".json")).stdout
    for text, error in (
        ("names: {1: road, 2: car}", r"--classes: .*dataset\.yaml: wanted the ids 0\.\.1 for 2 names, got \[1, 2\]"),
        ("- road", "wanted names: as a list, or a mapping of id to name, got None"),
        ("names: {a: b}", "wanted whole numbers as class ids"),
        ("names: [", "wanted a YAML or JSON file, got one that does not read"),
    ):
        described.write_text(text)
        with pytest.raises(InputError, match=error):
            run(*folders[:4], "--classes", described)


def test_bad_pairs_are_listed_and_the_others_scored(folders: list[object], tmp_path: Path, write: Write) -> None:
    for name in ("small", "torn", "text", "colour", "beyond"):
        write(f"pred/{name}.png", np.zeros((20, 30)))
        write(f"gt/{name}.png", np.zeros((20, 30)))
    write("pred/small.png", np.zeros((10, 15)))
    write("pred/colour.png", np.zeros((20, 30, 3)))
    write("gt/beyond.png", np.full((20, 30), 7))
    (tmp_path / "gt/text.png").write_text("no picture")
    noise = write("gt/torn.png", np.random.default_rng(0).integers(0, 2, (200, 300)))
    noise.write_bytes(noise.read_bytes()[:900])
    result = run(*folders, "--json", tmp_path / "out.json")
    assert result.exit_code == 1
    assert "5 of 7 pairs could not be scored" in result.stderr
    assert "small: prediction is 15x10 px but truth is 30x20 px; write the prediction at the size" in result.stderr
    assert "beyond: truth has class ids 7; wanted 0..1 or ignored (255): ignore them too (--ignore)" in result.stderr
    assert all(f"{name}.png" in result.stderr for name in ("torn", "text", "colour"))
    assert "2 pairs" in result.stdout
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["confusion"] == [[3, 0, 0], [1, 2, 0]]
    assert [failure["name"] for failure in figures["failed"]] == ["beyond", "colour", "small", "text", "torn"]


def test_all_pairs_bad(tmp_path: Path, write: Write) -> None:
    for index in range(12):
        write(f"gt/{index:02}.png", [[11]])
        write(f"pred/{index:02}.png", [[0]])
    result = run(
        "--pred", tmp_path / "pred", "--gt", tmp_path / "gt", "--num-classes", 11, "--json", tmp_path / "o.json"
    )
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "12 of 12 pairs could not be scored" in result.stderr
    assert "and 2 more" in result.stderr
    assert not (tmp_path / "o.json").exists()


def test_files_without_partner(folders: list[object], write: Write) -> None:
    write("gt/lonely.png", [[0]])
    write("pred/extra.png", [[0]])
    with pytest.raises(InputError, match=r"2 files without a partner: .*lonely\.png, .*extra\.png; .*--allow-missing"):
        run(*folders)
    result = run(*folders, "--allow-missing")
    assert result.exit_code == 0
    assert "2 pairs, 2 files without a partner left out" in result.stdout


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        (["--pred", "nowhere"], "--pred: wanted a folder of label PNGs, got nowhere, which is no folder"),
        (["--gt", "empty"], "--gt: wanted a folder of label PNGs, got empty, which holds none"),
        (["--gt", "other"], r"wanted files of the same name in both folders, got e.g. pred/a\.png and other/z\.png"),
        (["--scale", 1], "--scale: wanted only with --task depth, got it with semantic; leave it out"),
        (["--ignore", "void"], "--ignore: wanted class ids separated by commas, such as 11,255, got 'void'"),
        (["--names", "a,b,c"], "--num-classes: wanted as many as there are class names, 3, got 2; drop it"),
        (["--names", "a,b", "--classes", "x.yaml"], "--names, --classes: wanted one of them, got both"),
        (["--classes", "x.yaml"], r"--classes: x\.yaml: wanted a YAML or JSON file, got one that does not read"),
        (["--json", "pred/a.png/out.json"], r"out\.json: cannot be written \(.*\); choose another path"),
    ],
)
def test_misuse_says_what_to_do(
    folders: list[object], tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch, changed: list[str], text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write("other/z.png", [[0]])
    with pytest.raises(InputError, match=text):
        run("--pred", "pred", "--gt", "gt", *folders[4:], *changed)


def test_number_of_classes_is_needed(folders: list[object]) -> None:
    with pytest.raises(InputError, match="--num-classes: wanted how many classes there are, got nothing; add it"):
        run(*folders[:4])
    assert run(*folders[:4], "--num-classes", 0).exit_code == 2


# calibration


@pytest.fixture
def sure(folders: list[object], write: Write, tmp_path: Path) -> list[object]:
    """Confidences of the two pairs: 0.8 where the prediction is right, 1 (of 2 px one is wrong) and 0.6 where wrong."""
    write("sure/a.png", [[204, 204, 153]])
    (tmp_path / "sure/sub").mkdir()
    np.save(tmp_path / "sure/sub/b é.npy", np.array([[1.0, 1.0, 1.0, 0.0]], np.float32))
    return [*folders, "--confidence", tmp_path / "sure"]


def test_calibration_of_files(sure: list[object], tmp_path: Path) -> None:
    out, plot = tmp_path / "out.json", tmp_path / "plots" / "reliability.png"
    shown = run(*sure, "--json", out, "--plot", plot)
    assert shown.exit_code == 0
    figures = json.loads(out.read_text())
    calibration = figures["calibration"]
    # 2 px at 0.8, both right; 1 px at 0.6, wrong; 3 px at 1, right
    assert calibration["ece"] == pytest.approx((2 * 0.2 + 0.6 + 0) / 6)
    assert calibration["mce"] == pytest.approx(0.6)
    assert (calibration["nll"], calibration["brier"]) == (None, None)
    assert sum(each["pixels"] for each in calibration["bins"]) == 6
    assert "ECE (%)" in shown.stdout
    assert figures["miou"] == pytest.approx((3 / 4 + 2 / 3) / 2)
    with Image.open(plot) as picture:
        assert picture.mode == "RGB"
    run(*sure, "--json", tmp_path / "two.json", "--jobs", 2)
    assert json.loads((tmp_path / "two.json").read_text())["calibration"] == calibration
    run(*sure[:-2], "--json", out)
    assert "calibration" not in json.loads(out.read_text())


def test_calibration_of_16_bits_and_of_all_classes(sure: list[object], write: Write, tmp_path: Path) -> None:
    write("sure/a.png", [[52428, 52428, 39321]], np.uint16)
    (tmp_path / "sure/sub/b é.npy").unlink()
    probs = np.array([[[0.1, 0.2, 0.9, 0.5]], [[0.9, 0.8, 0.1, 0.5]]])
    np.savez(tmp_path / "sure/sub/b é.npz", probs)
    run(*sure, "--json", tmp_path / "out.json")
    calibration = json.loads((tmp_path / "out.json").read_text())["calibration"]
    assert calibration["ece"] == pytest.approx((abs(3 - 0.8 * 3) + 0.6 + 0.1 * 2) / 6)
    assert calibration["nll"] == pytest.approx(-np.log([0.9, 0.8, 0.9]).mean())


def test_confidences_that_are_none_are_listed(tmp_path: Path, write: Write) -> None:
    arrays = {
        "wide": np.ones((1, 5)), "large": np.full((1, 3), 1.5), "three": np.ones((3, 1, 3)) / 3,
        "logits": np.ones((2, 1, 3)), "whole": np.ones((1, 3), np.int64), "line": np.ones(3),
    }  # fmt: skip
    for name, array in arrays.items():
        write(f"pred/{name}.png", [[0, 0, 1]])
        write(f"gt/{name}.png", [[0, 0, 255]])
        (tmp_path / "sure").mkdir(exist_ok=True)
        np.save(tmp_path / "sure" / f"{name}.npy", array)
    for folder in ("pred", "gt", "sure"):
        write(f"{folder}/palette.png", [[0, 0, 1]])
    with Image.open(tmp_path / "sure/palette.png") as picture:
        picture.convert("P").save(tmp_path / "sure/palette.png")
    shown = run(
        "--pred", tmp_path / "pred", "--gt", tmp_path / "gt", "--num-classes", 2, "--confidence", tmp_path / "sure"
    )
    assert shown.exit_code == 1
    for text in (
        "wide: prediction is 5x1 px but truth is 3x1 px",
        "large: confidence: wanted probabilities 0..1, got values from 1.5 to 1.5; give the probability of the",
        "three: wanted confidences [H, W] or class probabilities [2, H, W], got [3, 1, 3]; give those of all classes",
        "logits: class_probs: wanted probabilities that sum to 1",
        "whole.npy: wanted confidences [H, W] or class probabilities [K, H, W], got int64 [1, 3]; store floats 0..1",
        "line.npy: wanted confidences",
        "palette.png: wanted confidences (one grey channel), got a picture of mode P",
        "(confidence: ",
    ):
        assert text in shown.stderr


def test_confidences_without_partner(sure: list[object], write: Write, tmp_path: Path) -> None:
    write("sure/extra.png", [[0]])
    (tmp_path / "sure/sub/b é.npy").unlink()
    with pytest.raises(InputError, match=r"2 files without a partner: .*labels\.png, .*extra\.png"):
        run(*sure)
    shown = run(*sure, "--allow-missing")
    assert "1 pairs, 2 files without a partner left out" in shown.stdout
    (tmp_path / "sure/a.png").unlink()
    with pytest.raises(InputError, match=r"--confidence: wanted a folder .* named as --pred, got none of the same"):
        run(*sure, "--allow-missing")
    with pytest.raises(InputError, match=r"--confidence: wanted .*, got the labels themselves in .*pred"):
        run(*sure[:-1], tmp_path / "pred")
    with pytest.raises(InputError, match="--plot: wanted confidences to draw, got none; give their folder with --conf"):
        run(*sure[:-2], "--plot", tmp_path / "plot.png")


def test_perturbed_camvid_equals_the_metric_itself(camvid: Path, tmp_path: Path) -> None:
    (tmp_path / "pred").mkdir()
    (tmp_path / "gt").mkdir()
    expected = SemanticScore(11, ignore=11)
    for path in sorted((camvid / "labels" / "test").glob("*.png"))[::40]:
        with Image.open(path) as image:
            truth = np.array(image)
        pred = np.roll(truth, 5, axis=1)
        pred[pred == 11] = 255
        Image.fromarray(pred).save(tmp_path / "pred" / f"{path.stem}.labels.png")
        Image.fromarray(truth).save(tmp_path / "gt" / path.name)
        expected.update(pred, truth)
    out = tmp_path / "out.json"
    result = run(
        "--pred", tmp_path / "pred", "--gt", tmp_path / "gt", "--num-classes", 11, "--ignore", 11, "--json", out
    )  # fmt: skip
    assert result.exit_code == 0
    figures = json.loads(out.read_text())
    assert figures["miou"] == expected.compute().miou
    assert figures["boundary_iou"] == expected.compute().boundary_iou


def test_needs_no_torch_and_starts_without_numpy() -> None:
    code = (
        "import sys, denselab.cli.score; assert 'numpy' not in sys.modules, 'numpy';"
        "import denselab.metrics, denselab.metrics.draw; assert 'torch' not in sys.modules, 'torch'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
