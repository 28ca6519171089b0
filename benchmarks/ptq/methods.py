"""Every method on one network, at several bits, with the same images, in one run.

python benchmarks/ptq/methods.py TESTBED [--work runs/proofs] [--threads 2] [--seed 0] [--method M ...] [--bits B ...]
python benchmarks/ptq/methods.py --table

Writes benchmarks/results/ptq/TESTBED.json after every cell; cells that are there are not made again, so that two
processes may share the columns of a table. Scores are of the simulation in torch, which exports are compared with.
"mixed4" and "mixed3": at most so many bits in the mean, of weights and of activations, chosen by sensitivity once for
all methods, and by their own rule for the two LRP methods. What stays at 8 bits: input image and head (the default of
`denselab compress`). `i-vit`, a network of integers alone, has one cell, of classifiers. Cells of another seed than 0
are only printed: they tell what is chance.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from testbeds import ROOT, TESTBEDS, Testbed, captured
from torch import nn

from denselab.compress.bit_losses import Importance, Measured
from denselab.compress.budgets import MeanBits
from denselab.compress.choose_bits import bits_within
from denselab.compress.graph import Graph
from denselab.compress.integer.program import IntegerProgram
from denselab.compress.measure_losses import measure
from denselab.compress.methods.all import METHODS
from denselab.compress.methods.i_vit import I_VIT
from denselab.compress.methods.lrp_qvit import LRP_QVIT
from denselab.compress.methods.method import Calibration, Method
from denselab.compress.methods.mix_qvit import MIX_QVIT
from denselab.compress.methods.repq_vit import REPQ_VIT
from denselab.compress.observing import Stats, observe
from denselab.compress.plan import QuantPlan, equal_bits
from denselab.compress.simulate import QuantizedGraph
from denselab.compress.subject import Dense
from denselab.files import write_json
from denselab.metrics.headline import Headline

RESULTS = ROOT / "benchmarks" / "results" / "ptq"
EQUAL = {"W8A8": (8, 8), "W6A6": (6, 6), "W4A4": (4, 4), "W3A3": (3, 3)}
MIXED = {"mixed4": 4.0, "mixed3": 3.0}
NAMES = [*(method.name for method in METHODS), I_VIT.name]
OWN_RULE = {"lrp-qvit": Importance.LRP, "mix-qvit": Importance.LRP_TIMES_SENSITIVITY}
SEED = 0
SAME_NETWORK = 1e-3
"""How far the score of one network may lie apart on two machines."""
MEASURED_IMAGES = 4
"""With which bits are chosen for dense models, as the command does."""

Score = Callable[[nn.Module], Headline]


def mixed_bits(graph: Graph, measured: Measured, method: Method, mean_bits: float) -> dict[str, int]:
    """Bits within a mean, by the method's own rule where it has one."""
    importance = OWN_RULE.get(method.name, Importance.SENSITIVITY)
    return bits_within(graph, measured, MeanBits(mean_bits, mean_bits), importance, seed=SEED).bits


def run(testbed: Testbed, work: Path, methods: list[str], bits: list[str], seed: int) -> None:
    torch.manual_seed(SEED)
    subject = testbed.subject(work)
    photos = testbed.photos(subject, work)
    score = testbed.scorer(subject, work)
    graph = captured(subject.network, next(iter(photos)))
    stats = observe(graph, photos)
    calibration = Calibration(photos, subject.change, seed)
    file: Path | None = RESULTS / f"{testbed.name}.json"
    record: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.exists() else {}
    found = score(subject.network)
    if abs(record.get("float", found.value) - found.value) > SAME_NETWORK:
        raise SystemExit(
            f"{file}: is of another network (float {record['float']:.4f}, got {found.value:.4f}); delete it"
        )
    if "float" not in record:
        record = {
            "command": f"python benchmarks/ptq/methods.py {testbed.name}",
            "figure": found.name,
            "higher_is_better": found.higher_is_better,
            "test_images": testbed.test,
            "calibration_images": testbed.calibration,
            "seed": SEED,
            "float": found.value,
            "cells": {},
        }
    if seed != SEED:
        record["cells"] = {}
        file = None
    measured: Measured | None = None
    for name in bits:
        for method in METHODS:
            cell = f"{method.name} {name}"
            if method.name not in methods or cell in record["cells"]:
                continue
            if name in MIXED and measured is None:
                importances = {Importance.SENSITIVITY, *OWN_RULE.values()}
                batches = list(islice(photos, MEASURED_IMAGES)) if isinstance(subject.kind, Dense) else photos
                seen = replace(calibration, batches=batches, seed=SEED)
                measured = measure(graph, stats, REPQ_VIT, seen, importances, start=subject.start)
            twin = record["cells"].get(f"{LRP_QVIT.name} {name}")
            if method is MIX_QVIT and name in EQUAL and twin:
                found = twin  # they differ in how they choose bits alone
            else:
                found = measured_cell(graph, stats, calibration, measured, method, name, score)
            keep(file, record, cell, found)
    integers = f"{I_VIT.name} W8A8"
    asked_for = I_VIT.name in methods and "W8A8" in bits and not isinstance(subject.kind, Dense)
    if asked_for and integers not in record["cells"]:
        keep(file, record, integers, timed_cell(lambda: I_VIT.quantize(graph, stats, calibration), score))


def keep(file: Path | None, record: dict[str, Any], cell: str, found: Mapping[str, Any]) -> None:
    """Say a cell, and write it beside those that are there, also those that another process made meanwhile."""
    record["cells"][cell] = found
    print(f"{record['command'].split()[-1]} {cell:22} {found}  (float {record['float']:.4f})", flush=True)
    if file:
        written: dict[str, Any] = json.loads(file.read_text("utf-8"))["cells"] if file.exists() else {}
        record["cells"] = {**written, **record["cells"]}
        write_json(file, record)


def measured_cell(
    graph: Graph,
    stats: Stats,
    calibration: Calibration,
    measured: Measured | None,
    method: Method,
    name: str,
    score: Score,
) -> Mapping[str, Any]:
    """Score and seconds of CPU time of one method at some bits."""
    if name in MIXED:
        assert measured is not None
        chosen = mixed_bits(graph, measured, method, MIXED[name])
    else:
        chosen = equal_bits(graph, *EQUAL[name])
    plan = QuantPlan.make(graph, method.name, method.spec, chosen)
    return timed_cell(lambda: method.quantize(graph, stats, plan, calibration), score)


def timed_cell(quantize: Callable[[], QuantizedGraph | IntegerProgram], score: Score) -> Mapping[str, Any]:
    """Score of what is made, and the seconds of CPU time that took."""
    begun_s = time.process_time()
    quantized = quantize()
    spent_s = time.process_time() - begun_s
    value = score(quantized.as_module().eval()).value
    return {"score": round(value, 5), "quantize_cpu_s": round(spent_s, 1)}


def table() -> str:
    """The results that are there, as Markdown."""
    lines: list[str] = []
    for file in sorted(RESULTS.glob("*.json")):
        record = json.loads(file.read_text("utf-8"))
        if "cells" not in record:
            continue
        columns = [name for name in (*EQUAL, *MIXED) if any(cell.endswith(f" {name}") for cell in record["cells"])]
        lines += ["", f"{file.stem}: {record['figure']}, float {record['float']:.4f}", ""]
        lines += [f"| method | {' | '.join(columns)} |", "| --- " * (len(columns) + 1) + "|"]
        for method in NAMES:
            found = [record["cells"].get(f"{method} {name}") for name in columns]
            if any(found):
                shown = " | ".join(format(cell["score"], ".4f") if cell else "" for cell in found)
                lines.append(f"| {method} | {shown} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("testbed", nargs="?", choices=TESTBEDS)
    parser.add_argument("--table", action="store_true", help="print the results that are there, as Markdown")
    parser.add_argument("--work", type=Path, default=Path("runs/proofs"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--method", action="append", choices=NAMES)
    parser.add_argument("--bits", action="append", choices=[*EQUAL, *MIXED])
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args()
    if args.table or not args.testbed:
        print(table())
        return
    torch.set_num_threads(args.threads)
    run(TESTBEDS[args.testbed], args.work, args.method or NAMES, args.bits or [*EQUAL, *MIXED], args.seed)


if __name__ == "__main__":
    main()
