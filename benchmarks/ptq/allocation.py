"""Does it matter how bits are given out? Importances against each other and against equal bits, at equal bytes.

python benchmarks/ptq/allocation.py TESTBED [--work runs/proofs] [--threads 2] [--seeds 5]
python benchmarks/ptq/allocation.py --table

For every seed other calibration images are drawn. Bytes are those of weights with 3 bits everywhere, and the middle of
those with 3 and with 2; activations have 8 bits, all is quantized by RepQ-ViT. Writes
benchmarks/results/ptq/allocation_TESTBED.json.
"""

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

import torch
from testbeds import ROOT, TESTBEDS, Testbed, captured

from denselab.compress.bit_losses import Importance, Measured
from denselab.compress.budgets import Bytes
from denselab.compress.choose_bits import CANDIDATES, bits_within
from denselab.compress.graph import Graph
from denselab.compress.measure_losses import measure
from denselab.compress.methods.method import Calibration
from denselab.compress.methods.repq_vit import REPQ_VIT
from denselab.compress.observing import observe
from denselab.compress.plan import QuantPlan, equal_bits
from denselab.compress.subject import Photos
from denselab.files import write_json

RESULTS = ROOT / "benchmarks" / "results" / "ptq"
MEAN_BITS = (3, 2.5)
ACTIVATION_BITS = 8
DRAWN_IMAGES = 32
EQUAL = "equal bits"


def drawn(photos: Photos, seed: int) -> tuple[torch.Tensor, ...]:
    """Some of the photos, drawn without replacement."""
    every = [photo for group in photos.groups for photo in group]
    chosen = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))[:DRAWN_IMAGES]
    return tuple(every[index] for index in chosen.tolist())


def bytes_at(graph: Graph, measured: Measured, bits: int) -> int:
    """What weights take with so many bits everywhere."""
    only = bits_within(graph, measured, Bytes(10**12), candidates=[(bits, ACTIVATION_BITS)])
    return only.allocation.totals.weight_bytes


def run(testbed: Testbed, work: Path, seeds: int) -> None:
    subject = testbed.subject(work)
    every = testbed.photos(subject, work)
    score = testbed.scorer(subject, work)
    graph = captured(subject.network, next(iter(every)))
    figure = score(subject.network)
    file = RESULTS / f"allocation_{testbed.name}.json"
    record: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.exists() else {}
    record = record or {
        "command": f"python benchmarks/ptq/allocation.py {testbed.name}",
        "figure": figure.name,
        "float": figure.value,
        "calibration_images": DRAWN_IMAGES,
        "scores": {},
    }
    importances = set(Importance) - {Importance.UNIFORM}
    for seed in range(seeds):
        if str(seed) in record["scores"]:
            continue
        photos = Photos(subject, drawn(every, seed), at_once=len(every.groups[0]))
        stats = observe(graph, photos)
        calibration = Calibration(photos, subject.change, seed)
        measured = measure(
            graph, stats, REPQ_VIT, calibration, {*Importance}, start=subject.start, activation_bits=ACTIVATION_BITS
        )
        found: dict[str, dict[str, float]] = {}
        for bits in MEAN_BITS:
            ends = [bytes_at(graph, measured, end) for end in (math.floor(bits), math.ceil(bits))]
            most = Bytes(sum(ends) // 2)
            plans = {EQUAL: equal_bits(graph, int(bits), ACTIVATION_BITS)} if bits == int(bits) else {}
            plans |= {
                each.value: bits_within(graph, measured, most, each, CANDIDATES, ACTIVATION_BITS, seed).bits
                for each in sorted(importances, key=lambda each: each.value)
            }
            found[f"W{bits}"] = {}
            for name, chosen in plans.items():
                plan = QuantPlan.make(graph, REPQ_VIT.name, REPQ_VIT.spec, chosen)
                quantized = REPQ_VIT.quantize(graph, stats, plan, calibration)
                found[f"W{bits}"][name] = round(score(quantized.as_module().eval()).value, 5)
            print(testbed.name, seed, f"W{bits}", found[f"W{bits}"], flush=True)
        record["scores"][str(seed)] = found
        write_json(file, record)


def table() -> str:
    """Means and standard deviations over seeds, as Markdown."""
    lines: list[str] = []
    for file in sorted(RESULTS.glob("allocation_*.json")):
        record = json.loads(file.read_text("utf-8"))
        seeds = list(record["scores"].values())
        lines += ["", f"{file.stem}: {record['figure']}, float {record['float']:.4f}, {len(seeds)} seeds", ""]
        lines += [f"| bits given by | {' | '.join(seeds[0])} |", "| --- " * (len(seeds[0]) + 1) + "|"]
        for name in next(iter(seeds[0].values())):
            values = [[seed[bits][name] for seed in seeds if name in seed[bits]] for bits in seeds[0]]
            spreads = [
                f"{statistics.mean(each):.4f} ± {statistics.pstdev(each):.4f}" if each else "" for each in values
            ]
            lines.append(f"| {name} | {' | '.join(spreads)} |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.4f} ± {statistics.pstdev(values):.4f}" if values else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("testbed", nargs="?", choices=TESTBEDS)
    parser.add_argument("--table", action="store_true", help="print the results that are there, as Markdown")
    parser.add_argument("--work", type=Path, default=Path("runs/proofs"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    if args.table or not args.testbed:
        print(table())
        return
    torch.set_num_threads(args.threads)
    run(TESTBEDS[args.testbed], args.work, args.seeds)


if __name__ == "__main__":
    main()
