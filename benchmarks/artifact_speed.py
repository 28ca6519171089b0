"""The built-in artifact against PyTorch eager float32 of the same network, batch 1, in turns in one process.

"torch eager" is the network with the usual end (interpolate the logits to full size, argmax); "torch eager, our decode"
ends as the artifact does, which is faster in eager mode too.

python benchmarks/artifact_speed.py [--artifact street.onnx] [--size 480x360] [--out RESULT.json]
"""

import argparse
import time

import numpy as np
import torch
from measure import median, write_result

import denselab.assets
from denselab.classes import STREET
from denselab.export.graph import ArtifactGraph
from denselab.runtime.session import open_session
from denselab.tasks.semantic import logits_at_source
from denselab.tasks.task import make_task
from denselab.zoo import street

TURNS, WARM_UP = 6, 4  # in turns of several runs: torch's threads spin on for a while after each of its own

parser = argparse.ArgumentParser()
parser.add_argument("--artifact", default=f"{denselab.assets.__path__[0]}/street.onnx")
parser.add_argument("--size", default="480x360")
parser.add_argument("--repeat", type=int, default=60)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--out")
given = parser.parse_args()

width, height = (int(side) for side in given.size.split("x"))
image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
torch.set_num_threads(given.threads)
model = street(num_classes=11).eval()
graph = ArtifactGraph(model, (make_task("semantic", STREET),))
batch = torch.from_numpy(image)[None]
sessions = {name: open_session(given.artifact, name, threads=given.threads) for name in ("openvino", "onnxruntime")}


@torch.inference_mode()
def run_eager() -> None:
    output = model(batch.permute(0, 3, 1, 2).float() / 255)
    logits_at_source(output, model.spec, (height, width)).argmax(dim=1)


@torch.inference_mode()
def run_graph() -> None:
    graph(batch)


runs = {"torch eager": run_eager, "torch eager, our decode": run_graph} | {
    name: lambda s=s: s.run(image) for name, s in sessions.items()
}
times_ms: dict[str, list[float]] = {name: [] for name in runs}
for _ in range(TURNS):
    for name, run in runs.items():
        for number in range(WARM_UP + given.repeat // TURNS):
            began = time.perf_counter()
            run()
            if number >= WARM_UP:
                times_ms[name].append(1e3 * (time.perf_counter() - began))
ms = {name: median(values) for name, values in times_ms.items()}
write_result(
    given.out,
    {
        "size": given.size,
        "threads": given.threads,
        "median_ms": ms,
        "times_faster_than_eager": {name: round(ms["torch eager"] / value, 2) for name, value in ms.items()},
        "times_faster_than_eager_with_our_decode": {
            name: round(ms["torch eager, our decode"] / value, 2) for name, value in ms.items()
        },
        "bar": {"default engine": 4.0},
    },
)
