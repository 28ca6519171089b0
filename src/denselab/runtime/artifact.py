"""What an artifact says about itself: JSON in the metadata of its ONNX file, read without any engine."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import SEEK_CUR, BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from denselab.classes import Classes
from denselab.depth_unit import DepthUnit
from denselab.errors import InputError

FORMAT_VERSION = 2
METADATA_KEY = "denselab"
TASKS = ("semantic", "instance", "panoptic", "depth", "normals")
CLASS_TASKS = ("semantic", "instance", "panoptic")
"""Those whose answers name classes."""

# Field numbers of onnx.proto: messages ModelProto and StringStringEntryProto.
_IR_VERSION, _GRAPH, _METADATA_PROPS = 1, 7, 14
_KEY, _VALUE = 1, 2


@dataclass(frozen=True)
class Compression:
    """How an artifact's network was made smaller.

    method: that fitted it. plan_sha256: of the plan's file. mean_weight_bits, mean_activation_bits: over all weights
    and all numbers that are computed and quantized, each counted once. simulated: quantizers for whose grid no engine
    has kernels, computed in float.
    """

    method: str
    plan_sha256: str
    mean_weight_bits: float | None
    mean_activation_bits: float | None
    simulated: int

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Compression":
        """Raises KeyError, TypeError or ValueError for a missing or wrong field."""
        means = (data["mean_weight_bits"], data["mean_activation_bits"])
        weights, activations = (None if mean is None else float(mean) for mean in means)
        return cls(str(data["method"]), str(data["plan_sha256"]), weights, activations, int(data["simulated"]))


@dataclass(frozen=True)
class ArtifactInfo:
    """What the runtime and a reader need to know about an artifact.

    tasks: some of TASKS, all answered in one run. classes: None where none of the tasks has any. size_multiple: tiles
    start on multiples of this, in px; train_hw: height and width the model was trained for, in px; score: figures and
    the data they were measured on; receipt: what the export checked and measured; depth_unit: of the task depth;
    compression: None for a network whose bits were not planned.
    """

    tasks: tuple[str, ...]
    name: str
    classes: Classes | None
    void: int
    size_multiple: int
    train_hw: tuple[int, int] | None
    precision: str
    licence: str
    score: Mapping[str, Any] | None
    receipt: Mapping[str, Any]
    denselab_version: str
    depth_unit: DepthUnit = DepthUnit.METRES
    compression: Compression | None = None

    @property
    def task(self) -> str:
        """The tasks in one word: "panoptic+depth"."""
        return "+".join(self.tasks)

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` reads, ready for JSON under METADATA_KEY."""
        data = {
            "format_version": FORMAT_VERSION,
            **vars(self),
            "tasks": list(self.tasks),
            "classes": None if self.classes is None else self.classes.to_dict(),
            "train_hw": None if self.train_hw is None else list(self.train_hw),
            "depth_unit": self.depth_unit.value if "depth" in self.tasks else None,
        }
        del data["compression"]
        return data if self.compression is None else {**data, "compression": dict(vars(self.compression))}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "ArtifactInfo":
        """Check and convert. Raises InputError for a newer format, an unknown task, or a missing or wrong field."""
        try:
            version = int(data["format_version"])
            if version > FORMAT_VERSION:
                raise InputError(
                    f"format version {version} is newer than this DenseLab, which reads versions up to "
                    f"{FORMAT_VERSION}; upgrade with: pip install --upgrade denselab"
                )
            tasks = _tasks(data, version)
            classes = None if data["classes"] is None else Classes.from_dict(data["classes"])
            if classes is None and (nameless := [task for task in tasks if task in CLASS_TASKS]):
                raise InputError(f"classes: wanted those of the task {nameless[0]}, got none; export the model again")
            if (multiple := int(data["size_multiple"])) < 1:
                raise InputError(f"size_multiple: wanted 1 or more px, got {multiple}; export the model again")
            return cls(
                tasks=tasks,
                name=str(data["name"]),
                classes=classes,
                void=int(data["void"]),
                size_multiple=multiple,
                train_hw=None if data["train_hw"] is None else (int(data["train_hw"][0]), int(data["train_hw"][1])),
                precision=str(data["precision"]),
                licence=str(data["licence"]),
                score=None if data["score"] is None else dict(data["score"]),
                receipt=dict(data["receipt"]),
                denselab_version=str(data["denselab_version"]),
                depth_unit=DepthUnit(data.get("depth_unit") or DepthUnit.METRES),
                compression=Compression.from_dict(found) if (found := data.get("compression")) else None,
            )
        except InputError:
            raise
        except (KeyError, IndexError, TypeError, ValueError) as error:
            problem = f"lacks {error}" if isinstance(error, KeyError) else f"has a wrong field ({error})"
            raise InputError(f"its DenseLab metadata {problem}; export the model again") from error


def _tasks(data: Mapping[str, Any], version: int) -> tuple[str, ...]:
    """Version 1 knew one task at a time."""
    tasks = (data["task"],) if version == 1 else tuple(data["tasks"])
    strange = [task for task in tasks if task not in TASKS]
    if strange:
        raise InputError(f"unknown task {strange[0]!r}; this DenseLab runs {', '.join(TASKS)}")
    if not tasks or len(set(tasks)) < len(tasks):
        raise InputError(f"tasks: wanted one or more distinct ones, got {list(tasks)}; export the model again")
    return tasks


def read_info(path: Path) -> ArtifactInfo:
    """The metadata of an artifact; reads a few bytes however large the file is.

    Raises InputError, naming the file: missing, not ONNX, cut short, no DenseLab metadata, or `from_dict`'s reasons.
    """
    try:
        metadata = _read_metadata(path)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such model file; check the path") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check its kind and rights") from error
    if METADATA_KEY not in metadata:
        raise InputError(
            f"{path}: a plain ONNX model, without DenseLab's metadata (classes, task, size rules); "
            "make an artifact with: denselab export RUN.ckpt -o FILE.onnx"
        )
    try:
        data = json.loads(metadata[METADATA_KEY])
    except ValueError as error:
        raise InputError(f"{path}: its DenseLab metadata is damaged ({error}); export the model again") from error
    if not isinstance(data, dict):
        raise InputError(f"{path}: its DenseLab metadata is damaged (not a JSON object); export the model again")
    try:
        return ArtifactInfo.from_dict(data)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _read_metadata(path: Path) -> dict[str, str]:
    """ModelProto.metadata_props of an ONNX file."""
    seen: set[int] = set()
    metadata: dict[str, str] = {}
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            for number, value in _fields(file, size, keep=(_METADATA_PROPS,)):
                seen.add(number)
                if number == _METADATA_PROPS:
                    entry = dict(_fields(BytesIO(value), len(value), keep=(_KEY, _VALUE)))
                    metadata[entry[_KEY].decode()] = entry[_VALUE].decode()
        if not {_IR_VERSION, _GRAPH} <= seen:
            raise ValueError("no graph")
    except (EOFError, KeyError, ValueError) as error:
        # Every ONNX file begins with its IR version: what fails only after that was ONNX once.
        problem = "an ONNX file that is damaged or cut short" if _IR_VERSION in seen else "not an ONNX file"
        raise InputError(f"{path}: {problem if size else 'an empty file'}; copy or export the model again") from error
    return metadata


def _fields(file: BinaryIO, size: int, keep: tuple[int, ...]) -> Iterator[tuple[int, bytes]]:
    """The fields of a protobuf message: numbers, and the bytes of those length-delimited ones that are kept.

    Raises ValueError or EOFError where the file holds no such message.
    """
    while file.tell() < size:
        number, wire_type = divmod(_varint(file), 8)
        value, skipped = b"", 0
        match wire_type:
            case 0:
                _varint(file)
            case 1:
                skipped = 8
            case 2:
                skipped = _varint(file)
            case 5:
                skipped = 4
            case _:
                raise ValueError(f"wire type {wire_type}")
        if file.tell() + skipped > size:
            raise EOFError
        if number in keep:
            value = file.read(skipped)
        else:
            file.seek(skipped, SEEK_CUR)
        yield number, value


def _varint(file: BinaryIO) -> int:
    """A protobuf integer: 7 bits a byte, least first, the top bit says that more follow; at most 10 bytes."""
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            raise EOFError
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    raise ValueError("varint of more than 10 bytes")
