"""denselab bench, on a tiny model."""

import json
from pathlib import Path

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from artifacts import task_artifact, tiny_artifact
from denselab.bench import STEPS, Measurement, measure
from denselab.cli.bench import bench, table
from denselab.errors import InputError


def run(*arguments: str | Path) -> str:
    app = typer.Typer()
    app.command()(bench)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_every_engine_on_a_rendered_scene(tmp_path: Path) -> None:
    model = tiny_artifact(tmp_path / "tiny.onnx")
    out = run("--model", model, "--repeat", "5", "--threads", "1", "--json", tmp_path / "bench.json")
    assert "480x360 px, 1 threads" in out
    figures = json.loads((tmp_path / "bench.json").read_text())
    assert [engine["engine"] for engine in figures["engines"]] == ["openvino", "onnxruntime"]
    for engine in figures["engines"]:
        assert engine["engine"] in out
        median_ms, p95_ms = engine["median_ms"], engine["p95_ms"]
        assert list(median_ms) == list(STEPS)
        assert all(0 < median_ms[step] <= p95_ms[step] for step in STEPS)
        assert median_ms["engine"] < median_ms["total"]
        assert engine["images_per_s"] == pytest.approx(1000 / median_ms["total"])
        assert engine["cold_start_ms"] > median_ms["total"]
        assert 20 < engine["peak_mb"] < 400
    assert figures["repeat"] == 5
    assert figures["machine"]["cpu"]


def test_one_engine_on_a_given_image(tmp_path: Path) -> None:
    model = tiny_artifact(tmp_path / "tiny.onnx")
    image = tmp_path / "my photo é.png"
    Image.new("RGB", (20, 10)).save(image)
    out = run("--model", model, "--image", image, "--engine", "onnxruntime", "--repeat", "1")
    assert "20x10 px, 2 threads" in out
    assert "openvino" not in out


def test_a_joint_model(tmp_path: Path) -> None:
    model = task_artifact(tmp_path / "two.onnx", "instance", "depth")
    image = tmp_path / "photo.png"
    Image.new("RGB", (20, 10)).save(image)
    assert "20x10 px" in run("--model", model, "--image", image, "--engine", "onnxruntime", "--repeat", "1")


def test_what_fails_in_the_child_is_said_here(tmp_path: Path) -> None:
    model = tiny_artifact(tmp_path / "tiny.onnx")
    with pytest.raises(InputError, match=r"none.png: wanted an image, got no such file"):
        measure(str(model), tmp_path / "none.png", "openvino", 1, 1)
    with pytest.raises(InputError, match="engine: wanted auto, openvino or onnxruntime, got 'tpu'"):
        measure(str(model), tmp_path / "none.png", "tpu", 1, 1)


def test_table_by_hand() -> None:
    median_ms = {"decode": 1.0, "pre": 0.5, "engine": 10.0, "post": 0.5, "total": 12.0}
    p95_ms = {step: 2 * ms for step, ms in median_ms.items()}
    text = table([Measurement("openvino", 2, 360, 480, median_ms, p95_ms, 83.333, 900.4, None)])
    assert text.splitlines() == [
        "480x360 px, 2 threads",
        "  engine      ms  decode   pre  engine  post  total  images/s  cold start ms  peak MB",
        "openvino  median    1.00  0.50   10.00  0.50  12.00      83.3            900  unknown",
        "             p95    2.00  1.00   20.00  1.00  24.00                                  ",
    ]
