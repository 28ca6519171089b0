"""Files of tensors that belong to a model: safetensors, with a format version and the model's hash beside them."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

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
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})[_METADATA])
            if about["format_version"] > version:
                raise InputError(
                    f"{path}: format version {about['format_version']} is newer than this DenseLab, which reads "
                    f"versions up to {version}; upgrade with: pip install --upgrade denselab"
                )
            found = ModelHash(**about["model"])
            model.check_same(found, path)
            if found.values != model.values:
                raise InputError(f"{path}: the model's weights changed since it was written; make it again")
            return built(about, {name: file.get_tensor(name) for name in about["tensors"]})
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    except (AttributeError, KeyError, TypeError, ValueError, SafetensorError) as error:
        problem = f"lacks {error}" if isinstance(error, KeyError) else f"is damaged ({error})"
        raise InputError(f"{path}: wanted {wanted}, but it {problem}; make it again") from error
