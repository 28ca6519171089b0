"""The `data` commands: what they print, what they write, and how they end."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from denselab.classes import STREET
from denselab.cli.data import app
from denselab.data.descriptor import open_dataset
from denselab.errors import InputError
from denselab.runtime.artifact import TASKS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images in train and one in val, classes leaf and fruit."""
    root = tmp_path / "my däta"
    for number, split in enumerate(("train", "train", "train", "val")):
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (number, 0, 0)).save(root / f"images/{split}/{number}.jpg", quality=95)
        Image.fromarray(np.repeat([[0, 1, 255]], [20, 10, 10], axis=1).repeat(30, axis=0).astype(np.uint8)).save(
            root / f"masks/{split}/{number}.png"
        )
    for number, path in enumerate(sorted(root.glob("images/*/*.jpg"))):
        Image.new("RGB", (40, 30), (60 * number, 0, 0)).save(path)
    (root / "dataset.yaml").write_text("names: [leaf, fruit]\n")
    return root


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refusal(*arguments: str | Path) -> str:
    result = run(*arguments)
    assert isinstance(result.exception, InputError), result.output
    return str(result.exception)


def test_check_of_clean_data(folder: Path) -> None:
    result = run("check", folder)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert "train        3  40x30      40x30      40x30      1" in lines
    assert "  0 leaf       50.00 %       3     50.00 %       1" in lines
    assert "    void       25.00 %             25.00 %" in lines
    assert lines[-1] == "ok"


def test_check_of_bad_data(folder: Path, tmp_path: Path) -> None:
    (folder / "images/train/0.jpg").write_bytes(b"")
    (folder / "masks/train/1.png").unlink()
    Image.new("L", (40, 30), 9).save(folder / "masks/val/3.png")
    report = tmp_path / "report.json"
    result = run("check", folder, "--json", report)
    assert result.exit_code == 1
    assert (
        f"unreadable files: 1\n  {folder / 'images/train/0.jpg'}: wanted an image, got an empty file" in result.stdout
    )
    assert f"images without a truth: 1\n  {folder / 'images/train/1.jpg'}: no mask" in result.stdout
    assert f"{folder / 'masks/val/3.png'}: wanted ids 0, 1, 255, got ids 9 (1200 px); add" in result.stdout
    assert result.stdout.splitlines()[-1] == "3 problems"
    data = json.loads(report.read_text("utf-8"))
    assert not data["ok"]
    assert sorted(problem["kind"] for problem in data["problems"]) == ["no_truth", "unknown_label", "unreadable"]
    assert "there is a file already; choose another name or add --overwrite" in refusal(
        "check", folder, "--json", report
    )


def test_long_lists_are_cut(folder: Path) -> None:
    for number in range(13):
        Image.new("RGB", (2, 2)).save(folder / f"images/train/lone{number}.png")
    lines = run("check", folder).stdout.splitlines()
    assert sum("no mask" in line for line in lines) == 10
    assert "  and 3 more (all of them with --json FILE)" in lines
    assert lines[-1] == "13 problems"


def test_show(folder: Path, tmp_path: Path) -> None:
    sheet = tmp_path / "a sheet.png"
    assert run("show", folder, "-o", sheet, "--count", "2").exit_code == 0
    with Image.open(sheet) as picture:
        assert picture.width > 1280
    before = sheet.read_bytes()
    assert "there is a file already" in refusal("show", folder, "-o", sheet)
    assert sheet.read_bytes() == before
    assert run("show", folder, "-o", sheet, "--seed", "1", "--overwrite", "--count", "2").exit_code == 0
    assert sheet.read_bytes() != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a sheet.png", folder.name]


def test_show_leaves_out_what_it_cannot_read(folder: Path, tmp_path: Path) -> None:
    (folder / "images/train/0.jpg").write_bytes(b"")
    result = run("show", folder, "-o", tmp_path / "sheet.jpg")
    assert result.exit_code == 1
    assert f"left out: {folder / 'images/train/0.jpg'}: wanted an image, got an empty file" in result.stderr
    assert (tmp_path / "sheet.jpg").stat().st_size > 0


def test_show_refusals(folder: Path, tmp_path: Path) -> None:
    assert "wanted split test, got only train, val" in refusal(
        "show", folder, "-o", tmp_path / "s.png", "--split", "test"
    )
    assert "wanted a file that ends in .png or .jpg" in refusal("show", folder, "-o", tmp_path / "s.txt")
    assert "cannot be written" in refusal("show", folder, "-o", tmp_path / "gone" / "s.png")
    (tmp_path / "s.png").mkdir()
    assert "wanted a file to write, got a folder" in refusal("show", folder, "-o", tmp_path / "s.png")


def test_scenes_become_a_data_set(tmp_path: Path) -> None:
    out = tmp_path / "scenes"
    result = run("scenes", "-o", out, "--count", "10", "--size", "96x64", "--seed", "3")
    assert result.exit_code == 0, result.output
    dataset = open_dataset(out)
    assert dataset.classes
    assert (dataset.classes.names, dataset.classes.colours) == (STREET.names, STREET.colours)
    assert dataset.tasks == set(TASKS)
    assert sum(map(len, dataset.splits.values())) == 10
    image, truth = dataset.read(dataset.split("train")[0], {"semantic"})
    assert image.shape == (64, 96, 3)
    assert len(np.unique(truth.class_ids)) > 2
    assert "wanted an empty or a new folder, got one with files; choose another or add --overwrite" in refusal(
        "scenes", "-o", out
    )


def test_scenes_refusals(tmp_path: Path) -> None:
    assert "--size: wanted WIDTHxHEIGHT in px such as 480x360, got 480" in refusal(
        "scenes", "-o", tmp_path, "--size", "480"
    )
    assert "got 0x4" in refusal("scenes", "-o", tmp_path, "--size", "0x4")
    (tmp_path / "file").touch()
    assert "wanted a folder, got the file" in refusal("scenes", "-o", tmp_path / "file")


def test_check_and_show_of_every_truth(tmp_path: Path) -> None:
    out = tmp_path / "scenes"
    assert run("scenes", "-o", out, "--count", "6", "--size", "96x64").exit_code == 0
    report = tmp_path / "report.json"
    lines = run("check", out, "--json", report).stdout.splitlines()
    assert lines[0] == "truth for depth, instance, normals, panoptic, semantic"
    assert any(line.startswith("split    objects  per image:  fewest  median   most") for line in lines)
    assert any(line.startswith("train  depth ") and "known at" in line for line in lines)
    assert any(line.startswith("val    normals known at ") for line in lines)
    train = json.loads(report.read_text("utf-8"))["splits"]["train"]
    dataset = open_dataset(out)
    truths = [dataset.read(item, dataset.tasks)[1] for item in dataset.split("train")]
    assert dataset.classes
    told_apart = [
        sum(s.class_id in dataset.classes.things and not s.is_crowd for s in truth.segments.segments)
        for truth in truths
        if truth.segments
    ]
    assert sum(entry["objects"] for entry in train["classes"]) == sum(told_apart)
    assert train["objects"]["per_image"]["most"] == max(told_apart)
    depth_m = np.stack([truth.depth_m for truth in truths if truth.depth_m is not None])
    assert train["depth"]["median_m"] == pytest.approx(np.median(depth_m[depth_m > 0]), abs=0.011)
    assert train["depth"]["farthest_m"] == pytest.approx(depth_m.max())
    assert train["depth"]["known_share"] == pytest.approx((depth_m > 0).mean())
    normals = np.stack([truth.normals for truth in truths if truth.normals is not None])
    assert train["normals"]["known_share"] == pytest.approx(normals.any(axis=-1).mean())
    assert run("show", out, "-o", tmp_path / "sheet.png", "--count", "2").exit_code == 0
    (tmp_path / "depth.yaml").write_text(f"root: {out}\nimages: images/train/*.png\ndepth: depth/train/*.png\n")
    assert run("show", tmp_path / "depth.yaml", "-o", tmp_path / "depth.png").exit_code == 0
