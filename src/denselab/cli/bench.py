"""denselab bench: what a model costs on this machine."""

import json
import os
import platform
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from denselab.errors import InputError
from denselab.files import atomic_path

if TYPE_CHECKING:
    from denselab.bench import Measurement


def bench(
    model: Annotated[str, typer.Option(help="street, FILE.onnx, FILE.ckpt, hf:NAME or kmax:FILE.")] = "street",
    image: Annotated[Path | None, typer.Option(help="What to label; a rendered 480x360 scene if not given.")] = None,
    engine: Annotated[str, typer.Option(help="all (that are installed), openvino or onnxruntime.")] = "all",
    threads: Annotated[int, typer.Option(min=1, help="Threads of the engine.")] = 2,
    repeat: Annotated[int, typer.Option(min=1, help="Timed runs, after three untimed ones.")] = 30,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures here too.")] = None,
) -> None:
    """Milliseconds per step, images per second, peak memory and cold start of every engine.

    The engines run one after another, each in its own process. Leave the machine alone meanwhile.
    """
    from denselab.bench import measure

    with tempfile.TemporaryDirectory() as folder:
        picture = image or _scene(Path(folder) / "scene.jpg")
        measured = [measure(model, picture, name, threads, repeat) for name in _engines(model, engine)]
    print(table(measured))
    if json_path is not None:
        figures = {
            "model": model,
            "image": str(image or "rendered scene"),
            "repeat": repeat,
            "machine": _machine(),
            "engines": [vars(measurement) for measurement in measured],
        }
        with atomic_path(json_path) as partial:
            partial.write_text(json.dumps(figures, indent=2) + "\n", "utf-8")


def table(measured: Sequence["Measurement"]) -> str:
    """Plain aligned text: per engine a line of medians and a line of 95th percentiles, then the rest."""
    from denselab.bench import STEPS

    lines = [["engine", "ms", *STEPS, "images/s", "cold start ms", "peak MB"]]
    for m in measured:
        peak = "unknown" if m.peak_mb is None else f"{m.peak_mb:.0f}"
        rest = [f"{m.images_per_s:.1f}", f"{m.cold_start_ms:.0f}", peak]
        lines.append([m.engine, "median", *(f"{m.median_ms[step]:.2f}" for step in STEPS), *rest])
        lines.append(["", "p95", *(f"{m.p95_ms[step]:.2f}" for step in STEPS), "", "", ""])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ["  ".join(map(str.rjust, line, widths)) for line in lines]
    return "\n".join([f"{measured[0].width_px}x{measured[0].height_px} px, {measured[0].threads} threads", *rows])


def _engines(model: str, engine: str) -> list[str]:
    """Which engines to measure; what is no artifact runs in PyTorch whatever is asked."""
    from importlib.util import find_spec

    from denselab.hub import is_published
    from denselab.runtime.session import ENGINES

    if model.endswith(".ckpt") or is_published(model):
        return ["auto"]
    if engine != "all":
        return [engine]
    installed = [name for name in ENGINES if find_spec(name)]
    if not installed:
        raise InputError("engine: none is installed; install one with: pip install openvino")
    return installed


def _scene(path: Path) -> Path:
    from PIL import Image

    from denselab.data.scenes import render_scene

    Image.fromarray(render_scene(seed=0).image).save(path, quality=90)
    return path


def _machine() -> dict[str, Any]:
    cpu_info = Path("/proc/cpuinfo")
    names = cpu_info.read_text().splitlines() if cpu_info.is_file() else []
    cpu = next((line.split(":", 1)[1].strip() for line in names if line.startswith("model name")), platform.processor())
    return {"system": platform.platform(), "cpu": cpu, "cores": os.cpu_count()}
