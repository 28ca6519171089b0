"""How long the methods that only calibrate take: a ViT-S/16 at 224 px with 32 images, weights random.

python benchmarks/ptq/calibration_time.py [--threads 2]

Writes benchmarks/results/ptq/calibration_time.json: wall seconds from the network to the quantized graph.
"""

import argparse
import time

import torch
from testbeds import ROOT, captured

from denselab import _vision as _vision  # isort: skip
import timm

from denselab.compress.methods.adalog import ADALOG
from denselab.compress.methods.dopq_vit import DOPQ_VIT
from denselab.compress.methods.lrp_qvit import LRP_QVIT
from denselab.compress.methods.method import Calibration
from denselab.compress.methods.min_max import MIN_MAX
from denselab.compress.methods.repq_vit import REPQ_VIT
from denselab.compress.observing import observe
from denselab.compress.plan import QuantPlan, equal_bits
from denselab.files import write_json

MODEL, IMAGES, AT_ONCE, BITS = "vit_small_patch16_224", 32, 8, 4
METHODS = (MIN_MAX, REPQ_VIT, DOPQ_VIT, LRP_QVIT, ADALOG)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    torch.set_num_threads(parser.parse_args().threads)
    torch.manual_seed(0)
    network = timm.create_model(MODEL).eval().requires_grad_(False)
    photos = torch.randn(IMAGES, 3, 224, 224).split(AT_ONCE)
    begun_s = time.perf_counter()
    graph = captured(network, photos[0])
    captured_s = time.perf_counter() - begun_s
    begun_s = time.perf_counter()
    stats = observe(graph, photos)
    observed_s = time.perf_counter() - begun_s
    both_s = captured_s + observed_s
    seconds: dict[str, float] = {}
    for method in METHODS:
        plan = QuantPlan.make(graph, method.name, method.spec, equal_bits(graph, BITS, BITS))
        begun_s = time.perf_counter()
        method.quantize(graph, stats, plan, Calibration(photos))
        seconds[method.name] = round(both_s + time.perf_counter() - begun_s, 1)
        print(method.name, seconds[method.name], flush=True)
    write_json(
        ROOT / "benchmarks" / "results" / "ptq" / "calibration_time.json",
        {
            "command": "python benchmarks/ptq/calibration_time.py",
            "model": MODEL,
            "images": IMAGES,
            "threads": torch.get_num_threads(),
            "capture_s": round(captured_s, 1),
            "observe_s": round(observed_s, 1),
            "seconds": seconds,
        },
    )


if __name__ == "__main__":
    main()
