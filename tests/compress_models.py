"""Small networks for tests of compression: one with all that quantizers tell apart, and a segmenter."""

from functools import cache

import torch
from torch import Tensor, nn

from denselab.compress.graph import Axis, Graph, capture
from denselab.heads.per_pixel import PerPixelHead
from denselab.model import DensePredictor
from denselab.pixel_decoders.top_down import TopDownDecoder
from denselab.types import FeatureSpec

HEADS = 2
SIDE_PX = 16
WIDTH = 8
CLASSES = 5


class SmallNetwork(nn.Module):
    """A convolution with a batch norm, one attention block whose first norm has four readers, and a feature tap."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 4, stride=4)
        self.batch_norm = nn.BatchNorm2d(WIDTH)
        self.norm1 = nn.LayerNorm(WIDTH)
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.gate = nn.Conv2d(WIDTH, WIDTH, 1, bias=False)
        self.project = nn.Linear(WIDTH, WIDTH)
        self.norm2 = nn.LayerNorm(WIDTH)
        self.widen, self.narrow = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.batch_norm(self.stem(pixels)).relu()
        x = maps.flatten(2).transpose(1, 2)
        normed = self.norm1(x)
        query, key, value = (
            layer(normed).unflatten(2, (HEADS, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        gate = self.gate(normed.transpose(1, 2).unflatten(2, maps.shape[2:])).flatten(2).transpose(1, 2)
        attended = ((query @ key.transpose(2, 3)) * (WIDTH // HEADS) ** -0.5).softmax(3) @ value
        x = x + self.project(attended.transpose(1, 2).flatten(2) * gate.sigmoid())
        tap = self.norm2(x)
        x = x + self.narrow(nn.functional.gelu(self.widen(tap)))
        return self.head(x.mean(1)), tap


class Strided(nn.Module):
    """A backbone of two convolutions."""

    mean, std, size_multiple = (0.5,) * 3, (0.25,) * 3, 8

    def __init__(self, width: int) -> None:
        super().__init__()
        self.features = (FeatureSpec(width, 4), FeatureSpec(width, 8))
        self.fine, self.coarse = nn.Conv2d(3, width, 4, stride=4), nn.Conv2d(width, width, 2, stride=2)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        fine = self.fine(pixels)
        return fine, self.coarse(fine)


def segmenter(classes: int, width: int = 8) -> DensePredictor:
    """A small model of ours, which pads images and resizes maps."""
    backbone = Strided(width)
    decoder = TopDownDecoder(backbone.features, width)
    return DensePredictor(backbone, decoder, PerPixelHead(decoder.features, classes))


def small_network(dtype: torch.dtype = torch.float32, seed: int = 0) -> SmallNetwork:
    """With norms whose channels differ, as after training."""
    generator = torch.Generator().manual_seed(seed)
    model = SmallNetwork().to(dtype).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn(value.shape, generator=generator) * (0.5 if value.ndim > 1 else 1))
        for norm in (model.norm1, model.norm2):
            norm.weight.mul_(torch.logspace(-1, 1, WIDTH))
        model.batch_norm.running_mean.copy_(torch.randn(WIDTH, generator=generator))
        model.batch_norm.running_var.copy_(torch.rand(WIDTH, generator=generator) + 0.5)
    return model


def captured(model: nn.Module, dtype: torch.dtype = torch.float32, side_px: int = SIDE_PX) -> Graph:
    """Free in the batch alone."""
    return capture(model, torch.rand(2, 3, side_px, side_px, dtype=dtype), free=frozenset({Axis.BATCH}))


@cache
def small_graph(dtype: torch.dtype = torch.float32) -> tuple[SmallNetwork, Graph]:
    """The small network and its graph, which nobody changes; captured once for all tests."""
    model = small_network(dtype)
    return model, captured(model, dtype)


def images(count: int, seed: int = 0, side_px: int = SIDE_PX, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(count, 3, side_px, side_px, generator=torch.Generator().manual_seed(seed), dtype=dtype)
