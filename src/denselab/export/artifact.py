"""A model becomes an artifact: traced, made smaller, compared with torch in every engine, and only then kept."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from onnx import ModelProto

from denselab.depth_unit import DepthUnit
from denselab.errors import InputError
from denselab.export.examples import Examples
from denselab.export.executed import executed_integers
from denselab.export.graph import ArtifactGraph, to_onnx
from denselab.export.parity import (
    LIMITS_OF_MIXED,
    MEND,
    MEND_COMPRESSED,
    Limits,
    Receipt,
    check,
    measure,
    open_engines,
    timed_beside,
)
from denselab.export.precision import MIXED, Precision
from denselab.export.quantize import quantize_int8, store_bf16
from denselab.export.torch_session import TorchSession
from denselab.files import atomic_path
from denselab.model import Model
from denselab.runtime.artifact import METADATA_KEY, ArtifactInfo, read_info
from denselab.tasks.task import Task


def export_artifact(
    model: Model,
    tasks: tuple[Task, ...],
    info: ArtifactInfo,
    out: Path,
    parity: Examples,
    calibration: Examples | None = None,
    network_hw: tuple[int, int] | None = None,
    limits: Limits | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda text: None,
    ready: ModelProto | None = None,
    float_artifact: Path | None = None,
) -> Receipt:
    """Write `out` if, and only if, it answers the parity photos as `model` does; what was there stays otherwise.

    info: what the artifact says about itself; its `precision` is made, its `receipt` is filled in. calibration: for
    int8. network_hw: see ArtifactGraph. limits: default Limits.of(precision). say: is told what happens.
    ready: a compressed network as ONNX, of which `model` is the simulation: it is not traced then, and the artifact's
    precision is MIXED. float_artifact: a file of the same network in float, timed in the same run for the receipt.
    Relative depth is compared but not scored, for the truth is in metres.
    Raises InputError: unsuitable target, a model that cannot be traced, disagreement, a disk that is full.
    """
    check_target(out, overwrite)
    if info.depth_unit is not DepthUnit.METRES:
        parity = replace(parity, truths=None)
    graph = ArtifactGraph(model, tasks, network_hw)
    reference = TorchSession(graph)
    integer_share = None
    if ready is not None:
        info = replace(info, precision=MIXED)
        limits = limits or LIMITS_OF_MIXED
        onnx_model = ready
        integer_share = executed_integers(onnx_model, {"image": parity.images[0][None]})
    else:
        precision = Precision(info.precision)
        limits = limits or Limits.of(precision)
        onnx_model = _made(graph, precision, calibration, say)
    say(f"comparing with torch on {len(parity.images)} images ({parity.source})")
    try:
        with TemporaryDirectory() as folder:
            draft = Path(folder) / out.name
            draft.write_bytes(onnx_model.SerializeToString())
            measured = measure(draft, reference, parity, info.classes, info.depth_unit, limits.close)
            check(measured, limits, MEND if ready is None else MEND_COMPRESSED)
            measured = replace(measured, integer_share=integer_share)
            if float_artifact is not None:
                measured = timed_beside(measured, draft, float_artifact, parity.images[0])
            with atomic_path(out) as partial:
                receipt = _write(onnx_model, info, lambda size: Receipt(**vars(measured), file_bytes=size), partial)
                _check_file(partial, draft, receipt, parity)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror or error}); choose another place") from error
    return receipt


def _made(
    graph: ArtifactGraph, precision: Precision, calibration: Examples | None, say: Callable[[str], None]
) -> ModelProto:
    """A model traced and made smaller."""
    say("tracing the model")
    onnx_model = to_onnx(graph)
    match precision:
        case Precision.FP32:
            return onnx_model
        case Precision.BF16:
            return store_bf16(onnx_model)
        case Precision.INT8:
            if calibration is None:
                raise InputError("calibration: int8 needs photos to calibrate with, got none; give some")
            say(f"calibrating on {len(calibration.images)} images ({calibration.source})")
            return quantize_int8(onnx_model, calibration.images)


def check_target(out: Path, overwrite: bool) -> None:
    """Raise InputError where an artifact cannot go."""
    if out.suffix != ".onnx":
        raise InputError(f"{out}: wanted a file name that ends in .onnx; rename it")
    if not out.parent.is_dir():
        raise InputError(f"{out}: wanted a place in a folder that exists, got {out.parent}; create that folder")
    if out.is_dir():
        raise InputError(f"{out}: wanted a file, got a folder; choose another name")
    if out.exists() and not overwrite:
        raise InputError(f"{out}: exists already; choose another name or give --overwrite")


def _write(model: ModelProto, info: ArtifactInfo, receipt_of: Callable[[int], Receipt], path: Path) -> Receipt:
    """Write the model with a receipt that states the size of the very file it lies in."""
    size = 0
    while True:
        receipt = receipt_of(size)
        del model.metadata_props[:]
        described = replace(info, receipt=receipt.to_dict()).to_dict()
        model.metadata_props.add(key=METADATA_KEY, value=json.dumps(described, ensure_ascii=False))
        contents = model.SerializeToString()
        if len(contents) == size:
            break
        size = len(contents)  # grows with its own digits at most, so this ends
    path.write_bytes(contents)
    return receipt


def _check_file(path: Path, draft: Path, receipt: Receipt, parity: Examples) -> None:
    """Open the file as a user will, and compare it with the draft that was measured."""
    recorded = read_info(path).receipt["file_bytes"]
    engines = open_engines(path, receipt.threads)
    for name, session in open_engines(draft, receipt.threads).items():
        wanted, got = session.run(parity.images[0]), engines[name].run(parity.images[0])
        if recorded != path.stat().st_size or any((wanted[key] != got[key]).any() for key in wanted):
            raise RuntimeError(f"{path}: what was written is not what was measured ({name})")
