"""Label pairs per second of `denselab score` on one core, reading the PNGs included: by the clock and by CPU time.

python benchmarks/score_speed.py [--data CAMVID] [--out RESULT.json]
233 pairs of 480x360: CamVid's test labels where they are, else random regions; predictions are the truth moved by
3 px with a tenth of its 8x8 blocks redrawn.
"""

import argparse
import contextlib
import io
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from measure import median, write_result
from PIL import Image

from denselab.cli.score import score

PAIRS, HEIGHT, WIDTH = 233, 360, 480
CAMVID = Path(__file__).resolve().parents[2] / "shared" / "data" / "camvid"

parser = argparse.ArgumentParser()
parser.add_argument("--data", type=Path, default=CAMVID)
parser.add_argument("--repeat", type=int, default=5)
parser.add_argument("--out")
given = parser.parse_args()
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
rng = np.random.default_rng(0)


def truths() -> Iterator[np.ndarray]:
    files = sorted((given.data / "labels" / "test").glob("*.png"))
    for path in files:
        yield np.array(Image.open(path))
    for _ in range(PAIRS - len(files)):
        ids = np.zeros((HEIGHT, WIDTH), np.uint8)
        for _ in range(60):
            y, x, h, w = rng.integers((HEIGHT, WIDTH, HEIGHT // 3, WIDTH // 3))
            ids[y : y + h, x : x + w] = rng.integers(12)
        yield ids


def perturbed(truth: np.ndarray) -> np.ndarray:
    blocks = rng.random((HEIGHT // 8, WIDTH // 8)) < 0.1
    redrawn = np.kron(np.where(blocks, rng.integers(0, 11, blocks.shape), 255), np.ones((8, 8))).astype(np.uint8)
    return np.where(redrawn == 255, np.roll(truth, 3, axis=1), redrawn)


with tempfile.TemporaryDirectory() as folder:
    pred, gt = Path(folder) / "pred", Path(folder) / "gt"
    pred.mkdir()
    gt.mkdir()
    for index, truth in enumerate(truths()):
        Image.fromarray(truth).save(gt / f"{index}.png")
        Image.fromarray(perturbed(truth)).save(pred / f"{index}.labels.png")
    clocks = {"pairs_per_s": time.perf_counter, "pairs_per_cpu_s": time.process_time}
    rates: dict[str, dict[bool, list[float]]] = {clock: {True: [], False: []} for clock in clocks}
    for _ in range(given.repeat + 1):
        for boundary in (True, False):
            began = {name: clock() for name, clock in clocks.items()}
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                score(pred, gt, num_classes=11, ignore="11", boundary=boundary)
            for name, clock in clocks.items():
                rates[name][boundary].append(PAIRS / (clock() - began[name]))

write_result(
    given.out,
    {
        "pairs": PAIRS,
        "size": f"{WIDTH}x{HEIGHT}",
        "data": "camvid test" if (given.data / "labels" / "test").is_dir() else "random regions",
        **{
            name: {
                "with boundary IoU": round(median(by_boundary[True][1:]), 1),
                "without": round(median(by_boundary[False][1:]), 1),
            }
            for name, by_boundary in rates.items()
        },
        "bar": {"pairs_per_s with boundary IoU": 150},
    },
)
