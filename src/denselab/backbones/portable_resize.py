"""Antialiased bicubic resizing in operations that every engine runs.

timm fits the position embeddings of a transformer to the image with F.interpolate(mode="bicubic", antialias=True).
As an ONNX Resize node OpenVINO computes that without the antialiasing, and labels change; as two matrix products
every engine computes it right.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode


def cubic_matrix(source: int, target: int) -> Float[Tensor, "target source"]:
    """Row i holds the weights of the source samples in target sample i.

    Keys 1981, eq. 4 (a = -1/2), stretched by the scale where it shrinks, as PIL and torch do.
    """
    row = torch.arange(target)
    scale = source / (row.max() + 1)  # a tensor, so that a symbolic target stays symbolic
    centre = (row + 0.5) * scale
    x = ((torch.arange(source) + 0.5 - centre[:, None]) / scale.clamp(min=1)).abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
    return weights / weights.sum(dim=1, keepdim=True)


def resize_cubic(maps: Float[Tensor, "B C h w"], size_hw: tuple[int, int]) -> Float[Tensor, "B C H W"]:
    """F.interpolate(maps, size_hw, mode="bicubic", antialias=True) as matrix products."""
    rows = cubic_matrix(maps.shape[-2], size_hw[0]).to(maps)
    columns = cubic_matrix(maps.shape[-1], size_hw[1]).to(maps)
    return rows @ maps @ columns.T


class PortableResize(TorchFunctionMode):
    """While active, antialiased bicubic F.interpolate is resize_cubic."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if func is F.interpolate and given.get("mode") == "bicubic" and given.get("antialias"):
            return resize_cubic(args[0], given["size"])
        return func(*args, **given)
