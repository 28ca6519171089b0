"""An image classifier that transformers saved: its network from pixels to logits, and how photos become its pixels."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from denselab import _vision as _vision  # before transformers, which imports torchvision

# isort: split
from transformers import AutoModelForImageClassification

from denselab.errors import InputError
from denselab.hub.parts import Rgb
from denselab.hub.saved import Saved, architecture_of, check_complete, class_names, pixel_statistics

_PROBE_SHAPES = ((48, 80, 3), (80, 48, 3))
_REFUSALS = (AttributeError, KeyError, TypeError, ValueError, RuntimeError)
"""Ways in which image processors and networks say that they do not take photos or pixels."""


@dataclass(frozen=True, eq=False)
class HubClassifier:
    """A pretrained classifier in evaluation mode on the CPU.

    network: pixels [B, 3, H, W] to logits [B, classes]. seen: a photo [H, W, 3] of any size, resized and cropped as
    the saved image processor does it. mean, std: that `network` takes photos normalised with, for pixels in [0, 1].
    preparation: the settings of the image processor. source: folder or name on the hub. names: of the classes, None
    where transformers only numbered them. licence: as the hub names it.
    """

    network: nn.Module
    seen: Callable[[NDArray[Any]], UInt8[Tensor, "3 H W"]]
    mean: Rgb
    std: Rgb
    hw: tuple[int, int]
    preparation: dict[str, Any]
    source: str
    classes: int
    names: tuple[str, ...] | None
    licence: str


class Logits(nn.Module):
    """The logits of a network of transformers. bgr: it was trained on blue, green, red."""

    def __init__(self, net: nn.Module, bgr: bool) -> None:
        super().__init__()
        self.net = net
        self.bgr = bgr

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B K"]:
        return self.net(pixels.flip(1) if self.bgr else pixels).logits


def is_image_classifier(source: str | Path) -> bool:
    """Whether transformers saved a network with a head of classes of whole images.

    Raises InputError where there is no configuration.
    """
    return "ForImageClassification" in architecture_of(Saved(source).config())


def image_classifier(source: str | Path) -> HubClassifier:
    """Load any image classifier of transformers, from a folder or by its name on the hub, weights in safetensors.

    Raises InputError: see `Saved`; weights that are missing, fewer than two classes, an image processor that does
    more than resizing, cropping, rescaling and normalising, or whose photos are of several sizes.
    """
    saved = Saved(source)
    processor = saved.processor()
    net, missing = saved.network(AutoModelForImageClassification)
    check_complete(saved.name, net, sorted({*missing} & {name for name, _ in net.named_parameters()}))
    config: Any = net.config
    classes = int(config.num_labels)
    if classes < 2:
        raise InputError(f"{saved.name}: wanted a classifier of two classes or more, got {classes}; give another model")
    bgr = bool(getattr(processor, "do_flip_channel_order", False))
    no_more = {"do_rescale": False, "do_normalize": False, **({"do_flip_channel_order": False} if bgr else {})}

    def seen(photo: NDArray[Any]) -> Tensor:
        return processor(Image.fromarray(photo), return_tensors="pt", **no_more)["pixel_values"][0].to(torch.uint8)

    network = Logits(net, bgr).eval()
    mean, std = _checked_statistics(saved.name, processor, seen, bgr)
    hw = _checked_hw(saved.name, network, seen, classes)
    names = class_names(config.id2label)
    numbered = names == tuple(f"LABEL_{class_id}" for class_id in range(classes))
    return HubClassifier(
        network,
        seen,
        mean,
        std,
        hw,
        processor.to_dict(),
        saved.name,
        classes,
        None if numbered else names,
        saved.licence(),
    )


def _checked_statistics(
    name: str, processor: Any, seen: Callable[[NDArray[Any]], Tensor], bgr: bool
) -> tuple[Rgb, Rgb]:
    """Mean and standard deviation, for RGB, if with them the processor's own pixels come of photos that were seen."""
    wanted = "an image processor that resizes, crops, rescales and normalises, and no more"
    kind = type(processor).__name__
    try:
        mean, std = pixel_statistics(processor)
        scale, shift = (torch.tensor(each).view(3, 1, 1) for each in (std, mean))
        apart = 0.0
        for photo in _probes():
            theirs = processor(Image.fromarray(photo), return_tensors="pt")["pixel_values"][0]
            ours = (seen(photo).float() / 255 - shift) / scale
            apart = max(apart, float((ours - (theirs.flip(0) if bgr else theirs)).abs().max()))
    except _REFUSALS as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(
            f"{name}: wanted {wanted}, got {kind}, with which that fails: {reason}; give another"
        ) from error
    if not apart < 1e-3:
        raise InputError(
            f"{name}: wanted {wanted}, got {kind}, whose pixels are off by {apart:.2g}; give another model"
        )
    return mean, std


def _checked_hw(name: str, network: nn.Module, seen: Callable[[NDArray[Any]], Tensor], classes: int) -> tuple[int, int]:
    """Height and width of all photos that are seen, if the network takes them."""
    probes = [seen(photo) for photo in _probes()]
    sizes = {(each.shape[1], each.shape[2]) for each in probes}
    if len(sizes) > 1:
        shown = " and ".join(f"{width}x{height}" for height, width in sorted(sizes))
        raise InputError(
            f"{name}: wanted an image processor whose photos are all of one size, got {shown}; "
            "give it a height and a width, or a crop, in preprocessor_config.json"
        )
    try:
        with torch.no_grad():
            logits = network(probes[0][None].float())
    except _REFUSALS as error:
        height, width = probes[0].shape[1:]
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(
            f"{name}: wanted a network that takes the photos of its image processor, {width}x{height} px; got: "
            f"{reason}; mend preprocessor_config.json"
        ) from error
    if logits.shape != (1, classes):
        raise InputError(f"{name}: wanted logits [1, {classes}], got {list(logits.shape)}; give another model")
    return next(iter(sizes))


def _probes() -> list[NDArray[np.uint8]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, shape, dtype=np.uint8) for shape in _PROBE_SHAPES]
