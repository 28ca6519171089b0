"""Every model of the zoo with random weights: what it costs, and whether its artifact says what torch says.

python benchmarks/zoo_table.py [--out RESULT.json] [--only NAME ...] [--threads 1] [--page docs/models.md]
A row is written as soon as it is measured; rows that RESULT.json has already are kept unless --only names them.
--page also puts the table between the marks of that page. The photo is of CamVid.

Random weights are sure of nothing: batch norms are fitted to the photo and every mask is kept, so that there is
something to compare; labels near a tie may still flip, more of them where OpenVINO computes in bf16.
With one thread, milliseconds are of CPU time, which other programs on the machine disturb least.
"""

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import median, write_result
from numpy.typing import NDArray
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from denselab import zoo
from denselab.classes import Classes
from denselab.errors import InputError
from denselab.export.graph import ArtifactGraph, to_onnx
from denselab.export.parity import agreement, open_engines
from denselab.export.torch_session import TorchSession
from denselab.model import DensePredictor, Model
from denselab.tasks.grouping import GroupingRules
from denselab.tasks.panoptic import MergeRules
from denselab.tasks.task import PanopticTask, Task, make_task
from denselab.types import ValueKind

PHOTO = Path(__file__).resolve().parents[2] / "shared/data/camvid/images/test/Seq05VD_f02340.jpg"
NAMED = Classes.named([f"class {index}" for index in range(19)], things=range(11, 19))
SIZES_HW = ((480, 640), (479, 641))
TIMED_HW = SIZES_HW[0]
RUNS, WARM_UP = 5, 1
PREFERRED = ("panoptic", "depth", "semantic")
CHOICES: dict[str, dict[str, Any]] = {"eomt": {"backbone": "vit_base_patch14_dinov2"}}
"""Instead of the defaults: a ViT-B for EoMT's ViT-L, which would take most of the time."""
MARKS = ("<!-- table: begin -->\n", "<!-- table: end -->")


@dataclass(frozen=True)
class Row:
    """One model. network_hw: where it cannot be traced at a dynamic size, the one at which it runs.

    agreement: with torch, by size and engine (see `denselab.export.parity.agreement`); answers: how many different
    values torch's own answer has there. ms: median at TIMED_HW.
    """

    name: str
    task: str
    choices: Mapping[str, Any]
    network_hw: tuple[int, int] | None
    parameters_m: float
    gmacs: float
    export_cpu_s: float
    file_mb: float
    agreement: Mapping[str, Mapping[str, float]]
    answers: Mapping[str, int]
    ms: Mapping[str, float]
    runs: int
    threads: int


def measure(name: str, threads: int, folder: Path) -> Row:
    task_name = next(task for task in PREFERRED if task in zoo.MODELS[name].tasks)
    choices = CHOICES.get(name, {})
    torch.manual_seed(0)
    model = zoo.build(name, (task_name,), len(NAMED), choices).requires_grad_(False)
    settle(model)
    path, task = folder / f"{name}.onnx", task_of(task_name)
    graph, export_cpu_s = export(model, task, path)
    sessions = {"torch": TorchSession(graph), **open_engines(path, threads)}
    shares: dict[str, dict[str, float]] = {}
    answers: dict[str, int] = {}
    for size_hw in SIZES_HW:
        image = photo(size_hw)
        wanted, *others = (session.run(image) for session in sessions.values())
        size = f"{size_hw[1]}x{size_hw[0]}"
        found = [agreement(task_name, wanted, got) for got in others]
        shares[size] = {engine: round(share, 5) for engine, share in zip(list(sessions)[1:], found, strict=True)}
        answers[size] = len(np.unique(next(iter(wanted.values()))))
    image = photo(TIMED_HW)
    ms = {engine: median_ms(lambda run=session.run: run(image), threads) for engine, session in sessions.items()}
    return Row(
        name,
        task_name,
        choices,
        graph.network_hw,
        parameters_m=round(sum(p.numel() for p in model.parameters()) / 1e6, 2),
        gmacs=round(gmacs(model), 1),
        export_cpu_s=round(export_cpu_s, 1),
        file_mb=round(path.stat().st_size / 1e6, 1),
        agreement=shares,
        answers=answers,
        ms=ms,
        runs=RUNS,
        threads=threads,
    )


def task_of(name: str) -> Task:
    if name != "panoptic":
        return make_task(name, NAMED)
    everything = MergeRules(thing_score=0, stuff_score=0, mask_confidence=0.1, overlap=0)
    return PanopticTask(len(NAMED), NAMED.things, everything, grouping=GroupingRules(threshold=0.01))


def export(model: Model, task: Task, path: Path) -> tuple[ArtifactGraph, float]:
    """Write the graph for any size, or for the timed one where that is refused; CPU seconds of the export."""
    for network_hw in (None, TIMED_HW):
        graph = ArtifactGraph(model, (task,), network_hw)
        began = time.process_time()
        try:
            onnx_model = to_onnx(graph)
        except InputError:
            if network_hw:
                raise
            continue
        spent = time.process_time() - began
        path.write_bytes(onnx_model.SerializeToString())
        return graph, spent
    raise AssertionError("the last size either exports or raises")


@torch.no_grad()
def settle(model: Model) -> None:
    """Batch norms as after training on this photo and its mirror image, and classes that are all about as likely."""
    small = as_pixels(photo((TIMED_HW[0] // 2, TIMED_HW[1] // 2)))
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
            layer.momentum = 1.0
    model.train()(torch.cat([small, small.flip(3)]))
    model.eval()
    if isinstance(model, DensePredictor) and model.spec.value_kind is ValueKind.IDENTITY:
        bias = [p for name, p in model.head.named_parameters() if name.endswith("bias")][-1]
        if len(bias) == len(NAMED):
            bias -= model(small).mask_logits.mean(dim=(0, 2, 3))


@torch.inference_mode()
def gmacs(model: Model) -> float:
    """Multiply-accumulates of the network on an image of TIMED_HW, in 10^9; convolutions and matrix products."""
    with FlopCounterMode(display=False) as counter:
        model(as_pixels(photo(TIMED_HW)))
    return counter.get_total_flops() / 2e9


def photo(size_hw: tuple[int, int]) -> NDArray[np.uint8]:
    return np.asarray(Image.open(PHOTO).convert("RGB").resize(size_hw[::-1], Image.Resampling.BILINEAR))


def as_pixels(image: NDArray[np.uint8]) -> torch.Tensor:
    return torch.tensor(image).permute(2, 0, 1)[None].float() / 255


def median_ms(run: Callable[[], object], threads: int) -> float:
    clock = time.process_time if threads == 1 else time.perf_counter
    times_ms: list[float] = []
    for _ in range(WARM_UP + RUNS):
        began = clock()
        run()
        times_ms.append(1e3 * (clock() - began))
    return median(times_ms[WARM_UP:], digits=1)


def as_markdown(rows: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [
        "| model | task | M parameters | GMACs | torch ms | OpenVINO ms | ONNX Runtime ms | as torch, fp32 |"
        " as torch, OpenVINO's default |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows.values():
        fixed = f" at {row['network_hw'][1]}x{row['network_hw'][0]} inside" if row["network_hw"] else ""
        name = " ".join((f"`{row['name']}`", *(f"{key} `{value}`" for key, value in row["choices"].items())))
        ms, by_size = row["ms"], list(row["agreement"].values())
        exact = min(share for found in by_size for engine, share in found.items() if engine != "openvino")
        default = min(found["openvino"] for found in by_size)
        cells = [name + fixed, row["task"], f"{row['parameters_m']:.1f}", f"{row['gmacs']:.1f}"]
        cells += [f"{ms[engine]:.0f}" for engine in ("torch", "openvino", "onnxruntime")]
        lines.append(f"| {' | '.join([*cells, f'{100 * exact:.2f} %', f'{100 * default:.2f} %'])} |")
    return "\n".join(lines) + "\n"


def put_into(page: Path, table: str) -> None:
    before, _, rest = page.read_text().partition(MARKS[0])
    page.write_text(before + MARKS[0] + table + MARKS[1] + rest.partition(MARKS[1])[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out")
    parser.add_argument("--only", nargs="+", choices=zoo.MODELS, metavar="NAME", default=[])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--page", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    out = Path(given.out) if given.out else None
    rows: dict[str, Any] = json.loads(out.read_text())["figures"]["rows"] if out and out.is_file() else {}
    for name in given.only or [name for name in zoo.MODELS if name not in rows]:
        with tempfile.TemporaryDirectory() as folder:
            rows[name] = asdict(measure(name, given.threads, Path(folder)))
        gc.collect()  # one model in memory at a time
        write_result(given.out, {"rows": {name: rows[name] for name in zoo.MODELS if name in rows}})
    if given.page:
        put_into(given.page, as_markdown({name: rows[name] for name in zoo.MODELS if name in rows}))


if __name__ == "__main__":
    main()
