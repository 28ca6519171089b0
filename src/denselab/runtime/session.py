"""One artifact opened in one engine."""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from denselab.errors import InputError

ENGINES = ("openvino", "onnxruntime")
"""In order of preference."""


class Session(Protocol):
    """An engine that runs one model; called from one thread at a time."""

    engine: str

    def run(self, image: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """Image [H, W, 3] RGB of any size to the outputs of the graph by name, without their batch axis."""
        ...


class OpenVinoSession:
    """OpenVINO on the CPU, in the precision that it picks itself (bf16 where the CPU has it) unless one is given.

    threads: None lets the engine decide; precision: its INFERENCE_PRECISION_HINT, such as "f32".
    """

    engine = "openvino"

    def __init__(self, path: Path, threads: int | None = None, precision: str | None = None) -> None:
        openvino = import_openvino()
        options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = threads
        if precision is not None:
            options["INFERENCE_PRECISION_HINT"] = precision
        core: Any = openvino.Core()
        # Shapes stay dynamic: compiling once per image size was not faster per image and costs 0.1 s each time.
        model: Any = core.read_model(path)
        names: list[str] = [name for output in model.outputs for name in output.get_names()]
        compiled: Any = core.compile_model(model, "CPU", options)
        # By name: the engine keeps no promise about the order of outputs, and merges equal ones.
        self._outputs: dict[str, Any] = {name: compiled.output(name) for name in names}
        self._request: Any = compiled.create_infer_request()

    def run(self, image: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """Image [H, W, 3] RGB of any size to the outputs of the graph by name, without their batch axis."""
        batch = np.ascontiguousarray(image)[None]
        answers: Any = self._request.infer({0: batch}, share_inputs=True)
        return {name: answers[output][0] for name, output in self._outputs.items()}


def import_openvino() -> Any:
    """OpenVINO without the package by which it reports its use over the network: labelling a photo tells nobody."""
    sys.modules.setdefault("openvino_telemetry", cast("Any", None))
    import openvino

    return openvino


class OnnxRuntimeSession:
    """ONNX Runtime on the CPU. threads: None lets the engine decide."""

    engine = "onnxruntime"

    def __init__(self, path: Path, threads: int | None = None) -> None:
        import onnxruntime

        options: Any = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        self._session: Any = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._names: list[str] = [output.name for output in self._session.get_outputs()]

    def run(self, image: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """Image [H, W, 3] RGB of any size to the outputs of the graph by name, without their batch axis."""
        batch = np.ascontiguousarray(image)[None]
        answers: list[NDArray[Any]] = self._session.run(self._names, {"image": batch})
        return {name: answer[0] for name, answer in zip(self._names, answers, strict=True)}


def open_session(path: Path, engine: str = "auto", threads: int | None = None) -> Session:
    """Open an artifact; "auto" takes OpenVINO, or ONNX Runtime where only that is installed.

    Raises InputError for an unknown or missing engine, or a model that the engine refuses.
    """
    if engine not in ("auto", *ENGINES):
        raise InputError(f"engine: wanted auto, {' or '.join(ENGINES)}, got {engine!r}")
    if threads is not None and threads < 1:
        raise InputError(f"threads: wanted 1 or more, got {threads}")
    installed = [name for name in ENGINES if find_spec(name)]
    if engine == "auto":
        engine = installed[0] if installed else ENGINES[0]
    if engine not in installed:
        raise InputError(f"engine {engine}: not installed; install it with: pip install {engine}")
    try:
        return OpenVinoSession(path, threads) if engine == "openvino" else OnnxRuntimeSession(path, threads)
    except Exception as error:  # each engine has its own exception types
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(f"{path}: {engine} cannot open this model ({reason}); export it again") from error
