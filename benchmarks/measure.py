"""What the benchmarks share: a measured child process, and a result file that says where it was measured."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


@dataclass(frozen=True)
class ProcessCost:
    wall_s: float
    peak_mb: float


def run_process(command: Sequence[str]) -> ProcessCost:
    """Wall time and peak resident memory of one child process; raises when it fails."""
    began = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    errors = child.stderr.read() if child.stderr else b""
    _, status, usage = os.wait4(child.pid, 0)
    wall_s = time.perf_counter() - began
    if status != 0:
        raise RuntimeError(f"{' '.join(command)} failed: {errors.decode()}")
    return ProcessCost(wall_s, usage.ru_maxrss / 1024)


def write_result(path: str | None, figures: Mapping[str, object]) -> None:
    """Print the figures and write them, with machine and command, as JSON."""
    result = {
        "command": "python " + " ".join(sys.argv),
        "figures": dict(figures),
        "machine": {
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "load_1min_at_end": round(os.getloadavg()[0], 2),
            "python": platform.python_version(),
            **{name: _version(name) for name in ("numpy", "openvino", "onnxruntime", "torch")},
        },
    }
    text = json.dumps(result, indent=2)
    if path:
        Path(path).write_text(text + "\n")
    print(text)


def median(values: Sequence[float], digits: int = 2) -> float:
    return round(statistics.median(values), digits)


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
