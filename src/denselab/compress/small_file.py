"""Files of a subject, float and small, for all kinds of models: written if engines answer as the simulation does."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, assert_never

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import ModelProto
from torch import Tensor

from denselab.compress.classifier_file import CLASSIFIER_KEY, LOGITS, float_to_onnx, taking_photos
from denselab.compress.integer.program import IntegerProgram
from denselab.compress.integer.program_onnx import ProgramFile, write_program
from denselab.compress.scoring import Asked, Photo, all_logits, photo_tensor
from denselab.compress.simulate import QuantizedGraph
from denselab.compress.subject import Classifier, Dense, Subject
from denselab.compress.to_onnx import compressed_artifact_model, compression_of, quantized_to_onnx, with_network
from denselab.compress.traces import Traces
from denselab.errors import InputError
from denselab.export.artifact import export_artifact
from denselab.export.examples import Examples
from denselab.export.executed import executed_integers
from denselab.export.graph import ArtifactGraph, to_onnx
from denselab.export.parity import LIMITS_OF_MIXED, MEND_COMPRESSED, Answers, open_engines
from denselab.export.precision import Precision
from denselab.export.torch_session import TorchSession, describe
from denselab.files import atomic_path
from denselab.runtime.artifact import METADATA_KEY, Compression, read_info
from denselab.runtime.session import Session

EXACT_CLASSES, DEFAULT_CLASSES = 0.99, 0.97
"""Least share of decided photos to whose class engines come as the simulation does: in fp32, and OpenVINO in the
precision it picks. Of pixels it is `LIMITS_OF_MIXED`.

A number between two codes takes the one or the other as a sum was made in this order or that, and from layer to layer
more codes follow: in a ViT of 8 bits a third of them differ at the end, by a step, between any two orders, and between
the simulation and itself with pixels one part in a million brighter. So far as this moves logits (`decided_photos`), no
file can be held to the simulation's answer. On the other photos of 256 of CIFAR-10 both engines agreed wholly for a ViT
of 8 bits; at W4A4 on 98.6 to 99.5 % (RepQ-ViT), and on 95.3 to 96.6 % with plain uniform ranges, which ruin it.
"""

COARSE_CLASSES = 0.9
"""The same for plans with fewer than FINE_BITS somewhere, whose steps move some photos far more than others."""

FINE_BITS = 6

_BRIGHTER = 1 + 1e-6
_SURE = 4


@dataclass(frozen=True, eq=False)
class Compared:
    """The small file, open in every engine, and what the first of them answers to the photos it was compared on."""

    engines: Mapping[str, Session]
    answers: Sequence[Answers]


def float_session(subject: Subject, network_hw: tuple[int, int] | None) -> Session:
    """The network in eager torch, asked as engines are."""
    match subject.kind:
        case Classifier():
            return Asked(lambda seen: subject.network(subject.pixels(seen)))
        case Dense(loaded):
            return TorchSession(ArtifactGraph(loaded.model, loaded.card.make_tasks(), network_hw))
        case _:
            assert_never(subject.kind)


def float_file(subject: Subject, example: Tensor, network_hw: tuple[int, int] | None) -> ModelProto:
    """The network in float32, as the small file holds it. Raises InputError for one that cannot be traced."""
    match subject.kind:
        case Classifier():
            return taking_photos(float_to_onnx(subject.network, example[:1]), subject.kind, {})
        case Dense(loaded):
            return to_onnx(ArtifactGraph(loaded.model, loaded.card.make_tasks(), network_hw))
        case _:
            assert_never(subject.kind)


def small_model(
    subject: Subject, quantized: QuantizedGraph, network_hw: tuple[int, int] | None, traces: Traces
) -> ModelProto:
    """The quantized network as ONNX, without what it says about itself. traces: of networks like it (see `Traces`)."""
    match subject.kind:
        case Classifier():
            return taking_photos(quantized_to_onnx(quantized, (LOGITS,), traces=traces), subject.kind, {})
        case Dense(loaded):
            tasks = loaded.card.make_tasks()
            return compressed_artifact_model(loaded.model, tasks, quantized, network_hw, traces=traces)
        case _:
            assert_never(subject.kind)


def write_small(
    subject: Subject,
    quantized: QuantizedGraph,
    model: ModelProto,
    plan_json: bytes,
    network_hw: tuple[int, int] | None,
    examples: Examples,
    out: Path,
    min_agreement: float | None,
    say: Callable[[str], None],
) -> Compared | None:
    """Write the small file if engines answer as the simulation in torch does. Raises InputError where they do not.

    model: of `small_model`. Returns what was compared, where that is known here.
    """
    classifies = isinstance(subject.kind, Classifier)
    exact, default = (
        (EXACT_CLASSES, DEFAULT_CLASSES) if classifies else (LIMITS_OF_MIXED.exact, LIMITS_OF_MIXED.default)
    )
    if classifies and any(spec.bits < FINE_BITS for spec in quantized.plan.specs.values()):
        exact = default = COARSE_CLASSES
    if min_agreement is not None:
        exact, default = min_agreement, min(min_agreement, default)
    compression = compression_of(quantized, plan_json)
    match subject.kind:
        case Dense(loaded):
            info = replace(describe(loaded, out.stem, Precision.INT8), compression=compression)
            export_artifact(
                with_network(loaded.model, quantized.as_module()),
                loaded.card.make_tasks(),
                info,
                out,
                examples,
                network_hw=network_hw,
                limits=replace(LIMITS_OF_MIXED, exact=exact, default=default),
                overwrite=True,
                say=say,
                ready=model,
            )
            return None
        case Classifier():
            say(f"comparing with the simulation on {len(examples.images)} photos ({examples.source})")
            simulated, brighter = (
                all_logits(Asked(lambda seen, by=by: quantized.run(by * subject.pixels(seen))), examples.images)
                for by in (1, _BRIGHTER)
            )
            decided = decided_photos(simulated, brighter)
            if not decided.all():
                say(
                    f"{np.count_nonzero(~decided)} of them are so near a tie that rounding decides; on the others "
                    "engines must agree"
                )
            with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                draft = Path(folder) / "draft.onnx"
                draft.write_bytes(model.SerializeToString())
                engines = open_engines(draft, torch.get_num_threads())
            logits = {name: all_logits(engine, examples.images) for name, engine in engines.items()}
            alike = {name: each.argmax(1) == simulated.argmax(1) for name, each in logits.items()}
            check_same({name: each[decided] for name, each in alike.items()}, exact, default)
            same = {name: float(each.mean()) for name, each in alike.items()}
            about = {"name": subject.name, "licence": subject.licence, "agreement": same}
            _describe(model, {**about, "compression": vars(compression)})
            with atomic_path(out) as partial:
                partial.write_bytes(model.SerializeToString())
            return Compared(engines, [{LOGITS: each} for each in next(iter(logits.values()))])
        case _:
            assert_never(subject.kind)


def write_integers(
    subject: Subject, program: IntegerProgram, examples: Examples, out: Path, say: Callable[[str], None]
) -> None:
    """Write a program of integers if the engine gives the integers of torch, to the last bit, on every photo."""
    say(f"comparing integers on {len(examples.images)} photos ({examples.source})")
    with atomic_path(out) as partial:
        write_program(program, partial)
        written = ProgramFile(partial)
        for photo in examples.images:
            codes = program.image_code.stored(subject.pixels(photo_tensor(photo)).numpy())
            if not np.array_equal(written.run(codes), program.run(torch.from_numpy(codes)).numpy()):
                raise InputError("the file in onnxruntime: wanted the integers of the program, got others")


def compared(path: Path, subject: Subject, examples: Examples) -> Compared:
    """What `write_small` returns, of a file that is there."""
    engines = small_engines(path, subject)
    first = next(iter(engines.values()))
    return Compared(engines, [first.run(image) for image in examples.images])


def small_engines(path: Path, subject: Subject) -> dict[str, Session]:
    """The small file in every engine that runs it."""
    threads = torch.get_num_threads()
    if not is_program(path):
        return open_engines(path, threads)
    program = ProgramFile(path, threads)

    def logits(seen: Tensor) -> Tensor:
        return torch.from_numpy(program.logits(subject.pixels(seen).numpy()))

    return {"onnxruntime": Asked(logits, "onnxruntime")}


def is_program(path: Path) -> bool:
    """Whether a file is an integer program, and not a network of quantized tensors."""
    return not any(each.key in (CLASSIFIER_KEY, METADATA_KEY) for each in onnx.load(path).metadata_props)


def integer_share(path: Path, photo: Photo) -> dict[str, float]:
    """See `executed_integers`; of a program, whose every node is one of integers, nothing."""
    return {} if is_program(path) else executed_integers(onnx.load(path), {"image": photo[None]})


def same_as_simulation(subject: Subject, path: Path) -> Mapping[str, float]:
    """The shares that `write_small` measured, as the file keeps them; `write_integers` takes no less than all."""
    if is_program(path):
        return {"onnxruntime": 1.0}
    match subject.kind:
        case Dense():
            return dict(read_info(path).receipt["agreement"])
        case Classifier():
            return dict(_about(path)["agreement"])
        case _:
            assert_never(subject.kind)


def compression_in(subject: Subject, path: Path) -> Compression:
    """What the file says of its plan."""
    if is_program(path):
        return Compression("i-vit", "", 8.0, 8.0, 0)
    match subject.kind:
        case Dense():
            found = read_info(path).compression
            assert found is not None
            return found
        case Classifier():
            return Compression.from_dict(_about(path)["compression"])
        case _:
            assert_never(subject.kind)


def decided_photos(simulated: NDArray[np.floating], brighter: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Of which photos the simulation is sure: its best two logits lie farther apart than rounding moves them.

    At least half of the photos count, so that noise alone never passes.
    """
    moved = float(np.sqrt(np.square(simulated - brighter).mean()))
    ranked = np.sort(simulated, axis=1)
    margins = ranked[:, -1] - ranked[:, -2]
    return margins >= min(_SURE * moved, float(np.median(margins)))


def check_same(alike: Mapping[str, NDArray[np.bool_]], exact: float, default: float) -> None:
    """One photo may always differ: of few, that is more than the share allowed."""
    for engine, each in alike.items():
        wanted = min(default if engine == "openvino" else exact, 1 - 1.5 / len(each))
        if each.mean() < wanted:
            raise InputError(
                f"the file in {engine}: wanted the classes of the simulation on {100 * wanted:.4g} % of {len(each)} "
                f"photos, got {100 * each.mean():.4g} %; nothing was written. {MEND_COMPRESSED}, or allow it "
                "(--min-agreement)"
            )


def _describe(model: ModelProto, about: Mapping[str, Any]) -> None:
    (entry,) = model.metadata_props
    entry.value = json.dumps({**json.loads(entry.value), **about}, ensure_ascii=False)


def _about(path: Path) -> Mapping[str, Any]:
    props = onnx.load(path).metadata_props
    return json.loads(next(each.value for each in props if each.key == CLASSIFIER_KEY))
