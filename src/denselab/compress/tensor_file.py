"""Files of tensors that belong to a model: safetensors, with a format version and the model's hash beside them."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from denselab.compress.saved_file import check_version, reading
from denselab.compress.sites import ModelHash
from denselab.errors import InputError
from denselab.files import atomic_path

Held = TypeVar("Held")

_METADATA = "denselab"


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any], model: ModelHash, version: int
) -> None:
    """Write tensors and what describes them (as JSON), atomically."""
    metadata = json.dumps({"format_version": version, "model": vars(model), "tensors": [*tensors], **about})
    contiguous = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with atomic_path(path) as partial:
        save_file(contiguous, partial, {_METADATA: metadata})


def read_tensors(
    path: Path,
    model: ModelHash,
    version: int,
    built: Callable[[Mapping[str, Any], Mapping[str, Tensor]], Held],
    wanted: str,
) -> Held:
    """What a file holds. built: makes it of the description and the tensors. wanted: what that is, in words.

    Raises InputError, naming the file: missing, damaged, a newer format, of another model, or of other weights.
    """
    with reading(path, wanted, "make it again", SafetensorError), safe_open(path, framework="pt") as file:
        about = json.loads((file.metadata() or {})[_METADATA])
        check_version(path, about["format_version"], version)
        found = ModelHash(**about["model"])
        model.check_same(found, path)
        if found.values != model.values:
            raise InputError(f"{path}: the model's weights changed since it was written; make it again")
        return built(about, {name: file.get_tensor(name) for name in about["tensors"]})
