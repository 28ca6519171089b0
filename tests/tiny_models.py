"""A tiny network with clear opinions and no training, and photos of no data set, for tests of the export."""

import numpy as np
import torch
from numpy.typing import NDArray

from denselab.backbones.small import SmallBackbone
from denselab.classes import Classes
from denselab.export.examples import Examples
from denselab.export.precision import Precision
from denselab.heads.per_pixel import PerPixelHead
from denselab.model import DensePredictor
from denselab.pixel_decoders.top_down import TopDownDecoder
from denselab.runtime.artifact import ArtifactInfo
from denselab.tasks.task import make_task

CLASSES = Classes.named(("left", "middle", "right"))
TASKS = (make_task("semantic", CLASSES),)


def photo(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Smooth coloured blobs: coarse noise enlarged."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, height // 24 + 2, width // 24 + 2, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return (smooth[0].permute(1, 2, 0) * 255).byte().numpy()


PHOTOS = Examples("blobs", tuple(photo(97, 129, seed) for seed in range(3)))


def adapt(model: DensePredictor, photos: Examples = PHOTOS) -> DensePredictor:
    """Fit batch norms to the photos, and classifier biases so that all classes are about as frequent."""
    pixels = torch.stack([torch.tensor(image).permute(2, 0, 1) / 255 for image in photos.images])
    with torch.no_grad():
        model.train()
        for _ in range(20):
            model(pixels)
        model.eval()
        model.head.classify.bias -= model(pixels).mask_logits.mean((0, 2, 3))  # type: ignore[union-attr,operator]
    return model


def tiny_model() -> DensePredictor:
    """The small backbone at its default widths, three classes."""
    torch.manual_seed(0)
    backbone = SmallBackbone()
    decoder = TopDownDecoder(backbone.features, width=32)
    return adapt(DensePredictor(backbone, decoder, PerPixelHead(decoder.features, len(CLASSES))))


def tiny_info(precision: Precision = Precision.FP32) -> ArtifactInfo:
    return ArtifactInfo(("semantic",), "tiny", CLASSES, 255, 16, (97, 129), precision, "Apache-2.0", None, {}, "0.1.0")
