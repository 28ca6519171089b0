"""What every model of the zoo keeps, over every kind of backbone: shapes, sizes, batches, gradients, export."""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch

from denselab import zoo
from denselab.backbones.from_timm import TimmBackbone
from denselab.classes import Classes
from denselab.errors import InputError
from denselab.export.graph import ArtifactGraph, to_onnx
from denselab.export.parity import agreement
from denselab.heads.centre_offset import CentreOffsetHead
from denselab.heads.per_pixel import PerPixelHead
from denselab.heads.values import ClassValues, DepthValues, NormalValues
from denselab.model import DensePredictor, Model, head_outputs
from denselab.pixel_decoders.kmax import PUBLISHED_STAGES
from denselab.pixel_decoders.top_down import TopDownDecoder
from denselab.runtime.answers import outputs_of
from denselab.runtime.session import OnnxRuntimeSession, OpenVinoSession
from denselab.tasks.grouping import GroupingRules
from denselab.tasks.panoptic import MergeRules
from denselab.tasks.task import PanopticTask, Task, make_task
from denselab.types import SegmentTargets, Targets, ValueKind

CLASSES = 5
NAMED = Classes.named([f"class {index}" for index in range(CLASSES)], things=(0, 1, 2))
OF_CLASSES = ClassValues(CLASSES)
DEPTH = DepthValues(10.0)


def shifted_windows() -> DensePredictor:
    """A narrow Swin: window attention, maps that timm gives as NHWC."""
    narrow = {"embed_dim": 16, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 2, 2)}
    backbone = TimmBackbone("swin_tiny_patch4_window7_224", options=narrow)
    decoder = TopDownDecoder(backbone.features, 16)
    return DensePredictor(backbone, decoder, PerPixelHead(decoder.features, CLASSES))


def shallow(make: Callable[[], Model]) -> Model:
    """A model on the pixel decoder of kMaX with one block at stride 16 for five: traced in a fraction of the time."""
    with patch.dict(PUBLISHED_STAGES, {16: replace(PUBLISHED_STAGES[16], depth=1)}):
        return make()


@dataclass(frozen=True)
class Case:
    """A model of the zoo, small, and what it is asked."""

    make: Callable[[], Model]
    tasks: tuple[str, ...] = ("semantic",)


CASES: dict[str, Case] = {
    "street": Case(lambda: zoo.street(CLASSES)),
    "small": Case(lambda: zoo.small(CLASSES)),
    "fpn": Case(lambda: zoo.fpn(CLASSES, "test_resnet")),
    "deeplabv3": Case(lambda: zoo.deeplabv3(CLASSES, "test_resnet", output_stride=8)),
    "deeplabv3plus": Case(lambda: zoo.deeplabv3plus(CLASSES, "small")),
    "lraspp": Case(lambda: zoo.lraspp(CLASSES, "small")),
    "segnet": Case(lambda: zoo.segnet(CLASSES, "vgg11_bn")),
    "linknet": Case(lambda: zoo.linknet(CLASSES, "test_resnet")),
    "fcn32s": Case(lambda: zoo.fcn32s(CLASSES, "test_resnet", width=16)),
    "fcn16s": Case(lambda: zoo.fcn16s(CLASSES, "test_resnet", width=16)),
    "fcn8s": Case(lambda: zoo.fcn8s(CLASSES, "vgg11_bn", width=16)),
    "ocr": Case(lambda: zoo.ocr(CLASSES, "small", width=16)),
    "kmax": Case(lambda: shallow(lambda: zoo.kmax(OF_CLASSES, "small", width=32, queries=12)), ("panoptic",)),
    "mask2former": Case(lambda: zoo.mask2former(CLASSES, "small", width=32, queries=8), ("panoptic",)),
    "eomt": Case(lambda: zoo.eomt(CLASSES, "test_vit", queries=8), ("panoptic",)),
    "panoptic_deeplab": Case(lambda: zoo.panoptic_deeplab(CLASSES, "small", width=16), ("panoptic",)),
    "polymax": Case(lambda: shallow(lambda: zoo.polymax(DEPTH, "small", width=32, queries=12)), ("depth",)),
    "dpt": Case(lambda: zoo.dpt(DEPTH, "small", width=16), ("depth",)),
    "dpt of normals": Case(lambda: zoo.dpt(NormalValues(), "test_vit", width=16), ("normals",)),
    "masks as instances": Case(lambda: zoo.mask2former(CLASSES + 1, "small", width=32, queries=8), ("instance",)),
    "street_objects": Case(lambda: zoo.street_objects(CLASSES + 1), ("instance",)),
    "several tasks": Case(
        lambda: zoo.dpt({"semantic": OF_CLASSES, "depth": DEPTH, "normals": NormalValues()}, "small", width=16),
        ("semantic", "depth", "normals"),
    ),
    "plain transformer": Case(lambda: zoo.small(CLASSES, "test_vit")),
    "shifted windows": Case(shifted_windows),
}
# Window attention cannot be traced at a dynamic size: the artifact resizes to one size inside.
FIXED_SIZE = {"shifted windows": (64, 96)}
# Random weights are sure of nothing: keep every mask, so that there is something to compare.
EVERYTHING = MergeRules(thing_score=0, stuff_score=0, mask_confidence=0.1, overlap=0)


pytestmark = pytest.mark.usefixtures("one_thread")


def tasks_of(case: str) -> tuple[Task, ...]:
    def permissive(name: str) -> Task:
        if name == "panoptic":
            grouping = GroupingRules(threshold=0.01, max_centres=20)
            return PanopticTask(CLASSES, NAMED.things, EVERYTHING, grouping=grouping)
        return make_task(name, NAMED)

    return tuple(map(permissive, CASES[case].tasks))


@functools.cache
def model_of(case: str) -> Model:
    torch.manual_seed(0)
    model = CASES[case].make()
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d | torch.nn.BatchNorm1d):
            layer.momentum = 1.0
    with torch.no_grad():  # statistics of one batch and centred scores, so that every class gets some pixels
        model.train()(blobs(2, 96, 128))
        model.eval()
        for head in model.modules():
            if isinstance(head, CentreOffsetHead):  # a fresh one finds no centre
                head.centre[-1].bias.zero_()
        if isinstance(model, DensePredictor) and model.spec.value_kind is ValueKind.IDENTITY:
            scores = model(blobs(1, 160, 96)).mask_logits
            bias = [p for name, p in model.head.named_parameters() if name.endswith("bias")][-1]
            if len(bias) == CLASSES:
                bias -= scores.mean(dim=(0, 2, 3))
    return model


def blobs(count: int, height: int, width: int) -> torch.Tensor:
    """Smooth coloured noise [count, 3, H, W] in [0, 1]."""
    coarse = torch.rand(count, 3, -(-height // 8), -(-width // 8), generator=torch.Generator().manual_seed(height))
    return torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)


def test_cases_cover_the_zoo() -> None:
    assert CASES.keys() >= zoo.MODELS.keys()
    for name, entry in zoo.MODELS.items():
        assert set(CASES[name].tasks) <= set(entry.tasks)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size_hw", [(97, 131), (3, 5), (1, 1)])
@torch.no_grad()
def test_shapes_follow_the_spec(case: str, size_hw: tuple[int, int]) -> None:
    model, tasks = model_of(case), tasks_of(case)
    heads = head_outputs(model, CASES[case].tasks, blobs(1, *size_hw))
    padded = [-(-side // model.size_multiple) * model.size_multiple for side in size_hw]
    for task in tasks:
        output, spec = heads[task.name]
        grid = tuple(side // spec.mask_stride for side in padded)
        assert output.mask_logits.shape == (1, spec.num_queries, *grid)
        assert output.values.shape == (1, spec.num_queries, spec.value_dim)
        assert output.mask_logits.isfinite().all()
        assert output.aux == ()
        if spec.value_kind in (ValueKind.IDENTITY, ValueKind.CENTRE_OFFSET):
            assert torch.equal(output.values, torch.eye(spec.num_queries)[None])
        answers = task.decode(output, spec, size_hw)
        assert len(answers) == len(outputs_of(task.name))
        assert answers[0].shape[-2:] == size_hw


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_batch_gives_what_its_images_give(case: str) -> None:
    model, names = model_of(case), CASES[case].tasks
    images = blobs(3, 40, 72)
    together = head_outputs(model, names, images)
    alone = [head_outputs(model, names, image[None]) for image in images]
    for name in names:
        for part in ("mask_logits", "values"):
            batched = getattr(together[name][0], part)
            single = torch.cat([getattr(each[name][0], part) for each in alone])
            torch.testing.assert_close(batched, single, atol=2e-4, rtol=2e-4)
        assert together[name][0].mask_logits.std(dim=0).max() > 1e-5  # the images do differ


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_gets_a_finite_gradient(case: str) -> None:
    model = copy.deepcopy(model_of(case)).train()
    targets = random_targets(2, 61, 90)
    heads = head_outputs(model, CASES[case].tasks, blobs(2, 61, 90))
    torch.stack([task.loss(*heads[task.name], targets)[0] for task in tasks_of(case)]).sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []


def random_targets(count: int, height: int, width: int) -> Targets:
    """Every kind of truth: four segments, two of one class, and a void corner."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(4, height, width, dtype=torch.bool)
    masks[0, : height // 2, : width // 2] = masks[1, height // 2 :, : width // 2] = True
    masks[2, : height // 2, width // 2 :] = masks[3, height // 2 : height - 9, width // 2 :] = True
    segments = SegmentTargets(masks, torch.tensor([0, 0, 1, 4]), ~masks.any(dim=0))
    normals = torch.randn(count, 3, height, width, generator=generator)
    return Targets(
        class_ids=torch.randint(0, CLASSES, (count, height, width), generator=generator),
        segments=(segments,) * count,
        depth_m=torch.rand(count, height, width, generator=generator) * 9,
        normals=torch.nn.functional.normalize(normals, dim=1),
    )


@pytest.mark.parametrize("case", CASES)
def test_export_equals_eager(case: str, tmp_path: Path) -> None:
    graph = ArtifactGraph(model_of(case), tasks_of(case), FIXED_SIZE.get(case)).eval()
    artifact = tmp_path / "model.onnx"
    artifact.write_bytes(to_onnx(graph).SerializeToString())
    engines = (OnnxRuntimeSession(artifact, threads=1), OpenVinoSession(artifact, threads=1, precision="f32"))
    seen: set[int] = set()
    for height, width in ((97, 131), (160, 96), (1, 1)):
        image = (blobs(1, height, width) * 255).byte().permute(0, 2, 3, 1).contiguous()
        with torch.no_grad():
            answers = graph(image)
        wanted = {name: answer[0].numpy() for name, answer in zip(graph.outputs, answers, strict=True)}
        seen |= set(np.unique(answers[0].float().numpy()).tolist())
        for engine in engines:
            got = engine.run(image[0].numpy())
            assert got.keys() == wanted.keys()
            for name in CASES[case].tasks:
                assert agreement(name, wanted, got) >= 0.999
    assert len(seen) >= 2


def test_a_model_that_traces_at_one_size_only_is_refused() -> None:
    with pytest.raises(InputError, match="--network-size"):
        to_onnx(ArtifactGraph(shifted_windows(), (make_task("semantic", NAMED),)))
