"""denselab fit as a user meets it: options and files of options, a kill in the middle, two processes."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner, Result

from denselab.checkpoint import load_checkpoint
from denselab.cli import app
from denselab.data.scenes.write import write_scenes
from denselab.errors import InputError
from denselab.training.options import FitOptions, options
from tiny_data import write_tiny

QUICK = (
    *("--model", "small", "--batch-size", "4", "--workers", "0", "--precision", "32"),
    *("--zoom-min", "1", "--zoom-max", "1", "--picture-epochs", "0", "--lr", "5e-3", "--ema-decay", "0.9"),
)

KILLED_WHILE_SAVING = """
import os, torch
from denselab.cli import main
save, saved = torch.save, []
def save_or_die(contents, file):
    if os.path.basename(file.name).startswith(".last"):
        saved.append(file.name)
    if len(saved) == 2:
        file.write(b"PK half a checkpoint")
        file.flush()
        os.kill(os.getpid(), 9)
    save(contents, file)
torch.save = save_or_die
main()
"""


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["fit", *map(str, arguments)])


def refusal(*arguments: object) -> str:
    error = invoke(*arguments).exception
    assert isinstance(error, InputError), error
    return str(error)


def run_python(*arguments: object) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def test_every_option_is_on_the_command_line() -> None:
    shown = CliRunner().invoke(app, ["fit", "--help"], env={"COLUMNS": "200"}).output
    for option in options():
        assert f"--{option.name.replace('_', '-')}" in shown
        assert option.about.text[:30] in shown
    assert "(deeplabv3plus)" in shown
    assert "-o" in shown


def test_help_and_options_need_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; from denselab.cli import app; app(['fit', '--help'])"
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    assert "--max-time" in done.stdout


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bach_size: 3", "run.yaml: no option is named bach_size; did you mean batch_size?"),
        ("xyzzy: 3", "run.yaml: no option is named xyzzy; known are data, out, task, model"),
        ("batch_size: 0", "batch_size: must be at least 1, got 0"),
        ("batch_size: 1.5", "run.yaml: batch_size: wanted int, got 1.5"),
        ("lr: fast", "run.yaml: lr: wanted float, got 'fast'"),
        ("lr: .nan", "lr: must be at least 0, got nan"),
        ("precision: fp8", "run.yaml: precision: wanted auto or 32 or bf16 or 16, got 'fp8'"),
        ("flip: 1", "run.yaml: flip: wanted bool, got 1"),
        ("crop: 100", "crop: wanted WIDTHxHEIGHT in px such as 352x256, got 100"),
        ("max_time: soon", "max_time: wanted HH:MM:SS above zero such as 00:45:00, got soon"),
        ("loss: ce+focal", "loss: wanted ce, ohem, dice, lovasz or a sum such as ce+0.5*dice, got ce+focal"),
        (
            "task: panoptic+deep",
            "task: wanted semantic, instance, panoptic, depth, normals or a sum such as panoptic+0.3*",
        ),
        ("task: depth+2*depth", "or a sum such as panoptic+0.3*depth, got 'depth+2*depth'"),
        ("ema_decay: 1", "ema_decay: must be below 1, got 1.0"),
        ("zoom_min: 3", "zoom_min: must be at most zoom_max 2.0, got 3.0"),
        ("- a", "run.yaml: wanted a YAML mapping of option names to values, got list"),
        ("a: [", "run.yaml: wanted a YAML file of options, got"),
    ],
)
def test_mistakes_in_a_file_are_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    assert message in refusal("--config", tmp_path / "run.yaml", "--data", "d", "-o", tmp_path / "o")


def test_mistakes_on_the_command_line_are_named(tmp_path: Path) -> None:
    assert refusal("-o", tmp_path / "o") == "data: wanted a folder, got none; give --data"
    assert "no_data: wanted a data folder, got no such folder" in refusal("--data", tmp_path / "no_data", "-o", "o")
    assert "got no run.yaml there; check -o" in refusal("-o", tmp_path / "o", "--resume")
    assert "leave out --config" in refusal("-o", tmp_path / "o", "--resume", "--config", "x.yaml")
    assert "No such file" in refusal("--config", tmp_path / "none.yaml")
    data = write_tiny(tmp_path / "data", {"train": 2, "val": 1})
    old = tmp_path / "o" / "best.ckpt"
    old.parent.mkdir()
    old.write_bytes(b"old")
    assert "tiny" in refusal("--data", data, "-o", old.parent, "--overwrite", "--model", "tiny")
    assert old.exists()
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refusal("--data", data, "-o", tmp_path / "file" / "o", "--model", "small")


def test_values_of_a_file_are_read_as_meant(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "data: d\nout: o\nlr: 1e-3\nmax_time: 00:45:00\nprecision: 32\nbackbone: null\nloss: ohem+.5*dice\n"
        "task: semantic + 0.3*depth\n"
    )
    read = FitOptions.from_mapping(FitOptions.load(path))
    assert (read.lr, read.max_seconds, read.precision, read.backbone) == (1e-3, 2700, "32", None)
    assert read.loss_weights == {"cross_entropy": 0, "ohem": 1, "dice": 0.5, "lovasz": 0}
    assert (read.tasks, read.task_weights) == (("semantic", "depth"), {"semantic": 1, "depth": 0.3})
    read.save(path)
    assert FitOptions.from_mapping(FitOptions.load(path)) == read


def test_run_file_runs_again_and_the_command_line_wins(tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "data", {"train": 4, "val": 2})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    first, again = tmp_path / "first", tmp_path / "again"
    done = invoke("--data", data, "-o", first, *QUICK, "--epochs", 1)
    assert done.exit_code == 0, done.exception
    assert "frequency-weighted IoU" in done.output
    written = yaml.safe_load((first / "run.yaml").read_text())
    assert (written["crop"], written["epochs"], written["data"]) == ("96x64", 1, str(data))
    assert set(written) == {option.name for option in options()}
    assert invoke("--config", first / "run.yaml", "-o", again).exit_code == 0
    torch.set_num_threads(threads)
    assert yaml.safe_load((again / "run.yaml").read_text()) == written | {"out": str(again)}
    scores = [json.loads((run / "evaluation.json").read_text())["miou"] for run in (first, again)]
    assert scores[0] == scores[1]


def test_kill_9_while_saving_costs_the_step_and_not_the_run(tmp_path: Path) -> None:
    data, run = write_tiny(tmp_path / "data", {"train": 8, "val": 2}), tmp_path / "run"
    killed = run_python("-c", KILLED_WHILE_SAVING, "fit", "--data", data, "-o", run, *QUICK, "--epochs", 3)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path.name for path in run.glob(".*.part.*")] != []
    assert load_checkpoint(run / "best.ckpt").card.score is not None
    assert torch.load(run / "last.ckpt", weights_only=True)["global_step"] == 2

    resumed = run_python("-m", "denselab", "fit", "-o", run, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "epoch 1/3" not in resumed.stderr
    assert "epoch 3/3" in resumed.stderr
    assert torch.load(run / "last.ckpt", weights_only=True)["global_step"] == 6
    assert list(run.glob(".*.part.*")) == []
    with (run / "metrics.csv").open(newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2", "3"]


def test_two_processes_train_one_model_and_count_each_image_once(tmp_path: Path) -> None:
    data, run = write_tiny(tmp_path / "data", {"train": 9, "val": 3}), tmp_path / "run"
    done = run_python("-m", "denselab", "fit", "--data", data, "-o", run, *QUICK, "--epochs", 2, "--devices", 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("9 images to train") == 1
    assert torch.load(run / "last.ckpt", weights_only=True)["global_step"] == 2  # 9 images: 5 each, one batch of 4
    with (run / "metrics.csv").open(newline="") as file:
        best = max(float(row["val_miou"]) for row in csv.DictReader(file))
    assert best == pytest.approx(json.loads((run / "evaluation.json").read_text())["miou"], abs=1e-5)


@pytest.mark.parametrize(
    ("task", "more", "figure"),
    [
        ("panoptic", ("--model", "kmax", "--width", 32, "--queries", 12, "--norm", "group", "--remax"), "pq"),
        ("instance", ("--model", "panoptic_deeplab", "--width", 16), "mask"),
        ("depth+normals", ("--model", "polymax", "--width", 32, "--queries", 12, "--max-depth", 80), "depth"),
    ],
)
def test_every_task_trains_resumes_and_is_evaluated(
    task: str, more: tuple[object, ...], figure: str, tmp_path: Path
) -> None:
    write_scenes(tmp_path / "data", 6, (60, 80))
    quick = ("--backbone", "small", "--epochs", 1, "--batch-size", 2, "--crop", "64x48", "--workers", 0)
    run = tmp_path / "run"
    done = invoke("--data", tmp_path / "data", "-o", run, "--task", task, *quick, *more, "--picture-epochs", 1)
    assert done.exit_code == 0, done.exception
    written = json.loads((run / "evaluation.json").read_text())
    assert (written["task"], written["split"]) == (task, "test")
    assert figure in written
    assert load_checkpoint(run / "best.ckpt").card.tasks == tuple(task.split("+"))
    assert (run / "pictures" / "epoch_0001.png").exists()
    again = invoke("-o", run, "--resume", "--epochs", 2)
    assert again.exit_code == 0, again.exception


def test_a_task_without_truth_or_model_is_named(tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "data", {"train": 2, "val": 1})
    out = ("-o", tmp_path / "o", "--model", "kmax", "--backbone", "small")
    assert "wanted truth for depth, got data with semantic only" in refusal("--data", data, *out, "--task", "depth")
    assert "task: wanted semantic, instance, panoptic" in refusal("--data", data, *out, "--task", "boxes")
    scenes = tmp_path / "scenes"
    write_scenes(scenes, 3, (30, 40))
    masks = ("--task", "panoptic", "--model", "mask2former", "--backbone", "small", "--width", 16, "--remax")
    refused = refusal("--data", scenes, "-o", tmp_path / "o", *masks)
    assert refused == "remax: wanted a model whose masks compete (kmax), got mask2former; drop --remax"
