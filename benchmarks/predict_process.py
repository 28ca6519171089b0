"""`denselab predict` of one JPEG as a whole process: wall time and peak memory, warm disk.

python benchmarks/predict_process.py PHOTO.jpg [--model street] [--runs 9] [--out RESULT.json]
"""

import argparse
import sys
import tempfile

from measure import median, run_process, write_result

parser = argparse.ArgumentParser()
parser.add_argument("photo")
parser.add_argument("--model", default="street")
parser.add_argument("--runs", type=int, default=9)
parser.add_argument("--out")
given = parser.parse_args()

with tempfile.TemporaryDirectory() as folder:
    command = [sys.executable, "-m", "denselab", "predict", given.photo, "-o", folder, "--overwrite"]
    command += ["--model", given.model]
    run_process(command)
    costs = [run_process(command) for _ in range(given.runs)]
write_result(
    given.out,
    {
        "wall_s_median": median([c.wall_s for c in costs]),
        "wall_s_best": round(min(c.wall_s for c in costs), 2),
        "peak_mb_max": round(max(c.peak_mb for c in costs)),
        "bar": {"wall_s": 1.5, "peak_mb": 500},
    },
)
