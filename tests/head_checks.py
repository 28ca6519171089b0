"""What every query head keeps, checked on a whole tiny model: sizes, batches, gradients, export."""

import copy
import itertools
import warnings

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from denselab.model import DensePredictor, round_up
from denselab.types import FeatureSpec, HeadSpec, QueryOutput


class TinyPyramid(nn.Module):
    """A backbone of one convolution per map, at strides 4, 8, and so on."""

    mean = (0.5, 0.5, 0.5)
    std = (0.25, 0.25, 0.25)

    def __init__(self, channels: tuple[int, ...] = (8, 8, 12, 16)) -> None:
        super().__init__()
        self.features = tuple(FeatureSpec(c, 4 * 2**i) for i, c in enumerate(channels))
        self.size_multiple = self.features[-1].stride
        self.first = nn.Conv2d(3, channels[0], 4, 4)
        self.rest = nn.ModuleList(nn.Conv2d(c, d, 2, 2) for c, d in itertools.pairwise(channels))

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        maps = [F.gelu(self.first(pixels))]
        for layer in self.rest:
            maps.append(F.gelu(layer(maps[-1])))
        return tuple(maps)


def photos(count: int, height: int, width: int) -> Tensor:
    """Smooth coloured noise [count, 3, H, W] in [0, 1]."""
    coarse = torch.rand(count, 3, -(-height // 8), -(-width // 8), generator=torch.Generator().manual_seed(height))
    return F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)


def check_output(output: QueryOutput, spec: HeadSpec, batch: int, padded_hw: tuple[int, int]) -> None:
    """Shapes are what the spec says, and numbers are finite."""
    grid = tuple(side // spec.mask_stride for side in padded_hw)
    assert output.mask_logits.shape == (batch, spec.num_queries, *grid)
    assert output.values.shape == (batch, spec.num_queries, spec.value_dim)
    assert output.mask_logits.isfinite().all()
    assert output.values.isfinite().all()


@torch.no_grad()
def check_shapes(model: DensePredictor) -> None:
    """At odd sizes, in evaluation without auxiliary outputs and in training with those that the spec announces."""
    for size_hw in ((37, 70), (1, 1)):
        padded_hw = tuple(round_up(side, model.size_multiple) for side in size_hw)
        output = model.eval()(photos(1, *size_hw))
        check_output(output, model.spec, 1, padded_hw)
        assert output.aux == ()
    output = copy.deepcopy(model).train()(photos(2, 70, 37))
    padded_hw = tuple(round_up(side, model.size_multiple) for side in (70, 37))
    for each, spec in zip((output, *output.aux), (model.spec, *model.spec.aux), strict=True):
        check_output(each, spec, 2, padded_hw)


@torch.no_grad()
def check_batch(model: DensePredictor) -> None:
    """A batch gives what its images give one by one."""
    images = photos(3, 40, 72)
    together = model.eval()(images)
    assert together.mask_logits.std(dim=0).max() > 1e-4  # the images do differ
    for index, image in enumerate(images):
        alone = model(image[None])
        torch.testing.assert_close(together.mask_logits[index], alone.mask_logits[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(together.values[index], alone.values[0], atol=1e-4, rtol=1e-4)


def check_gradients(model: DensePredictor) -> None:
    """Every parameter gets a finite gradient from the outputs of training."""
    model = copy.deepcopy(model).train()
    output = model(photos(2, 61, 90))
    sum((each.mask_logits**2).mean() + (each.values**2).mean() for each in (output, *output.aux)).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []


class _Tensors(nn.Module):
    def __init__(self, model: DensePredictor) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        output = self.model(pixels)
        return output.mask_logits, output.values


@torch.no_grad()
def check_export(model: DensePredictor, atol: float = 1e-4) -> None:
    """One ONNX graph gives at several sizes what the model gives."""
    model = model.eval()
    size = {2: torch.export.Dim("height", min=1), 3: torch.export.Dim("width", min=1)}
    step = model.size_multiple
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own deprecations
        program = torch.onnx.export(
            _Tensors(model),
            (photos(1, 2 * step + 1, 3 * step + 1),),
            dynamo=True,
            dynamic_shapes={"pixels": size},
            opset_version=20,
            verbose=False,
        )
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for size_hw in ((2 * step + 1, 3 * step + 1), (5 * step - 3, step), (1, 1)):
        pixels = photos(1, *size_hw)
        wanted = model(pixels)
        mask_logits, values = session.run(None, {"pixels": pixels.numpy()})
        np.testing.assert_allclose(mask_logits, wanted.mask_logits.numpy(), atol=atol, rtol=1e-4)
        np.testing.assert_allclose(values, wanted.values.numpy(), atol=atol, rtol=1e-4)
