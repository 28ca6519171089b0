"""Random views of a training image and its labels, from torchvision's transforms.v2; labels are never blended."""

from typing import Any

import torch

from denselab import _vision as _vision  # makes torchvision importable beside a CPU torch

# isort: split
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tf


class RandomZoomCrop(v2.Transform):
    """A crop of fixed size from an image scaled at random, its zoom log-uniform in `zoom`.

    The window is cut first and scaled after, which costs a crop and not an image. What lies outside the image is
    the mean colour of the window in images and `void` in masks. Images are scaled bilinearly with antialiasing,
    masks by nearest neighbour with pixel centres aligned.
    """

    def __init__(self, crop_hw: tuple[int, int], zoom: tuple[float, float], void: int) -> None:
        super().__init__()
        self.crop_hw, self.zoom, self.void = crop_hw, zoom, void

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """The window in source px, clipped to the image, and how far it hangs over."""
        height, width = v2.query_size(flat_inputs)
        low, high = torch.tensor(self.zoom).log()
        zoom = float((low + torch.rand(()) * (high - low)).exp())
        window_h, window_w = (max(1, round(side / zoom)) for side in self.crop_hw)
        top, left = _place(height, window_h), _place(width, window_w)
        y0, x0, y1, x1 = max(top, 0), max(left, 0), min(top + window_h, height), min(left + window_w, width)
        overhang = [x0 - left, y0 - top, left + window_w - x1, top + window_h - y1]
        return {"window": (y0, x0, y1 - y0, x1 - x0), "overhang": overhang}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Cut, pad, scale."""
        is_mask = isinstance(inpt, tv_tensors.Mask)
        view = tf.crop(inpt, *params["window"])
        if any(params["overhang"]):
            fill = self.void if is_mask else view.mean(dim=(-2, -1), dtype=torch.float32).tolist()
            view = tf.pad(view, params["overhang"], fill=fill)
        if not is_mask:
            return tf.resize(view, list(self.crop_hw), v2.InterpolationMode.BILINEAR, antialias=True)
        # resize() scales masks with NEAREST, which shifts them by up to half a source px against the image
        plain = view.as_subclass(torch.Tensor)[None]
        return tv_tensors.Mask(tf.resize_image(plain, list(self.crop_hw), v2.InterpolationMode.NEAREST_EXACT)[0])


def _place(size: int, window: int) -> int:
    """A random start of a window inside [0, size), or around it where the window is larger."""
    low, high = min(0, size - window), max(0, size - window)
    return int(torch.randint(low, high + 1, ()))


def training_views(
    crop_hw: tuple[int, int], zoom: tuple[float, float], flip: bool, jitter: float, void: int
) -> v2.Compose:
    """Zoom and crop, mirror, change brightness, contrast and saturation.

    Takes and returns (tv_tensors.Image uint8 [3, H, W], tv_tensors.Mask [H, W]); draws from torch's generator.
    """
    steps: list[v2.Transform] = [RandomZoomCrop(crop_hw, zoom, void)]
    if flip:
        steps.append(v2.RandomHorizontalFlip())
    if jitter:
        steps.append(v2.ColorJitter(jitter, jitter, jitter))
    return v2.Compose(steps)
