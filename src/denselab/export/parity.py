"""Does the file say what the model says? Labels, scores and milliseconds of every engine, side by side."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from denselab.classes import VOID
from denselab.errors import InputError
from denselab.export.examples import Examples
from denselab.export.precision import Precision
from denselab.export.torch_session import TorchSession
from denselab.metrics.semantic import SemanticScore
from denselab.runtime.session import OpenVinoSession, Session, open_session

Labels = tuple[NDArray[np.uint8], ...]

OPENVINO_F32 = "openvino in fp32"
_MEND = "Try --precision fp32, other calibration images (--data), a --network-size"
_TURNS, _RUNS_PER_TURN = 3, 3


@dataclass(frozen=True)
class Limits:
    """What an artifact must reach to be written.

    exact: least share of pixels that engines computing in fp32 label as torch does. default: the same for OpenVINO
    in the precision that it picks itself (bf16 where the CPU has it). miou_drop: how much mIoU (0..1) any engine may
    lose against torch, where the photos are labelled.
    """

    exact: float
    default: float
    miou_drop: float = 0.01

    @classmethod
    def of(cls, precision: Precision) -> "Limits":
        """The limits that exports use unless told otherwise."""
        return cls(exact=0.999 if precision is Precision.FP32 else 0.97, default=0.97)


@dataclass(frozen=True)
class Measured:
    """Every engine on the same photos. agreement: share of pixels labelled as torch does; miou in 0..1."""

    agreement: Mapping[str, float]
    miou: Mapping[str, float] | None
    latency_ms: Mapping[str, float]
    latency_hw: tuple[int, int]
    threads: int
    images: int
    image_source: str


@dataclass(frozen=True)
class Receipt(Measured):
    """What was measured before the artifact was kept, and the size of its file."""

    file_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**vars(self), "latency_hw": list(self.latency_hw)}

    def to_text(self) -> str:
        """A table for people."""
        height, width = self.latency_hw
        lines = [
            f"file size     {self.file_bytes} bytes",
            f"compared on   {self.images} images ({self.image_source})",
            f"time per image at {width}x{height}, {self.threads} threads, median",
            f"{'engine':<18}{'same labels':>12}{'mIoU':>8}{'ms':>9}",
        ]
        for engine in ("torch", *self.agreement):
            same = f"{100 * self.agreement[engine]:.3f} %" if engine in self.agreement else ""
            miou = f"{100 * self.miou[engine]:.2f}" if self.miou else ""
            lines.append(f"{engine:<18}{same:>12}{miou:>8}{self.latency_ms[engine]:>9.1f}")
        return "\n".join(lines)


def open_engines(path: Path, threads: int) -> dict[str, Session]:
    """The artifact in every engine, OpenVINO also held to fp32, where it must do exactly what torch does."""
    return {
        "openvino": open_session(path, "openvino", threads),
        OPENVINO_F32: OpenVinoSession(path, threads, precision="f32"),
        "onnxruntime": open_session(path, "onnxruntime", threads),
    }


def measure(path: Path, reference: TorchSession, examples: Examples, num_classes: int) -> Measured:
    """Label the examples with torch and every engine, and time them in turn on the first."""
    threads = torch.get_num_threads()
    engines: dict[str, Session] = {"torch": reference, **open_engines(path, threads)}
    labels = {name: labels_of(engine, examples) for name, engine in engines.items()}
    return Measured(
        agreement={name: agreement(labels["torch"], ids) for name, ids in labels.items() if name != "torch"},
        miou={name: _miou(ids, examples.truths, num_classes) for name, ids in labels.items()}
        if examples.truths
        else None,
        latency_ms=_latency_ms(engines, examples.images[0]),
        latency_hw=examples.images[0].shape[:2],
        threads=threads,
        images=len(examples.images),
        image_source=examples.source,
    )


def check(measured: Measured, limits: Limits) -> None:
    """Raise InputError, naming engine and figures, where a limit is not reached."""
    for engine, share in measured.agreement.items():
        wanted = limits.default if engine == "openvino" else limits.exact
        if not share >= wanted:
            raise InputError(
                f"the artifact in {engine}: wanted the labels of torch on {100 * wanted:g} % of pixels, "
                f"got {100 * share:.3f} % on {measured.images} images ({measured.image_source}); nothing was written. "
                f"{_MEND}, or allow it with --min-agreement"
            )
        drop = measured.miou["torch"] - measured.miou[engine] if measured.miou else 0.0
        if not drop <= limits.miou_drop:
            raise InputError(
                f"the artifact in {engine}: wanted at most {100 * limits.miou_drop:g} mIoU points below torch, "
                f"got {100 * drop:.2f} on {measured.images} images ({measured.image_source}); nothing was written. "
                f"{_MEND}, or allow it with --max-miou-drop"
            )


def labels_of(session: Session, examples: Examples) -> Labels:
    """Class ids [H, W] of every photo."""
    return tuple(session.run(image).copy() for image in examples.images)


def agreement(wanted: Labels, got: Labels) -> float:
    """Share of pixels with the same class id, over all photos. Raises InputError where sizes differ."""
    for index, (ours, theirs) in enumerate(zip(wanted, got, strict=True)):
        if ours.shape != theirs.shape:
            raise InputError(f"the artifact labels photo {index} as {theirs.shape}, wanted its size {ours.shape}")
    same = sum(int((ours == theirs).sum()) for ours, theirs in zip(wanted, got, strict=True))
    return same / sum(ids.size for ids in wanted)


def _miou(labels: Labels, truths: Labels, num_classes: int) -> float:
    score = SemanticScore(num_classes, VOID, boundary=False)
    for ids, truth in zip(labels, truths, strict=True):
        score.update(ids, truth)
    return score.compute().miou


def _latency_ms(engines: Mapping[str, Session], image: NDArray[np.uint8]) -> dict[str, float]:
    """Medians over turns of a few runs each: a busy moment hurts all alike.

    The first run of a turn is not timed: the threads of the engine before still spin then.
    """
    times_ms: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(_TURNS):
        for name, engine in engines.items():
            engine.run(image)
            for _ in range(_RUNS_PER_TURN):
                start = time.perf_counter()
                engine.run(image)
                times_ms[name].append(1000 * (time.perf_counter() - start))
    return {name: round(median(times), 3) for name, times in times_ms.items()}
