"""Random views of a training image and its truths, moved together; labels are never blended.

Images are scaled bilinearly with antialiasing. Class ids, segment ids, depth and normals are taken from the nearest
pixel, pixel centres aligned: no value arises that was not measured. Depth stays in metres, so an enlarged image shows
things as near as before though they look nearer; train depth with zoom 1, or with the canonical camera of your choice.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from denselab import _vision as _vision  # makes torchvision importable beside a CPU torch
from denselab.classes import VOID
from denselab.data.sample import Sample

# isort: split
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tf

View = Callable[[Sample], Sample]


@dataclass(frozen=True)
class RandomZoomCrop:
    """A crop of fixed size from an image scaled at random, its zoom log-uniform in `zoom`.

    The window is cut first and scaled after, which costs a crop and not an image. What lies outside the image is
    the mean colour of the window in images and `void` in class ids. With zoom (0.1, 2.0) this is large-scale jitter
    (Ghiasi et al. 2021, section 3), but for the distribution of the zoom, which is uniform there.
    """

    crop_hw: tuple[int, int]
    zoom: tuple[float, float]
    void: int = VOID

    def __call__(self, sample: Sample) -> Sample:
        """Cut, pad, scale."""
        height, width = sample.hw
        low, high = torch.tensor(self.zoom).log()
        zoom = float((low + torch.rand(()) * (high - low)).exp())
        window_h, window_w = (max(1, round(side / zoom)) for side in self.crop_hw)
        top, left = _place(height, window_h), _place(width, window_w)
        y0, x0, y1, x1 = max(top, 0), max(left, 0), min(top + window_h, height), min(left + window_w, width)
        overhang = [x0 - left, y0 - top, left + window_w - x1, top + window_h - y1]

        def cut(plane: Tensor) -> Tensor:
            return plane[..., y0:y1, x0:x1]

        def move(plane: Tensor, fill: float) -> Tensor:
            return nearest(_padded(cut(plane), overhang, [fill]), self.crop_hw)

        view = cut(sample.image)
        view = _padded(view, overhang, view.mean(dim=(-2, -1), dtype=torch.float32).tolist())
        return sample.moved(_scaled(view, self.crop_hw), move, self.void)


@dataclass(frozen=True)
class LongSide:
    """The whole image, scaled so that its longer side has `long_side_px`."""

    long_side_px: int

    def __call__(self, sample: Sample) -> Sample:
        """Scale."""
        zoom = self.long_side_px / max(sample.hw)
        height, width = (max(1, round(side * zoom)) for side in sample.hw)
        return sample.moved(
            _scaled(sample.image, (height, width)), lambda plane, _fill: nearest(plane, (height, width))
        )


@dataclass(frozen=True)
class RandomFlip:
    """Mirrors left and right in half of the views; normals then point to the other side."""

    def __call__(self, sample: Sample) -> Sample:
        """Mirror or not."""
        if torch.rand(()) >= 0.5:
            return sample
        flipped = sample.moved(sample.image.flip(-1), lambda plane, _fill: plane.flip(-1))
        return _with_turned_normals(flipped, [[-1, 0, 0], [0, 1, 0], [0, 0, 1]])


@dataclass(frozen=True)
class RandomQuarterTurn:
    """Turns by 0, 90, 180 or 270 degrees: for pictures without an up, such as those of microscopes."""

    def __call__(self, sample: Sample) -> Sample:
        """Turn."""
        turns = int(torch.randint(4, ()))
        turned = sample.moved(
            torch.rot90(sample.image, turns, (-2, -1)), lambda plane, _fill: torch.rot90(plane, turns, (-2, -1))
        )
        # A quarter turn against the clock takes right (+x) to up (-y) and down (+y) to right (+x).
        cos, sin = ((1, 0), (0, 1), (-1, 0), (0, -1))[turns]
        return _with_turned_normals(turned, [[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])


@dataclass(frozen=True)
class ColourJitter:
    """Random change of brightness, contrast and saturation by up to `strength`."""

    strength: float

    def __call__(self, sample: Sample) -> Sample:
        """Change the colours of the image."""
        return replace(sample, image=v2.ColorJitter(self.strength, self.strength, self.strength)(sample.image))


@dataclass(frozen=True)
class Chain:
    """One view after the other; they draw from torch's generator."""

    views: tuple[View, ...]

    def __call__(self, sample: Sample) -> Sample:
        """Apply all."""
        for view in self.views:
            sample = view(sample)
        return sample


def training_views(
    crop_hw: tuple[int, int],
    zoom: tuple[float, float],
    flip: bool,
    jitter: float,
    void: int = VOID,
    quarter_turns: bool = False,
) -> Chain:
    """Zoom and crop, mirror, turn, change brightness, contrast and saturation. Draws from torch's generator."""
    views: list[View] = [RandomZoomCrop(crop_hw, zoom, void)]
    if flip:
        views.append(RandomFlip())
    if quarter_turns:
        views.append(RandomQuarterTurn())
    if jitter:
        views.append(ColourJitter(jitter))
    return Chain(tuple(views))


def nearest(plane: Tensor, hw: tuple[int, int]) -> Tensor:
    """Scale [..., H, W] to hw by the nearest pixel, centres aligned; any type, exact.

    torch's own NEAREST_EXACT takes no 32-bit integers, and NEAREST shifts by up to half a source px.
    """
    rows, columns = (
        (2 * torch.arange(new) + 1) * old // (2 * new) for new, old in zip(hw, plane.shape[-2:], strict=True)
    )
    return plane[..., rows[:, None], columns]


def _with_turned_normals(sample: Sample, rotation: list[list[int]]) -> Sample:
    if sample.normals is None:
        return sample
    turned = torch.einsum("ij,jhw->ihw", torch.tensor(rotation, dtype=sample.normals.dtype), sample.normals)
    return replace(sample, normals=turned)


def _padded(plane: Tensor, overhang: list[int], fill: list[float]) -> Tensor:
    """[C, H, W] or [H, W] with `overhang` px more left, top, right, bottom; fill: for all, or per channel."""
    if not any(overhang):
        return plane
    left, top, right, bottom = overhang
    height, width = plane.shape[-2:]
    shape = (*plane.shape[:-2], top + height + bottom, left + width + right)
    values = torch.tensor(fill).to(plane.dtype)
    padded = (values if plane.ndim == 2 else values[:, None, None]).expand(shape).clone()
    padded[..., top : top + height, left : left + width] = plane
    return padded


def _scaled(image: Tensor, hw: tuple[int, int]) -> Tensor:
    return tf.resize(image, list(hw), v2.InterpolationMode.BILINEAR, antialias=True)


def _place(size: int, window: int) -> int:
    """A random start of a window inside [0, size), or around it where the window is larger."""
    low, high = min(0, size - window), max(0, size - window)
    return int(torch.randint(low, high + 1, ()))
