"""A folder of images through `denselab predict --write labels`: what the engine takes, and what all else takes.

python benchmarks/folder.py FOLDER [--model street] [--out RESULT.json]
First every step alone, one after the other; then the command, in which reading and writing overlap with the engine.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from measure import run_process, write_result

import denselab
from denselab.runtime.images import open_image

parser = argparse.ArgumentParser()
parser.add_argument("folder")
parser.add_argument("--model", default="street")
parser.add_argument("--out")
given = parser.parse_args()

predictor = denselab.load(given.model)
photos = sorted(path for path in Path(given.folder).rglob("*") if path.suffix in (".jpg", ".png"))
predictor(photos[0])
seconds = {"decode": 0.0, "engine": 0.0, "result and write": 0.0}
with tempfile.TemporaryDirectory() as folder:
    for number, photo in enumerate(photos):
        began = time.perf_counter()
        pixels = open_image(photo)
        decoded = time.perf_counter()
        result = predictor.results_at_own_size(pixels)["semantic"]
        labelled = time.perf_counter()
        result.save(Path(folder) / f"{number}.labels.png")
        seconds["decode"] += decoded - began
        seconds["engine"] += labelled - decoded
        seconds["result and write"] += time.perf_counter() - labelled
    command = [sys.executable, "-m", "denselab", "predict", given.folder, "-o", f"{folder}/out", "--write", "labels"]
    cost = run_process([*command, "--model", given.model])
beside = seconds["decode"] + seconds["result and write"]
write_result(
    given.out,
    {
        "images": len(photos),
        "seconds_one_after_the_other": {name: round(value, 2) for name, value in seconds.items()},
        "all_but_engine_per_engine": round(beside / seconds["engine"], 3),
        "whole_command_s": round(cost.wall_s, 2),
        "whole_command_per_sum_of_steps": round(cost.wall_s / (beside + seconds["engine"]), 3),
        "peak_mb": round(cost.peak_mb),
        "bar": {"all_but_engine_per_engine": 1.0},
    },
)
