"""Any timm model as a backbone: a pyramid of feature maps, or the maps of a plain vision transformer."""

import difflib
import math
import re
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from denselab import _vision as _vision  # before timm, which imports torchvision

# isort: split
import timm
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from denselab.backbones.portable_resize import PortableResize
from denselab.errors import InputError
from denselab.types import FeatureSpec

# Asked of every model, and dropped where it does not know the argument.
_OPTIONAL = ("dynamic_img_size", "strict_img_size", "output_stride")
# timm's models refuse an input size in all these ways.
_REFUSALS = (AssertionError, IndexError, RuntimeError, TypeError, ValueError)


class OutputStrideError(InputError):
    """The backbone cannot be dilated to the output stride asked for."""


class TimmBackbone(nn.Module):
    """Feature maps [B, C, H / stride, W / stride] of a timm model, finest first, for any input size.

    name: a timm model ("resnet50", "vit_small_patch14_dinov2.lvd142m", "hf-hub:...").
    pretrained: load the weights that timm names for it (fetched from the Hugging Face Hub and cached by timm).
    finest_stride: maps finer than this are left out.
    output_stride: stride of the coarsest map; later stages are dilated instead (Chen et al. 2017, section 3.1).
    out_indices: which of timm's maps, instead of all; a plain transformer (`plain`: all its maps have one stride)
        gives its last block's map unless told otherwise.
    options: more arguments of timm.create_model (drop_path_rate, pretrained_cfg_overlay, ...).

    Channels, strides, mean and std come from timm. Strides are powers of two: an image for a network with 14-px
    patches is resized by 14/16, so that a patch covers 16 px. Most networks run at any size that divides by
    `size_multiple`; for the few that run only at the size they were made for, `network_hw`, the image is resized
    to it and the maps are resized back.

    Raises InputError: unknown model, no or unreachable weights, no feature maps, output stride not supported.
    """

    def __init__(
        self,
        name: str,
        pretrained: bool = False,
        finest_stride: int = 4,
        output_stride: int | None = None,
        out_indices: tuple[int, ...] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        wanted = {"output_stride": output_stride, "out_indices": out_indices, **(options or {})}
        self.net: Any = _create(name, pretrained, {k: v for k, v in wanted.items() if v is not None})
        info, cfg = self.net.feature_info, self.net.pretrained_cfg
        reductions: list[int] = info.reduction()
        if output_stride is not None and reductions[-1] > output_stride:
            raise OutputStrideError(_no_output_stride(name, output_stride))
        strides = [2 ** round(math.log2(reduction)) for reduction in reductions]
        self.plain = len(set(strides)) == 1
        self.kept = [i for i, stride in enumerate(strides) if stride >= finest_stride]
        if self.plain and out_indices is None:
            self.kept = self.kept[-1:]
        channels: list[int] = info.channels()
        self.features = tuple(FeatureSpec(channels[i], strides[i]) for i in self.kept)
        self.mean: tuple[float, float, float] = tuple(cfg["mean"])
        self.std: tuple[float, float, float] = tuple(cfg["std"])
        self.patch_px = round(reductions[-1])
        self.channels_last = str(getattr(self.net, "output_fmt", "")).endswith("NHWC")
        self.network_hw: tuple[int, int] | None = None
        self.size_multiple = strides[-1]
        self.resamples = False
        self._find_sizes(name, tuple(cfg["input_size"][1:]))

    def _find_sizes(self, name: str, made_for_hw: tuple[int, int]) -> None:
        """Try what the network runs at: multiples of its stride, or of more, or only the size it was made for."""
        stride = self.size_multiple
        multiples = [stride, 4 * stride, *(side for side in made_for_hw[:1] if side % stride == 0)]
        for multiple, network_hw in [*((multiple, None) for multiple in multiples), (stride, made_for_hw)]:
            self.size_multiple, self.network_hw = multiple, network_hw
            shapes = [self._shapes_at(multiple, 2 * multiple), self._shapes_at(3 * multiple, multiple)]
            if None not in shapes:
                announced = [(f.channels, multiple // f.stride, 2 * multiple // f.stride) for f in self.features]
                self.resamples = shapes[0] != announced
                return
        raise InputError(f"backbone: the feature maps of timm's {name!r} cannot be used here; choose another model")

    @torch.no_grad()
    def _shapes_at(self, height_px: int, width_px: int) -> list[tuple[int, ...]] | None:
        """Shapes [C, h, w] of the maps, or None where the network refuses the size or announces other channels."""
        self.eval()
        try:
            shapes = [tuple(m.shape[1:]) for m in self(torch.zeros(1, 3, height_px, width_px))]
        except _REFUSALS:
            return None
        finally:
            self.train()
        return shapes if [s[0] for s in shapes] == [f.channels for f in self.features] else None

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> tuple[Tensor, ...]:
        height, width = pixels.shape[-2:]
        coarsest = self.features[-1].stride
        if self.network_hw is not None:
            pixels = _resize(pixels, self.network_hw)
        elif self.patch_px != coarsest:
            pixels = _resize(pixels, (height // coarsest * self.patch_px, width // coarsest * self.patch_px))
        with PortableResize() if torch.compiler.is_exporting() else nullcontext():
            maps = self.net(pixels)
        kept = [maps[i].movedim(-1, 1) if self.channels_last else maps[i] for i in self.kept]
        if self.resamples:
            sizes = [(height // f.stride, width // f.stride) for f in self.features]
            kept = [_resize(m, size) for m, size in zip(kept, sizes, strict=True)]
        return tuple(kept)


def _resize(maps: Float[Tensor, "B C h w"], size_hw: tuple[int, int]) -> Tensor:
    return F.interpolate(maps, size=size_hw, mode="bilinear", align_corners=False)


def _create(name: str, pretrained: bool, options: dict[str, Any]) -> Any:
    """timm's feature extractor, told to take any input size where it has an argument for that."""
    if ":" not in name and not timm.is_model(name.partition(".")[0]):
        close = difflib.get_close_matches(name, timm.list_models(), 3)
        hint = f"did you mean {' or '.join(close)}?" if close else "timm.list_models() has the names"
        raise InputError(f"backbone: wanted the name of a timm model, got {name!r}; {hint}")
    options = {"dynamic_img_size": True, **options}
    while True:
        try:
            return timm.create_model(name, pretrained, features_only=True, **options)
        except TypeError as error:
            refused = re.search(r"unexpected keyword argument(?:\(s\): \[)? ?'(\w+)'", str(error))
            if refused is not None and refused[1] == "features_only":
                raise InputError(_no_features(name)) from error
            if refused is None or refused[1] not in _OPTIONAL or refused[1] not in options:
                raise
            del options[refused[1]]
            if refused[1] == "dynamic_img_size":
                options["strict_img_size"] = False
        except AssertionError as error:
            if "output_stride" in options:
                raise OutputStrideError(_no_output_stride(name, options["output_stride"])) from error
            raise
        except (AttributeError, RuntimeError) as error:
            if "pretrained" in str(error).lower():
                raise InputError(f"backbone: {error} (timm's model {name!r})") from error
            raise InputError(_no_features(name)) from error
        except OSError as error:
            hint = "connect to the internet once, or leave pretrained out"
            raise InputError(f"backbone: the weights of {name!r} are neither cached nor in reach; {hint}") from error


def _no_features(name: str) -> str:
    return f"backbone: wanted a timm model that gives feature maps, {name!r} gives none; choose another, say resnet50"


def _no_output_stride(name: str, output_stride: int) -> str:
    return f"output_stride: {name!r} cannot be dilated to {output_stride}; leave it out, or choose a ResNet"
