import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from artifacts import TASKS, task_artifact, tiny_artifact
from denselab import cli
from denselab.cli.progress import track
from denselab.runtime import pipeline
from denselab.runtime import predictor as predictor_module


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_artifact(tmp_path_factory.mktemp("model") / "tiny.onnx")


@pytest.fixture
def predict(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run the command in this process; give its exit code, standard output and standard error."""

    def run(*arguments: str | Path, model: Path | str = model) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["denselab", "predict", *map(str, arguments), "--model", str(model)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return run


def photo(path: Path, hw: tuple[int, int] = (30, 40), seed: int = 0) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*hw, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def labels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        assert picture.mode == "P"
        return np.array(picture)


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_everything_is_written(predict, tmp_path: Path):
    pixels = photo(tmp_path / "in" / "a photo ü.png")
    code, out, err = predict(tmp_path / "in" / "a photo ü.png", "-o", tmp_path / "out")
    assert (code, err) == (0, "")
    assert "labelled 1 image in" in out
    assert f"results in {tmp_path / 'out'}" in out
    names = ["a photo ü.json", "a photo ü.labels.png", "a photo ü.overlay.png"]
    assert files(tmp_path / "out") == names
    wanted = (pixels[:, :, 0] >= 128).astype(np.uint8)
    assert np.array_equal(labels(tmp_path / "out" / names[1]), wanted)
    figures = json.loads((tmp_path / "out" / names[0]).read_text("utf-8"))
    assert figures["image"] == str(tmp_path / "in" / "a photo ü.png")
    assert (figures["model"], figures["width"], figures["height"]) == ("tiny", 40, 30)
    assert [entry["pixels"] for entry in figures["classes"]] == [int((wanted == i).sum()) for i in range(2)]
    assert figures["timing_ms"]["total"] >= figures["timing_ms"]["engine"] > 0
    with Image.open(tmp_path / "out" / names[2]) as picture:
        assert picture.mode == "RGB"
        assert picture.width >= 40
        colour = np.array([[0, 0, 200], [200, 0, 0]])[wanted]
        mixed = 0.45 * pixels + 0.55 * colour
        assert np.abs(np.asarray(picture)[:30, :40] - mixed).max() <= 2


def test_every_image_gets_its_own_labels_and_folders_stay(predict, tmp_path: Path):
    pictures = {}
    for i in range(40):
        name = f"{'sub/' * (i % 3)}{i}"
        pictures[name] = photo(tmp_path / "in" / f"{name}.png", (20 + i, 60 - i), seed=i)
    code, _, err = predict(tmp_path / "in", "-o", tmp_path / "out", "--write", "labels")
    assert code == 0
    assert "labelling 40/40" in err
    assert len(files(tmp_path / "out")) == 40
    for name, pixels in pictures.items():
        assert np.array_equal(labels(tmp_path / "out" / f"{name}.labels.png"), pixels[:, :, 0] >= 128), name


def test_bad_inputs_are_listed_and_the_others_written(predict, tmp_path: Path):
    folder = tmp_path / "in"
    for name in ("1.png", "5.png", "9.png"):
        photo(folder / name)
    (folder / "2.png").touch()
    (folder / "3.png").write_text("text")
    (folder / "4.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    code, out, err = predict(folder, tmp_path / "gone.jpg", tmp_path / "none*.png", "-o", tmp_path / "out")
    assert code == 1
    assert "labelled 3 images" in out
    assert "5 failed" in out
    failures = err[err.index("5 failed:") :].splitlines()
    assert len(failures) == 6
    for name in ("2.png: wanted an image, got an empty file", "3.png", "4.jpg", "gone.jpg", "none*.png"):
        assert any(name in line for line in failures), name
    assert len(files(tmp_path / "out")) == 9


def test_only_bad_inputs(predict, tmp_path: Path):
    code, out, err = predict(tmp_path / "gone.jpg", "-o", tmp_path / "out")
    assert code == 1
    assert "gone.jpg: wanted an image, a folder or a pattern, got a path that does not exist" in err
    assert "labelled 0 images" in out


def test_results_are_never_overwritten_silently(predict, tmp_path: Path):
    photo(tmp_path / "a.png")
    photo(tmp_path / "b.png", seed=1)
    assert predict(tmp_path / "a.png", "-o", tmp_path)[0] == 0
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in files(tmp_path)}
    code, _, err = predict(tmp_path, "-o", tmp_path)
    assert code == 2
    assert "got 3 that exist" in err
    assert "--overwrite replaces them, --skip-existing labels only the rest" in err
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in files(tmp_path)} == before
    code, out, _ = predict(tmp_path, "-o", tmp_path, "--skip-existing")
    assert code == 0
    assert "labelled 1 image" in out
    assert "1 were there already" in out
    assert len(files(tmp_path)) == 8
    code, out, _ = predict(tmp_path, "-o", tmp_path, "--overwrite")  # results of before are not inputs
    assert code == 0
    assert "labelled 2 images" in out
    assert len(files(tmp_path)) == 8
    assert predict(tmp_path, "-o", tmp_path, "--skip-existing")[1].startswith("labelled 0 images")


def test_names_that_would_meet(predict, tmp_path: Path):
    first, second = photo(tmp_path / "x" / "a.png"), photo(tmp_path / "x" / "a.bmp", seed=1)
    photo(tmp_path / "y" / "a.png")
    code, _, _ = predict(tmp_path / "x", "-o", tmp_path / "out", "--write", "labels")
    assert code == 0
    assert files(tmp_path / "out") == ["a.bmp.labels.png", "a.png.labels.png"]
    assert np.array_equal(labels(tmp_path / "out" / "a.png.labels.png"), first[:, :, 0] >= 128)
    assert np.array_equal(labels(tmp_path / "out" / "a.bmp.labels.png"), second[:, :, 0] >= 128)
    code, _, err = predict(tmp_path / "x/a.png", tmp_path / "y/a.png", "-o", tmp_path / "other")
    assert code == 2
    assert "x/a.png and " in err
    assert "label them into two folders" in err
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--write", "labels,paint"), "--write: wanted some of overlay,labels,json, got 'labels,paint'"),
        (("--engine", "abacus"), "engine: wanted auto, openvino or onnxruntime, got 'abacus'"),
        (("--long-side", "0"), "--long-side"),
        (("--threads", "0"), "--threads"),
    ],
)
def test_misuse(predict, tmp_path: Path, options: tuple[str, ...], text: str):
    photo(tmp_path / "a.png")
    code, _, err = predict(tmp_path / "a.png", "-o", tmp_path / "out", *options)
    assert code == 2
    assert text in err
    assert "Traceback" not in err


def test_missing_model_is_misuse(predict, tmp_path: Path):
    photo(tmp_path / "a.png")
    code, _, err = predict(tmp_path / "a.png", "-o", tmp_path / "out", model=tmp_path / "no.onnx")
    assert code == 2
    assert "no.onnx" in err


def test_out_that_cannot_be_written(predict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    photo(tmp_path / "a.png")
    for out in (tmp_path / "a.png", tmp_path / "a.png" / "below"):
        code, _, err = predict(tmp_path / "a.png", "-o", out)
        assert code == 2
        assert f"--out: wanted a folder to write to, got {out}" in err

    def refuse(**_: object):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    code, _, err = predict(tmp_path / "a.png", "-o", tmp_path / "out")
    assert code == 2
    assert "(Permission denied); choose another" in err
    assert files(tmp_path / "out") == []


def test_full_disk_stops_the_run(predict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for i in range(60):
        photo(tmp_path / "in" / f"{i:02}.png")
    saved = Image.Image.save

    def save(self: Image.Image, file: Path, *args: object, **kwargs: object):
        if file.name.startswith(".02"):
            file.write_bytes(b"half a p")
            raise OSError(errno.ENOSPC, "No space left on device")
        saved(self, file, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "save", save)
    code, out, err = predict(tmp_path / "in", "-o", tmp_path / "out", "--write", "labels")
    assert code == 1
    written = files(tmp_path / "out")
    assert f"labelled {len(written)} images" in out
    assert 2 <= len(written) < 59
    assert not [name for name in written if name.startswith(".") or "02" in name]
    assert "02.png: its results could not be written" in err
    assert "(No space left on device)" in err
    assert f"{60 - 1 - len(written)} more images were not labelled: the disk of {tmp_path / 'out'} is full" in err


def test_one_unwritable_result_does_not_stop_the_run(predict, tmp_path: Path):
    for name in ("a.png", f"{'b' * 248}.png", "c.png"):
        photo(tmp_path / "in" / name)
    code, _, err = predict(tmp_path / "in", "-o", tmp_path / "out", "--write", "labels")
    assert code == 1
    assert files(tmp_path / "out") == ["a.labels.png", "c.labels.png"]
    assert "(File name too long)" in err


def test_a_model_that_fails_on_one_image(predict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for i in range(12):
        photo(tmp_path / "in" / f"{i:02}.png", (10, 10 + i))
    real = pipeline._label

    def fail(image, predict):
        if image.hw == (10, 14):
            raise RuntimeError("kernel broke")
        return real(image, predict)

    monkeypatch.setattr(pipeline, "_label", fail)
    code, out, err = predict(tmp_path / "in", "-o", tmp_path / "out", "--write", "labels")
    assert code == 1
    assert "labelled 11 images" in out
    assert "04.png: the model failed on it (RuntimeError: kernel broke)" in err


def test_long_side(predict, tmp_path: Path):
    left_red = np.zeros((600, 1300, 3), np.uint8)
    left_red[:, :650, 0] = 255
    Image.fromarray(left_red).save(tmp_path / "a.png")
    code, _, err = predict(tmp_path / "a.png", "-o", tmp_path / "auto")
    assert code == 0
    assert "1 image of up to 1300 px seen at 480 px, the size the model learned at; --long-side native" in err
    for name, long_side in (("small", "130"), ("whole", "native")):
        code, _, err = predict(tmp_path / "a.png", "-o", tmp_path / name, "--long-side", long_side)
        assert (code, err) == (0, "")
    for name in ("auto", "small", "whole"):
        assert np.array_equal(labels(tmp_path / name / "a.labels.png"), left_red[:, :, 0] >= 128)
    with Image.open(tmp_path / "small" / "a.overlay.png") as picture:
        assert picture.width == 1300
        assert picture.height > 600
        assert picture.getpixel((100, 300)) == (255 * 115 + 200 * 141 >> 8, 0, 0)  # the image is not blurred


def test_images_up_to_twice_the_training_size_are_not_shrunk(predict, tmp_path: Path):
    photo(tmp_path / "a.png", (300, 960))
    assert predict(tmp_path / "a.png", "-o", tmp_path / "out")[2] == ""


def test_upright_labels(predict, tmp_path: Path):
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[:10, :, 0] = 255  # stored row 0 is the right edge to see (orientation 6): red is on the right
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    assert predict(tmp_path / "a.png", "-o", tmp_path / "out")[0] == 0
    wanted = np.zeros((30, 20), np.uint8)
    wanted[:, 10:] = 1
    assert np.array_equal(labels(tmp_path / "out" / "a.labels.png"), wanted)


def test_one_pixel(predict, tmp_path: Path):
    Image.new("RGB", (1, 1), (255, 0, 0)).save(tmp_path / "dot.png")
    assert predict(tmp_path / "dot.png", "-o", tmp_path / "out")[0] == 0
    assert labels(tmp_path / "out" / "dot.labels.png").tolist() == [[1]]


def test_few_pixels_are_under_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Path):
    monkeypatch.setattr(pipeline, "_MAX_PIXELS", 1000)
    room = pipeline._Room
    most = []

    class Watched(room):
        def take(self, hw: tuple[int, int]) -> None:
            super().take(hw)
            most.append((self._images, self._pixels))

    monkeypatch.setattr(pipeline, "_Room", Watched)
    from denselab import _load

    for i in range(30):
        photo(tmp_path / f"{i:02}.png", (10, 20) if i % 5 else (50, 50))
    jobs = [
        pipeline.Job(path, {("semantic", pipeline.Output.LABELS): tmp_path / "out" / f"{path.stem}.labels.png"})
        for path in sorted(tmp_path.glob("*.png"))
    ]
    outcomes = list(pipeline.label_files(_load.load(model), jobs))
    assert [outcome.error for outcome in outcomes] == [None] * 30
    assert len(most) == 30
    assert all(images == 1 or pixels <= 1000 for images, pixels in most)


def test_progress_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    assert list(track("abcd", 4, "work")) == ["a", "b", "c", "d"]
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("work 4/4, ")
    assert " s left" in lines[0]
    assert list(track("a", 1, "work")) == ["a"]
    assert capsys.readouterr().err == ""


def test_progress_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(track("abc", 3, "work")) == ["a", "b", "c"]
    err = capsys.readouterr().err
    assert "3/3" in err
    assert "/s" in err


def test_joint_tasks_write_a_set_each(predict, tmp_path: Path):
    model = task_artifact(tmp_path / "all.onnx", *TASKS)
    pixels = photo(tmp_path / "in" / "a.png", (12, 20))
    code, _, err = predict(tmp_path / "in", "-o", tmp_path / "out", model=model)
    assert (code, err) == (0, "")
    endings = ("json", "labels.png", "overlay.png")
    assert files(tmp_path / "out") == sorted(f"a.{task}.{ending}" for task in TASKS for ending in endings)
    red, green = pixels[:, :, 0], pixels[:, :, 1]
    read = {}
    for task in TASKS:
        with Image.open(tmp_path / "out" / f"a.{task}.labels.png") as picture:
            read[task] = np.array(picture).astype(int)
        figures = json.loads((tmp_path / "out" / f"a.{task}.json").read_text("utf-8"))
        assert (figures["task"], figures["image"]) == (task, str(tmp_path / "in" / "a.png"))
        assert figures["timing_ms"]["total"] >= figures["timing_ms"]["engine"] > 0
    assert np.array_equal(read["semantic"], red >= 128)
    assert np.array_equal(read["panoptic"] @ [1, 256, 65536], np.where(red >= 128, 1, 2))
    assert np.array_equal(read["instance"], np.where(red >= 128, 1, 2 * (green >= 128)))
    assert np.abs(read["depth"] - red * 100.0).max() <= 1
    assert np.array_equal(read["normals"][:, :, 0] == 255, red >= 128)


def test_joint_results_are_not_overwritten_either(predict, tmp_path: Path):
    model = task_artifact(tmp_path / "two.onnx", "panoptic", "depth")
    photo(tmp_path / "a.png")
    assert predict(tmp_path / "a.png", "-o", tmp_path, "--write", "labels", model=model)[0] == 0
    code, _, err = predict(tmp_path / "a.png", "-o", tmp_path, model=model)
    assert code == 2
    assert "got 2 that exist" in err
    code, out, _ = predict(tmp_path, "-o", tmp_path, "--skip-existing", "--write", "labels", model=model)
    assert (code, out[:17]) == (0, "labelled 0 images")  # results of before are not inputs


def test_instances_by_score(predict, tmp_path: Path):
    model = task_artifact(tmp_path / "one.onnx", "instance")
    photo(tmp_path / "a.png")
    for name, options, count in (
        ("all", ("--min-score", "0"), 3),
        ("usual", (), 2),
        ("sure", ("--min-score", ".6"), 1),
    ):
        assert predict(tmp_path / "a.png", "-o", tmp_path / name, *options, model=model)[0] == 0
        figures = json.loads((tmp_path / name / "a.json").read_text("utf-8"))
        assert len(figures["instances"]) == count


def test_one_piece_is_said(predict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(predictor_module, "WHOLE_PX", 300)
    model = task_artifact(tmp_path / "one.onnx", "depth", classes=None)
    photo(tmp_path / "a.png", (30, 40))
    code, _, err = predict(tmp_path / "a.png", "-o", tmp_path / "out", "--long-side", "native", model=model)
    assert code == 0
    assert (
        "note: 1 image of up to 40 px seen at 20 px: depth is done in one piece, and a larger one would not fit" in err
    )
    with Image.open(tmp_path / "out" / "a.labels.png") as picture:
        assert picture.size == (40, 30)


def test_relative_depth_is_written_as_inverse_and_scored_so(predict, tmp_path: Path):
    """The model says red / 10: depths 2, 4 and 20, whose inverses are those of 3, 6 and 30 m up to a scale."""
    model = task_artifact(tmp_path / "relative.onnx", "depth", classes=None, depth_unit="relative")
    red = np.repeat(np.array([[20, 40, 200]], np.uint8), 4, axis=0)
    for folder in ("photos", "truth"):
        (tmp_path / folder).mkdir()
    Image.fromarray(np.stack([red, red, red], axis=-1)).save(tmp_path / "photos" / "a.png")
    Image.fromarray((150 * red.astype(np.uint16)).astype(np.uint16)).save(tmp_path / "truth" / "a.png")
    code, _, err = predict(tmp_path / "photos", "-o", tmp_path / "out", model=model)
    assert code == 0
    assert "note: the depth of tiny is relative, in no unit: labels hold its inverse, 65535 for what is nearest" in err
    with Image.open(tmp_path / "out" / "a.labels.png") as picture:
        assert np.asarray(picture)[0].tolist() == [65535, 32768, 6554]
    assert json.loads((tmp_path / "out" / "a.json").read_text("utf-8"))["relative"]["median"] == 4
    figures = tmp_path / "figures.json"
    options = ("--task", "depth", "--pred", tmp_path / "out", "--gt", tmp_path / "truth", "--scale", "0.001")
    scored = CliRunner().invoke(cli.app, ["score", *map(str, options), "--align", "inverse", "--json", str(figures)])
    assert scored.exit_code == 0, scored.output
    assert json.loads(figures.read_text())["abs_rel"] == pytest.approx(0, abs=1e-4)


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "denselab", "predict", *map(str, arguments)]


def test_killed_run_leaves_whole_files_only(tmp_path: Path, model: Path):
    source = tmp_path / "in"
    pixels = photo(source / "000.png", (360, 480))
    for i in range(1, 300):
        os.link(source / "000.png", source / f"{i:03}.png")
    # Hard links are one inode but distinct paths: all are labelled.
    process = subprocess.Popen(command(source, "-o", tmp_path / "out", "--model", model), stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(tmp_path.glob("out/*.json"))) < 5:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    written = [path for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")]
    assert len(written) < 900
    for path in written:
        match path.name[3:]:
            case ".json":
                json.loads(path.read_text("utf-8"))
            case ".labels.png":
                assert np.array_equal(labels(path), pixels[:, :, 0] >= 128)
            case _:
                with Image.open(path) as picture:
                    picture.load()


def test_ctrl_c_says_once_that_it_came(predict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    photo(tmp_path / "in" / "a.png")

    def ctrl_c(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "label_files", ctrl_c)
    code, _, err = predict(tmp_path / "in", "-o", tmp_path / "out")
    assert code == 130
    assert err == f"interrupted; finished results are in {tmp_path / 'out'}, --skip-existing does the rest\n"
    monkeypatch.setattr(sys.modules["denselab.cli.predict"], "_find", ctrl_c)
    code, _, err = predict(tmp_path / "in", "-o", tmp_path / "out")
    assert (code, err) == (130, "interrupted\n")


def test_start_imports_little(tmp_path: Path, model: Path):
    photo(tmp_path / "a.png")
    arguments = ["denselab", "predict", str(tmp_path / "a.png"), "-o", str(tmp_path / "out"), "--model", str(model)]
    code = f"""
import sys
sys.argv = {arguments!r}
from denselab.cli import main
try:
    main()
finally:
    loaded = {{name.partition(".")[0] for name in sys.modules}}
    print(sorted(loaded & {{"torch", "onnx", "timm", "scipy", "matplotlib", "lightning"}}))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"
