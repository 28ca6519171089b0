"""Measures one model on one image, each engine in a process of its own: honest peak memory and cold start."""

import json
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from denselab._load import load
from denselab.errors import InputError
from denselab.runtime.images import open_image
from denselab.runtime.predictor import as_pixels

STEPS = ("decode", "pre", "engine", "post", "total")
_WARM_UP_RUNS = 3


@dataclass(frozen=True)
class Measurement:
    """What one engine took for one image.

    median_ms, p95_ms: per step of STEPS. decode: file to RGB pixels; pre: checks (normalisation is in the model);
    engine: pixels to outputs of the graph; post: the checked results and their figures; total: all of them.
    cold_start_ms: from starting Python to the first result. peak_mb: of the whole process, None where unknown.
    """

    engine: str
    threads: int | None
    height_px: int
    width_px: int
    median_ms: dict[str, float]
    p95_ms: dict[str, float]
    images_per_s: float
    cold_start_ms: float
    peak_mb: float | None


def measure(model: str, image: Path, engine: str, threads: int | None, repeat: int) -> Measurement:
    """Measure in a new Python process; raises InputError with what that process said if it fails."""
    asked = {"model": model, "image": str(image), "engine": engine, "threads": threads, "repeat": repeat}
    request = json.dumps({**asked, "started_s": time.time()})
    command = [sys.executable, "-m", "denselab.bench", request]
    child = subprocess.run(command, capture_output=True, encoding="utf-8")
    if child.returncode:
        raise InputError((child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1])
    return Measurement(**json.loads(child.stdout.splitlines()[-1]))


def _measure_here(
    model: str, image: str, engine: str, threads: int | None, repeat: int, started_s: float
) -> Measurement:
    """What the new process does. started_s: when it was started, on the clock of time.time."""
    predictor = load(model, engine, threads)
    first = predictor(image)
    cold_start_ms = 1000 * (time.time() - started_s)

    def run_once() -> list[float]:
        marks = [time.perf_counter()]
        decoded = open_image(Path(image))
        marks.append(time.perf_counter())
        pixels = as_pixels(decoded)
        marks.append(time.perf_counter())
        answers = predictor.answers(pixels)
        marks.append(time.perf_counter())
        for result in predictor.results(answers, pixels.shape[:2]).values():
            result.figures()
        marks.append(time.perf_counter())
        return [*np.diff(marks), marks[-1] - marks[0]]

    for _ in range(_WARM_UP_RUNS):
        run_once()
    times_ms = 1000 * np.array([run_once() for _ in range(repeat)])
    median_ms = _by_step(np.median(times_ms, axis=0))
    height_px, width_px = first.hw
    return Measurement(
        engine=predictor.session.engine,
        threads=threads,
        height_px=height_px,
        width_px=width_px,
        median_ms=median_ms,
        p95_ms=_by_step(np.percentile(times_ms, 95, axis=0)),
        images_per_s=1000 / median_ms["total"],
        cold_start_ms=cold_start_ms,
        peak_mb=_peak_mb(),
    )


def _by_step(values: Iterable[float]) -> dict[str, float]:
    return {step: float(value) for step, value in zip(STEPS, values, strict=True)}


def _peak_mb() -> float | None:
    """Peak resident memory of this process in MB (1e6 bytes)."""
    status = Path("/proc/self/status")
    if status.is_file():  # on Linux, getrusage also counts what the parent held when it forked
        peak_kib = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM")).split()[1]
        return int(peak_kib) * 1024 / 1e6
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # bytes on macOS


if __name__ == "__main__":
    try:
        print(json.dumps(asdict(_measure_here(**json.loads(sys.argv[1])))))
    except InputError as error:
        sys.exit(str(error))
