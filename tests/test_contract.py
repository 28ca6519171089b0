"""What every model of the zoo keeps, over every kind of backbone: shapes, sizes, batches, gradients, export."""

import copy
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from denselab import zoo
from denselab.backbones.from_timm import TimmBackbone
from denselab.errors import InputError
from denselab.export.graph import ArtifactGraph, to_onnx
from denselab.heads.per_pixel import PerPixelHead
from denselab.losses.pixel import cross_entropy
from denselab.model import DensePredictor
from denselab.pixel_decoders.top_down import TopDownDecoder
from denselab.runtime.session import OnnxRuntimeSession, OpenVinoSession
from denselab.tasks.semantic import decode, logits_at_source
from denselab.types import ValueKind

CLASSES = 5


def shifted_windows() -> DensePredictor:
    """A narrow Swin: window attention, maps that timm gives as NHWC."""
    narrow = {"embed_dim": 16, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 2, 2)}
    backbone = TimmBackbone("swin_tiny_patch4_window7_224", options=narrow)
    decoder = TopDownDecoder(backbone.features, 16)
    return DensePredictor(backbone, decoder, PerPixelHead(decoder.features, CLASSES))


CASES: dict[str, Callable[[], DensePredictor]] = {
    "street": lambda: zoo.street(CLASSES),
    "small": lambda: zoo.small(CLASSES),
    "fpn": lambda: zoo.fpn(CLASSES, "test_resnet"),
    "deeplabv3": lambda: zoo.deeplabv3(CLASSES, "test_resnet", output_stride=8),
    "deeplabv3plus": lambda: zoo.deeplabv3plus(CLASSES, "small"),
    "lraspp": lambda: zoo.lraspp(CLASSES, "small"),
    "segnet": lambda: zoo.segnet(CLASSES, "vgg11_bn"),
    "linknet": lambda: zoo.linknet(CLASSES, "test_resnet"),
    "fcn32s": lambda: zoo.fcn32s(CLASSES, "test_resnet", width=16),
    "fcn16s": lambda: zoo.fcn16s(CLASSES, "test_resnet", width=16),
    "fcn8s": lambda: zoo.fcn8s(CLASSES, "vgg11_bn", width=16),
    "plain transformer": lambda: zoo.small(CLASSES, "test_vit"),
    "shifted windows": shifted_windows,
}
# Window attention cannot be traced at a dynamic size: the artifact resizes to one size inside.
FIXED_SIZE = {"shifted windows": (64, 96)}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """These maps are too small to share: two threads spend three times the CPU."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def model_of(case: str) -> DensePredictor:
    torch.manual_seed(0)
    model = CASES[case]()
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = 1.0
    with torch.no_grad():  # statistics of one batch and centred scores, so that every class gets some pixels
        model.train()(blobs(2, 96, 128))
        scores = model.eval()(blobs(2, 96, 128)).mask_logits
        bias = [p for name, p in model.head.named_parameters() if name.endswith("bias")][-1]
        bias -= scores.mean(dim=(0, 2, 3))
    return model


def blobs(count: int, height: int, width: int) -> torch.Tensor:
    """Smooth coloured noise [count, 3, H, W] in [0, 1]."""
    coarse = torch.rand(count, 3, -(-height // 8), -(-width // 8), generator=torch.Generator().manual_seed(height))
    return torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)


def test_cases_cover_the_zoo() -> None:
    assert CASES.keys() >= zoo.MODELS.keys()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size_hw", [(97, 131), (3, 5), (1, 1)])
@torch.no_grad()
def test_shapes_follow_the_spec(case: str, size_hw: tuple[int, int]) -> None:
    model = model_of(case)
    output = model(blobs(1, *size_hw))
    padded = [-(-side // model.size_multiple) * model.size_multiple for side in size_hw]
    grid = tuple(side // model.spec.mask_stride for side in padded)
    assert output.mask_logits.shape == (1, CLASSES, *grid)
    assert output.mask_logits.isfinite().all()
    assert (model.spec.num_queries, model.spec.value_dim, model.spec.value_kind) == (
        CLASSES,
        CLASSES,
        ValueKind.IDENTITY,
    )
    assert torch.equal(output.values, torch.eye(CLASSES)[None])
    assert decode(output, model.spec, size_hw).shape == (1, *size_hw)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_batch_gives_what_its_images_give(case: str) -> None:
    model = model_of(case)
    images = blobs(3, 40, 72)
    together = model(images).mask_logits
    alone = torch.cat([model(image[None]).mask_logits for image in images])
    assert together.std(dim=0).max() > 1e-4  # the images do differ
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_gets_a_finite_gradient(case: str) -> None:
    model = copy.deepcopy(model_of(case)).train()
    target = torch.randint(0, CLASSES, (2, 61, 90), generator=torch.Generator().manual_seed(0))
    scores = logits_at_source(model(blobs(2, 61, 90)), model.spec, (61, 90))
    cross_entropy(scores, target).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []


@pytest.mark.parametrize("case", CASES)
def test_export_equals_eager(case: str, tmp_path: Path) -> None:
    graph = ArtifactGraph(model_of(case), FIXED_SIZE.get(case)).eval()
    artifact = tmp_path / "model.onnx"
    artifact.write_bytes(to_onnx(graph).SerializeToString())
    engines = (OnnxRuntimeSession(artifact, threads=1), OpenVinoSession(artifact, threads=1, precision="f32"))
    seen: set[int] = set()
    for height, width in ((97, 131), (160, 96), (1, 1)):
        image = (blobs(1, height, width) * 255).byte().permute(0, 2, 3, 1).contiguous()
        with torch.no_grad():
            wanted = graph(image)[0].numpy()
        seen |= set(np.unique(wanted).tolist())
        for engine in engines:
            got = engine.run(image[0].numpy())
            assert got.shape == (height, width)
            assert (got == wanted).mean() >= 0.999
    assert len(seen) >= 3


def test_a_model_that_traces_at_one_size_only_is_refused() -> None:
    with pytest.raises(InputError, match="--network-size"):
        to_onnx(ArtifactGraph(shifted_windows()))
