"""Does the file say what the model says? Answers, scores and milliseconds of every engine, side by side."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from denselab.classes import Classes
from denselab.data.truth import Truth
from denselab.depth_unit import DepthUnit
from denselab.errors import InputError
from denselab.export.examples import Examples
from denselab.export.precision import Precision
from denselab.export.torch_session import TorchSession
from denselab.metrics.headline import Headline
from denselab.runtime.answers import to_result
from denselab.runtime.session import OpenVinoSession, Session, open_session
from denselab.task_scores import count, new_score

Answers = Mapping[str, NDArray[Any]]
"""What a session returns of one photo."""

OPENVINO_F32 = "openvino in fp32"
MEND = "Try --precision fp32, other calibration images (--data), a --network-size"
MEND_COMPRESSED = "Take more bits, another --method or other photos (--calibrate)"
"""How a user mends answers that differ: of an export, and of a compression."""

_RUNS_PER_TURN = 3
_SURE = 0.3


@dataclass(frozen=True)
class Closeness:
    """When two answers are the same. depth: relative difference, of depth without a unit the share of the span of its
    inverse; normals_deg: angle.
    """

    depth: float
    normals_deg: float


CLOSE, CLOSE_IN_FEW_BITS = Closeness(0.01, 1.0), Closeness(0.05, 5.0)
"""Of float32, and of bf16 and integers, where sums in another order move numbers by a step."""


@dataclass(frozen=True)
class Limits:
    """What an artifact must reach to be written.

    exact: least agreement with torch (see `agreement`) of engines computing in fp32. default: the same for OpenVINO in
    the precision that it picks itself (bf16 where the CPU has it). score_drop: how much worse than torch any engine
    may score, where the photos are labelled: a share of 1 for figures of which more is better, of torch's own figure
    for errors. close: which depths and normals agree, in engines computing in fp32.
    """

    exact: float
    default: float
    score_drop: float = 0.01
    close: Closeness = CLOSE

    @classmethod
    def of(cls, precision: Precision) -> "Limits":
        """The limits that exports use unless told otherwise."""
        close = CLOSE_IN_FEW_BITS if precision is Precision.INT8 else CLOSE
        return cls(exact=0.999 if precision is Precision.FP32 else 0.97, default=0.97, close=close)


LIMITS_OF_MIXED = Limits(exact=0.99, default=0.97, close=CLOSE_IN_FEW_BITS)
"""The limits of a compressed network, of which torch simulates the integers."""


@dataclass(frozen=True)
class Measured:
    """Every engine on the same photos.

    agreement: with torch, the lowest of all tasks. score: main figures by name, None without truth. errors: names of
    those of which less is better. float_latency_ms: of the float artifact, timed in the same turns, where one was
    given. integer_share: of all multiplications, what every engine really computes in integers (see `executed`).
    """

    agreement: Mapping[str, float]
    score: Mapping[str, Mapping[str, float]] | None
    errors: tuple[str, ...]
    latency_ms: Mapping[str, float]
    latency_hw: tuple[int, int]
    threads: int
    images: int
    image_source: str
    float_latency_ms: Mapping[str, float] | None = field(default=None, kw_only=True)
    integer_share: Mapping[str, float] | None = field(default=None, kw_only=True)


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
        names = list(self.score["torch"]) if self.score else []
        lines = [
            f"file size     {self.file_bytes} bytes",
            f"compared on   {self.images} images ({self.image_source})",
            f"time per image at {width}x{height}, {self.threads} threads, median",
            f"{'engine':<18}{'same as torch':>14}{''.join(f'{name:>14}' for name in names)}{'ms':>9}",
        ]
        for engine in ("torch", *self.agreement):
            same = f"{100 * self.agreement[engine]:.3f} %" if engine in self.agreement else ""
            scores = "".join(f"{self.score[engine][name]:>14.4f}" for name in names) if self.score else ""
            lines.append(f"{engine:<18}{same:>14}{scores}{self.latency_ms[engine]:>9.1f}")
        for engine, share in (self.integer_share or {}).items():
            lines.append(f"{engine}: {100 * share:.1f} % of multiplications run in integers")
        for engine, float_ms in (self.float_latency_ms or {}).items():
            ratio = float_ms / self.latency_ms[engine]
            verdict = f"{ratio:.2f} times as fast as" if ratio >= 1 else f"SLOWER, {ratio:.2f} times the speed of"
            lines.append(f"{engine}: {verdict} the float artifact ({float_ms:.1f} ms)")
        return "\n".join(lines)


def open_engines(path: Path, threads: int) -> dict[str, Session]:
    """The artifact in every engine, OpenVINO also held to fp32, where it must do exactly what torch does."""
    return {
        "openvino": open_session(path, "openvino", threads),
        OPENVINO_F32: OpenVinoSession(path, threads, precision="f32"),
        "onnxruntime": open_session(path, "onnxruntime", threads),
    }


def measure(
    path: Path,
    reference: TorchSession,
    examples: Examples,
    classes: Classes | None,
    depth_unit: DepthUnit = DepthUnit.METRES,
    close: Closeness = CLOSE,
) -> Measured:
    """Run torch and every engine on the examples, and time them in turn on the first. close: see Limits."""
    threads = torch.get_num_threads()
    engines: dict[str, Session] = {"torch": reference, **open_engines(path, threads)}
    tasks = reference.tasks
    shares: dict[str, list[dict[str, float]]] = {name: [] for name in engines if name != "torch"}
    scores = {name: {task: new_score(task, classes, boundary=False) for task in tasks} for name in engines}
    for index, image in enumerate(examples.images):
        answers = {name: engine.run(image) for name, engine in engines.items()}
        for name, found in shares.items():
            near = close if name != "openvino" else CLOSE_IN_FEW_BITS
            both = answers["torch"], answers[name]
            found.append({task: agreement(task, *both, near, depth_unit) for task in tasks})
        if examples.truths:
            for name, counted in scores.items():
                _count(counted, answers[name], examples.truths[index], classes)
    return Measured(
        agreement={name: min(fmean(each[t] for each in found) for t in tasks) for name, found in shares.items()},
        score={name: {h.name: h.value for h in _headlines(counted)} for name, counted in scores.items()}
        if examples.truths
        else None,
        errors=tuple(h.name for h in _headlines(scores["torch"]) if not h.higher_is_better),
        latency_ms=latencies_ms(engines, examples.images[0]),
        latency_hw=examples.images[0].shape[:2],
        threads=threads,
        images=len(examples.images),
        image_source=examples.source,
    )


def timed_beside(measured: Measured, path: Path, float_artifact: Path, image: NDArray[np.uint8]) -> Measured:
    """The same with the milliseconds of all engines taken anew, in turns with those of a float artifact."""
    files = {"": path, "float ": float_artifact}
    engines = {
        f"{which}{name}": e for which, file in files.items() for name, e in open_engines(file, measured.threads).items()
    }
    found = latencies_ms(engines, image)
    theirs = {name.removeprefix("float "): ms for name, ms in found.items() if name.startswith("float ")}
    ours = {name: found[name] for name in theirs}
    return replace(measured, latency_ms={**measured.latency_ms, **ours}, float_latency_ms=theirs)


def latencies_ms(engines: Mapping[str, Session], image: NDArray[np.uint8], turns: int = 3) -> dict[str, float]:
    """Medians over turns of a few runs each: a busy moment hurts all alike.

    The first run of a turn is not timed: the threads of the engine before still spin then.
    """
    times_ms: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(turns):
        for name, engine in engines.items():
            engine.run(image)
            for _ in range(_RUNS_PER_TURN):
                start = time.perf_counter()
                engine.run(image)
                times_ms[name].append(1000 * (time.perf_counter() - start))
    return {name: round(median(times), 3) for name, times in times_ms.items()}


def check(measured: Measured, limits: Limits, mend: str = MEND) -> None:
    """Raise InputError, naming engine and figures, where a limit is not reached. mend: what a user may try."""
    for engine, share in measured.agreement.items():
        wanted = limits.default if engine == "openvino" else limits.exact
        if not share >= wanted:
            raise InputError(
                f"the artifact in {engine}: wanted the answers of torch on {100 * wanted:g} % of pixels, "
                f"got {100 * share:.3f} % on {measured.images} images ({measured.image_source}); nothing was written. "
                f"{mend}, or allow it with --min-agreement"
            )
        for name, theirs in (measured.score or {}).get(engine, {}).items():
            ours = (measured.score or {})["torch"][name]
            drop = (theirs - ours) / max(ours, 1e-9) if name in measured.errors else ours - theirs
            if not (drop <= limits.score_drop or ours != ours):
                raise InputError(
                    f"the artifact in {engine}: wanted a loss of at most {100 * limits.score_drop:g} points of "
                    f"{name} against torch, got {100 * drop:.2f} on {measured.images} images "
                    f"({measured.image_source}); nothing was written. {mend}, or allow it with --max-score-drop"
                )


def agreement(
    task: str,
    wanted: Answers,
    got: Answers,
    close: Closeness = CLOSE,
    depth_unit: DepthUnit = DepthUnit.METRES,
) -> float:
    """How far two answers to one photo are the same, 0..1. Raises InputError where sizes differ.

    Share of pixels with the same class (semantic), the same segment (panoptic), a like depth or normal; of the
    instances of which `wanted` is fairly sure (score of 0.3 or more), the mean IoU with their best partner of the
    same class in `got`, 1 where there is none.
    """
    name = {"semantic": "class_ids", "panoptic": "panoptic_ids", "instance": "instance_masks", "depth": "depth_m"}
    ours, theirs = (answers[name.get(task, "normals")] for answers in (wanted, got))
    if ours.shape != theirs.shape:
        raise InputError(f"the artifact answers in the shape {theirs.shape}, wanted {ours.shape}")
    match task:
        case "depth" if depth_unit is DepthUnit.RELATIVE:
            # Its inverse is what the network says, up to scale and shift: far away depth itself is anything.
            inverse, other = 1 / ours, 1 / theirs
            return float((np.abs(other - inverse) <= close.depth * np.ptp(inverse)).mean())
        case "depth":
            return float((np.abs(theirs - ours) <= close.depth * np.abs(ours)).mean())
        case "normals":
            cosine = np.clip((ours * theirs).sum(axis=0), -1, 1)
            return float((np.degrees(np.arccos(cosine)) <= close.normals_deg).mean())
        case "instance":
            return _instance_agreement(wanted, got)
        case _:
            return float((ours == theirs).mean())


def _instance_agreement(wanted: Answers, got: Answers) -> float:
    sure = np.flatnonzero(wanted["instance_scores"] >= _SURE)
    best: list[float] = []
    for index in sure:
        mask = wanted["instance_masks"][index].astype(bool)
        partners = got["instance_masks"][got["instance_classes"] == wanted["instance_classes"][index]].astype(bool)
        overlap = (partners & mask).sum(axis=(1, 2))
        union = (partners | mask).sum(axis=(1, 2))
        best.append(float((overlap / np.maximum(union, 1)).max(initial=0.0)) if mask.any() else 1.0)
    return fmean(best) if best else 1.0


def _count(scores: Mapping[str, Any], answers: Answers, truth: Truth, classes: Classes | None) -> None:
    for task, score in scores.items():
        count(score, to_result(task, answers, classes), truth)


def _headlines(scores: Mapping[str, Any]) -> list[Headline]:
    return [score.compute().headline for score in scores.values()]
