"""What transformers saved in a folder or on the hub, read part by part, with errors that say how to mend it."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from denselab import _vision as _vision  # before transformers, which imports torchvision

# isort: split
import huggingface_hub
import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoImageProcessor, PreTrainedModel
from transformers.utils.hub import cached_file

from denselab.errors import InputError
from denselab.hub.parts import Rgb

_REFUSALS = (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError)
"""All ways in which transformers says that it cannot load something."""

_REPOSITORY = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


class Saved:
    """A model that transformers saved: a folder, or a name on the hub ("org/name"), fetched and cached by transformers
    at `revision` with `token`.

    Raises InputError for no such folder; every part raises it for what is missing, damaged or out of reach.
    """

    def __init__(self, source: str | Path, revision: str | None = None, token: str | None = None) -> None:
        if not Path(source).is_dir() and (isinstance(source, Path) or not _REPOSITORY.fullmatch(source)):
            raise InputError(
                f"{source}: wanted a folder, or the name of a model on the hub (org/name), got no such folder"
            )
        self.name = str(source)
        self._options: dict[str, Any] = {"revision": revision, "token": token}

    def config(self) -> Any:
        """The configuration."""
        return self._loaded("a configuration of transformers (config.json)", AutoConfig.from_pretrained)

    def processor(self) -> Any:
        """The image processor."""
        return self._loaded(
            "the image processor (preprocessor_config.json), which says how pixels are normalised; "
            "save it there with save_pretrained",
            AutoImageProcessor.from_pretrained,
        )

    def network(self, net_class: Any) -> tuple[PreTrainedModel, Sequence[str]]:
        """A network of this class in float32, and the names of tensors that its file lacks."""
        wanted = (
            "weights that fit the configuration in safetensors (model.safetensors); save it so with save_pretrained"
        )
        choices = {"use_safetensors": True, "attn_implementation": "eager", "dtype": torch.float32}
        net, report = self._loaded(wanted, net_class.from_pretrained, output_loading_info=True, **choices)
        return net, report["missing_keys"]

    def licence(self) -> str:
        """What the front matter of the README says; one out of reach, or one that does not parse, says nothing."""
        lenient = ("missing_entries", "connection_errors", "gated_repo")
        options = self._options | {f"_raise_exceptions_for_{what}": False for what in lenient}
        readme = cached_file(self.name, "README.md", **options)
        try:
            described = huggingface_hub.metadata_load(readme) if readme else None
        except (ValueError, yaml.YAMLError):
            described = None
        return str((described or {}).get("license", "unknown"))

    def _loaded(self, wanted: str, load: Callable[..., Any], **more: Any) -> Any:
        try:
            return load(self.name, **self._options, **more)
        except _REFUSALS as error:
            mend = (
                "check the folder"
                if Path(self.name).is_dir()
                else "no folder has that name either: check it and the connection, and log in (hf auth login, or "
                "token=) if the model is gated"
            )
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise InputError(f"{self.name}: wanted {wanted}; got: {reason} ({mend})") from error


def architecture_of(config: Any) -> str:
    """The class of transformers that was saved, "none" where the configuration does not say."""
    return next(iter(config.architectures or ()), "none")


def check_complete(name: str, net: PreTrainedModel, lacking: Sequence[str]) -> None:
    """Raise InputError if tensors that are needed were not in the file."""
    if lacking:
        raise InputError(
            f"{name}: wanted all weights of {type(net).__name__}, got none for {', '.join(lacking[:3])}"
            f"{' and others' if lacking[3:] else ''}; choose a model that was trained for this"
        )


def class_names(labels: Mapping[int, Any]) -> tuple[str, ...]:
    """Names of the classes by id; those that occur again carry their id."""
    names: list[str] = []
    for class_id in range(len(labels)):
        label = str(labels[class_id])
        names.append(f"{label} ({class_id})" if label in names else label)
    return tuple(names)


def pixel_statistics(processor: Any) -> tuple[Rgb, Rgb]:
    """Mean and standard deviation, for pixels in [0, 1], of what an image processor does to bytes."""
    scale = 255 * (processor.rescale_factor if processor.do_rescale else 1)
    mean = processor.image_mean if processor.do_normalize else 0.0
    std = processor.image_std if processor.do_normalize else 1.0
    return _rgb(mean, scale), _rgb(std, scale)


def _rgb(values: float | Sequence[float], scale: float) -> Rgb:
    red, green, blue = [values] * 3 if isinstance(values, float | int) else values
    return red / scale, green / scale, blue / scale
