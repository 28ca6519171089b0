"""Grouping by centres: two objects by hand, the paper's loops over pixels, what is missing, and the engines."""

import math
import warnings
from collections import Counter

import numpy as np
import onnxruntime
import openvino
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from denselab.heads.centre_offset import CentreOffsetHead
from denselab.model import DensePredictor
from denselab.pixel_decoders.panoptic_deeplab import PanopticDeepLabDecoder
from denselab.tasks.grouping import GroupingRules, find_centres, group_centres, instances_of_centres
from denselab.tasks.semantic import decode
from denselab.types import HeadSpec, MaskNorm, QueryOutput, ValueKind
from head_checks import TinyPyramid, photos


def centre_spec(classes: int, stride: int) -> HeadSpec:
    return HeadSpec(classes + 3, classes + 3, stride, MaskNorm.SOFTMAX, ValueKind.CENTRE_OFFSET)


def output_of(class_logits: Tensor, heat: Tensor, offset_px: Tensor) -> QueryOutput:
    """From [B, K, h, w], heat in [0, 1] [B, h, w] and [B, 2, h, w]."""
    mask_logits = torch.cat([class_logits, heat.logit()[:, None], offset_px], dim=1)
    return QueryOutput(mask_logits, torch.eye(mask_logits.shape[1]).expand(len(heat), -1, -1))


def two_objects() -> QueryOutput:
    """A 4x6 image of sky (0), cars (1) and a van (2), each label with probability 0.8; one car pixel looks like van."""
    labels = torch.tensor([[0, 0, 0, 0, 0, 0], [1, 1, 1, 2, 2, 2], [1, 1, 1, 2, 2, 2], [1, 1, 2, 2, 2, 2]])
    probs = F.one_hot(labels, 3).movedim(2, 0) * 0.7 + 0.1
    heat = torch.full((4, 6), 0.05)
    heat[2, 1], heat[2, 4], heat[2, 3] = 0.9, 0.6, 0.5  # the third is beside a hotter one
    centre_column = torch.tensor([1, 1, 1, 4, 4, 4]).expand(4, 6)
    offset_px = torch.stack([2 - torch.arange(4.0)[:, None].expand(4, 6), centre_column - torch.arange(6.0)])
    return output_of(probs.log()[None], heat[None], offset_px[None])


RULES = GroupingRules(nms_px=3, max_centres=5)


def test_two_objects_by_hand() -> None:
    """Slots 0..2 are stuff, 3 the car, 4 the van, so ids 4 and 5. Car: 8 pixels say 0.8 and one 0.1."""
    ids, classes, scores = group_centres(two_objects(), centre_spec(3, 1), (4, 6), (1, 2), RULES)
    assert ids.tolist() == [[[1] * 6, *[[4, 4, 4, 5, 5, 5]] * 3]]
    assert (ids.dtype, classes.dtype, scores.dtype) == (torch.int32, torch.int32, torch.float32)
    assert classes[0, [0, 3, 4]].tolist() == [0, 1, 2]
    wanted = [0.8, 0, 0, 0.9 * (8 * 0.8 + 0.1) / 9, 0.6 * 0.8, 0, 0, 0]
    assert scores[0].tolist() == pytest.approx(wanted, abs=1e-6)


def test_instances_by_hand() -> None:
    output, spec = two_objects(), centre_spec(3, 1)
    masks, classes, scores = instances_of_centres(output, spec, (4, 6), (1, 2), RULES, 3)
    assert masks.dtype == torch.uint8
    car = [[0] * 6, *[[1, 1, 1, 0, 0, 0]] * 3]
    van = [[0] * 6, *[[0, 0, 0, 1, 1, 1]] * 3]
    assert masks.tolist() == [[car, van, [[0] * 6] * 4]]
    assert classes[0, :2].tolist() == [1, 2]
    assert scores[0].tolist() == pytest.approx([0.65, 0.48, 0], abs=1e-6)
    assert instances_of_centres(output, spec, (4, 6), (1, 2), RULES, 9)[2].shape == (1, 5)


def test_offsets_and_not_places_decide() -> None:
    """All of one row points to the right centre, in input px: 4 px are one cell."""
    heat = torch.full((1, 1, 5), 0.01)
    heat[0, 0, 0] = heat[0, 0, 4] = 0.9
    offset_px = torch.zeros(1, 2, 1, 5)
    offset_px[0, 1] = 16 - 4 * torch.arange(5.0)
    ids, _, _ = group_centres(
        output_of(torch.zeros(1, 1, 1, 5), heat, offset_px), centre_spec(1, 4), (3, 18), (0,), RULES
    )
    centres, _ = find_centres(heat.logit(), 4, RULES)
    assert centres[0, :2].sort(dim=0).values.tolist() == [[0, 0], [0, 4]]
    assert (ids == 2 + int(centres[0, 1, 1] == 4)).all()


def loops(
    labels: NDArray[np.int64],
    probs: NDArray[np.float64],
    heat: NDArray[np.float64],
    offset_px: NDArray[np.float64],
    stride: int,
    things: tuple[int, ...],
    rules: GroupingRules,
) -> tuple[NDArray[np.int64], dict[int, tuple[int, float]]]:
    """Section 3.2, pixel by pixel: ids [H, W], and class and score by id. labels [H, W], the rest on the grid."""
    rows, columns = heat.shape
    reach = math.ceil((rules.nms_px // 2) / stride)
    peaks = []
    for i in range(rows):
        for j in range(columns):
            window = heat[max(0, i - reach) : i + reach + 1, max(0, j - reach) : j + reach + 1]
            if heat[i, j] > rules.threshold and heat[i, j] >= window.max():
                peaks.append((heat[i, j], (i + 0.5) * stride, (j + 0.5) * stride))
    peaks = sorted(peaks, reverse=True)[: rules.max_centres]
    ids = np.zeros_like(labels)
    for y, x in np.ndindex(labels.shape):
        i, j = y // stride, x // stride
        if labels[y, x] not in things:
            ids[y, x] = labels[y, x] + 1
        elif peaks:
            y_px, x_px = (i + 0.5) * stride + offset_px[0, i, j], (j + 0.5) * stride + offset_px[1, i, j]
            distances = [math.hypot(cy - y_px, cx - x_px) for _, cy, cx in peaks]
            ids[y, x] = len(probs) + 1 + distances.index(min(distances))
    segments = {}
    for number in set(ids.flatten().tolist()) - {0}:
        places = np.argwhere(ids == number)
        is_stuff = number <= len(probs)
        if is_stuff and len(places) < rules.min_stuff_share * labels.size:
            ids[ids == number] = 0
            continue
        votes = Counter(labels[y, x] for y, x in places)
        class_id = min(votes, key=lambda c: (-votes[c], c))
        confidence = np.mean([probs[class_id, y // stride, x // stride] for y, x in places])
        heat_there = 1 if is_stuff else peaks[number - len(probs) - 1][0]
        segments[number] = (int(class_id), float(confidence * heat_there))
    return ids, segments


def noise(batch: int, classes: int, rows: int, columns: int, stride: int, seed: int) -> QueryOutput:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(batch, classes, rows // 3 + 1, columns // 3 + 1, generator=generator) * 3
    class_logits = F.interpolate(coarse, (rows, columns), mode="bilinear")
    heat = torch.rand(batch, rows, columns, generator=generator) ** 3 * 0.98 + 0.01
    offset_px = torch.randn(batch, 2, rows, columns, generator=generator) * 3 * stride
    return output_of(class_logits, heat, offset_px)


@pytest.mark.parametrize(
    ("stride", "size_hw", "rules"),
    [
        (1, (24, 31), GroupingRules(threshold=0.3, min_stuff_share=0.08)),
        (1, (24, 31), GroupingRules(threshold=0.1, nms_px=3, max_centres=6, min_stuff_share=0)),
        (4, (45, 62), GroupingRules(threshold=0.5, max_centres=40)),
        (2, (7, 5), GroupingRules(max_centres=40)),
    ],
)
def test_the_papers_loops_give_the_same(stride: int, size_hw: tuple[int, int], rules: GroupingRules) -> None:
    spec, things = centre_spec(6, stride), (1, 3, 4)
    rows, columns = (-(-side // stride) for side in size_hw)
    output = noise(2, 6, rows + 3, columns + 2, stride, seed=stride)  # the grid reaches into the padding
    ids, classes, scores = group_centres(output, spec, size_hw, things, rules)
    labels = decode(output, spec, size_hw)
    seen = set()
    for index in range(2):
        inside = output.mask_logits[index, :, :rows, :columns].double()
        probs, heat, offset_px = inside[:6].softmax(dim=0), inside[6].sigmoid(), inside[7:]
        wanted_ids, segments = loops(
            labels[index].numpy().astype(np.int64),
            probs.numpy(),
            heat.numpy(),
            offset_px.numpy(),
            stride,
            things,
            rules,
        )
        np.testing.assert_array_equal(ids[index].numpy(), wanted_ids)
        for slot, (class_id, score) in enumerate(zip(classes[index].tolist(), scores[index].tolist(), strict=True)):
            wanted_class, wanted_score = segments.get(slot + 1, (class_id, 0))
            assert class_id == wanted_class
            assert score == pytest.approx(wanted_score, abs=1e-5)
        seen |= set(segments)
    assert min(seen) <= 6
    assert max(seen) >= 8  # two things at least


def test_things_without_a_centre_are_void() -> None:
    output = two_objects()
    output.mask_logits[:, 3] = -8
    ids, _, scores = group_centres(output, centre_spec(3, 1), (4, 6), (1, 2), RULES)
    assert ids.tolist() == [[[1] * 6, *[[0] * 6] * 3]]
    assert scores[0].tolist() == pytest.approx([0.8] + [0] * 7, abs=1e-6)
    masks, _, scores = instances_of_centres(output, centre_spec(3, 1), (4, 6), (1, 2), RULES, 4)
    assert masks.sum() == 0
    assert scores.tolist() == [[0.0] * 4]


def test_without_thing_classes_all_is_stuff() -> None:
    ids, classes, scores = group_centres(two_objects(), centre_spec(3, 1), (4, 6), (), RULES)
    assert torch.equal(ids, decode(two_objects(), centre_spec(3, 1), (4, 6)) + 1)
    assert classes[0, :3].tolist() == [0, 1, 2]
    assert scores[0].tolist() == pytest.approx([0.8] * 3 + [0] * 5, abs=1e-6)


def test_little_stuff_is_void() -> None:
    """Sky has 6 of 24 pixels: enough for a share of 1/4, not for more."""
    for share, sky in ((0.25, 1), (0.26, 0)):
        rules = GroupingRules(nms_px=3, max_centres=5, min_stuff_share=share)
        ids, _, scores = group_centres(two_objects(), centre_spec(3, 1), (4, 6), (1, 2), rules)
        assert ids[0, 0].tolist() == [sky] * 6
        assert (scores[0, 0] > 0) == bool(sky)


@pytest.mark.parametrize("stride", [1, 4])
def test_an_image_of_one_pixel(stride: int) -> None:
    output = output_of(torch.zeros(1, 1, 4, 4), torch.full((1, 4, 4), 0.5), torch.zeros(1, 2, 4, 4))
    ids, classes, scores = group_centres(output, centre_spec(1, stride), (1, 1), (0,), GroupingRules())
    assert ids.tolist() == [[[2]]]
    assert classes.shape == scores.shape == (1, 201)
    assert scores[0, :3].tolist() == [0, 0.5, 0]


def test_hot_neighbours_are_one_centre() -> None:
    """Both heats are 1.0 in float32; among logits one is a peak."""
    centre_logits = torch.full((1, 5, 5), -9.0)
    centre_logits[0, 2, 2], centre_logits[0, 2, 3] = 40, 50
    centres, heat = find_centres(centre_logits, 1, RULES)
    assert heat.tolist() == [[1, 0, 0, 0, 0]]
    assert centres[0, 0].tolist() == [2, 3]


@pytest.mark.parametrize(("stride", "cells"), [(1, 7), (2, 5), (4, 3), (16, 3)])
def test_the_window_is_in_px(stride: int, cells: int) -> None:
    """Of two peaks as far apart as the window reaches, the cooler one goes; one cell further, both stay."""
    for distance, found in ((cells // 2, 1), (cells // 2 + 1, 2)):
        centre_logits = torch.full((1, 1, 9), -9.0)
        centre_logits[0, 0, 0], centre_logits[0, 0, distance] = 1, 2
        assert (find_centres(centre_logits, stride, GroupingRules())[1] > 0).sum() == found


def test_other_heads_are_refused() -> None:
    spec = HeadSpec(6, 6, 1, MaskNorm.SOFTMAX, ValueKind.IDENTITY)
    with pytest.raises(TypeError, match=r"value_kind: wanted CENTRE_OFFSET, got ValueKind\.IDENTITY"):
        group_centres(two_objects(), spec, (4, 6), (1, 2), RULES)


class Photo(nn.Module):
    """pixels [1, 3, H, W] -> ids, classes, scores."""

    def __init__(self, model: DensePredictor) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        size_hw, rules = (pixels.shape[2], pixels.shape[3]), GroupingRules(threshold=0.5, max_centres=20)
        return group_centres(self.model(pixels), self.model.spec, size_hw, (1, 3), rules)


@torch.no_grad()
def test_export_equals_eager() -> None:
    """Of a whole tiny Panoptic-DeepLab, with statistics of one batch and centred scores."""
    torch.manual_seed(0)
    backbone = TinyPyramid()
    decoder = PanopticDeepLabDecoder(backbone.features, 8, 8, (8, 8), (8, 8), aspp_width=4)
    model = DensePredictor(backbone, decoder, CentreOffsetHead(decoder.features, 4, instance_width=8))
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    model.train()(photos(2, 96, 128))
    means = model.eval()(photos(2, 96, 128)).mask_logits.mean((0, 2, 3))
    model.head.classify[-1].bias -= means[:4]
    model.head.centre[-1].bias -= means[4]
    graph = Photo(model).eval()
    size = {2: torch.export.Dim("height", min=1), 3: torch.export.Dim("width", min=1)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own deprecations
        program = torch.onnx.export(
            graph, (photos(1, 33, 49),), dynamo=True, dynamic_shapes={"pixels": size}, opset_version=20, verbose=False
        )
    # OpenVINO computes those in bf16 where the CPU has it, which is too coarse for positions.
    assert "MatMul" not in {node.op_type for node in program.model_proto.graph.node}
    written = program.model_proto.SerializeToString()
    onnx_runtime = onnxruntime.InferenceSession(written, providers=["CPUExecutionProvider"])
    core = openvino.Core()
    precise = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    open_vino = core.compile_model(core.read_model(written), "CPU", precise)
    seen: set[int] = set()
    for size_hw in ((97, 131), (160, 75), (1, 1)):
        pixels = photos(1, *size_hw)
        ids, classes, scores = (each.numpy() for each in graph(pixels))
        seen |= set(np.unique(ids).tolist())
        for got in (onnx_runtime.run(None, {"pixels": pixels.numpy()}), list(open_vino([pixels.numpy()]).values())):
            assert [each.dtype for each in got] == [np.int32, np.int32, np.float32]
            assert got[0].shape == (1, *size_hw)
            assert (got[0] == ids).mean() >= 0.999
            np.testing.assert_array_equal(got[1], classes)
            np.testing.assert_allclose(got[2], scores, atol=1e-3)
    assert len(seen - {0, 1, 2, 3, 4}) >= 5  # several things
    assert seen & {1, 3}  # and stuff
