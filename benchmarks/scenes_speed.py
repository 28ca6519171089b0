"""How many street scenes one core renders per second: `python benchmarks/scenes_speed.py --out FILE.json`."""

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--count", type=int, default=40, help="scenes to render")
    parser.add_argument("--repeats", type=int, default=3, help="times each scene is rendered; the best counts")
    options = parser.parse_args()

    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = "1"  # read when numpy is imported
    import numpy as np

    from denselab.data.scenes import render_clip, render_scene
    from denselab.files import atomic_path

    size_hw = (360, 480)
    render_scene(0, size_hw)  # makes the noise texture
    wall_s = [float("inf")] * options.count
    cpu_s = [float("inf")] * options.count
    for _ in range(options.repeats):
        for seed in range(options.count):
            wall_start, cpu_start = time.perf_counter(), time.process_time()
            render_scene(seed, size_hw)
            wall_s[seed] = min(wall_s[seed], time.perf_counter() - wall_start)
            cpu_s[seed] = min(cpu_s[seed], time.process_time() - cpu_start)
    frames = 20
    clip_start = time.process_time()
    render_clip(0, frames, size_hw)
    clip_s = time.process_time() - clip_start

    result = {
        "what": "render_scene, 480x360, one thread, best of repeats per scene",
        "scenes": options.count,
        "repeats": options.repeats,
        "images_per_s_wall": round(options.count / sum(wall_s), 2),
        "images_per_s_cpu": round(options.count / sum(cpu_s), 2),
        "median_ms": round(1e3 * statistics.median(wall_s), 1),
        "slowest_ms": round(1e3 * max(wall_s), 1),
        "clip_frames_per_s_cpu": round(frames / clip_s, 2),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    with atomic_path(options.out) as partial:
        partial.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
