"""Which pixels made the model say so: what is asked, by hand; heat on the objects themselves; what cannot be done."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from denselab import _vision as _vision
from denselab.checkpoint import LoadedModel, ModelCard
from denselab.classes import STREET, Classes
from denselab.data.scenes import render_scene
from denselab.depth_unit import DepthUnit
from denselab.drawing.heat import AGAINST, FOR, full_colour_at, heat_overlay
from denselab.errors import InputError
from denselab.explain import heat
from denselab.explain.heat import explain, open_to_explain
from denselab.explain.question import Asked, AtPoint, Largest, Method, OfClass
from denselab.explain.subject import Said, said
from denselab.tasks.task import make_task
from denselab.types import HeadSpec, MaskNorm, QueryOutput, ValueKind
from tiny_models import CLASSES, photo, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = Classes.named(("road", "car"), things=(1,))


@pytest.fixture(scope="module")
def street() -> LoadedModel:
    return open_to_explain("street")


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return LoadedModel(tiny_model().eval(), ModelCard(("semantic",), "tiny", {}, CLASSES, (97, 129), None, ""))


def said_of(task: str, answers: tuple[Tensor, ...], classes: Classes | None = NAMES, kind=ValueKind.IDENTITY) -> Said:
    """What a model says of a photo of 4x6 px, on a grid of stride 2; its first component grows over the cells."""
    masks = torch.stack([torch.arange(6.0).view(2, 3), torch.full((2, 3), 2.0)])[None]
    spec = HeadSpec(2, 2, 2, MaskNorm.SIGMOID, kind)
    return Said(task, QueryOutput(masks, torch.eye(2)[None]), spec, answers, (8, 12), classes, DepthUnit.METRES)


def cells(answer: Said, asked: Asked) -> list[list[int]]:
    return answer.find(asked).cells.int().tolist()


SEMANTIC = said_of("semantic", (torch.tensor([[[0, 0, 0, 1, 1, 1]] * 4]),))


def test_cells_of_classes_by_hand() -> None:
    """A cell that is half a class's is its; a point of the photo of 8x12 px lies where the network saw it at 4x6."""
    assert cells(SEMANTIC, OfClass("Road")) == [[1, 1, 0]] * 2
    assert cells(SEMANTIC, Largest()) == [[1, 1, 0]] * 2
    assert cells(SEMANTIC, AtPoint(11, 7)) == [[0, 0, 0], [0, 0, 1]]
    assert SEMANTIC.find(AtPoint(5, 0)).text == "road at 5,0"
    assert SEMANTIC.find(AtPoint(6, 0)).text == "car at 6,0"
    assert SEMANTIC.find(OfClass("car")).text == "car, 50.0 % of the photo"
    tiny_one = said_of("semantic", (torch.tensor([[[1, 0, 0, 0, 0, 0], *[[0] * 6] * 3]]),))
    assert cells(tiny_one, OfClass("car")) == [[1, 0, 0], [0, 0, 0]]


def test_a_class_found_nowhere() -> None:
    """The road says most against the car, in logits 5 to 2, at the last cell; and least at the first."""
    subject = said_of("semantic", (torch.zeros(1, 4, 6, dtype=torch.int),)).find(OfClass("car"))
    assert subject.cells.int().tolist() == [[1, 0, 0], [0, 0, 0]]
    assert "the model finds no car in the photo" in subject.note


def test_segments_and_objects_by_hand() -> None:
    ids = torch.tensor([[[1, 1, 2, 2, 0, 0]] * 4])
    panoptic = said_of("panoptic", (ids, torch.tensor([[1, 1]]), torch.ones(1, 2)))
    assert cells(panoptic, OfClass("car")) == [[1, 1, 0]] * 2
    assert cells(panoptic, AtPoint(4, 0)) == [[0, 1, 0]] * 2
    with pytest.raises(
        InputError, match=r"wanted a pixel in segments that the model found, got 11,0, which is in none"
    ):
        panoptic.find(AtPoint(11, 0))
    nothing = said_of("panoptic", (torch.zeros_like(ids), torch.tensor([[1, 1]]), torch.zeros(1, 2)))
    with pytest.raises(InputError, match="nothing was found in the photo; give one of road, car"):
        nothing.find(Largest())
    masks = torch.zeros(1, 3, 4, 6, dtype=torch.uint8)
    masks[0, 0, :, :4], masks[0, 1, :, 2:4], masks[0, 2] = 1, 1, 1
    objects = said_of("instance", (masks, torch.ones(1, 3, dtype=torch.int), torch.tensor([[0.6, 0.9, 0.2]])))
    assert cells(objects, AtPoint(4, 0)) == [[0, 1, 0]] * 2  # the surer one
    assert cells(objects, OfClass("car")) == [[1, 1, 0]] * 2  # not the one of 0.2
    assert cells(objects, Largest()) == [[1, 1, 0]] * 2


def test_depth_and_normals_by_hand() -> None:
    depth = said_of("depth", (torch.arange(24.0).view(1, 4, 6),), None)
    subject = depth.find(AtPoint(11, 0))
    assert (subject.text, subject.cells.int().tolist()) == ("depth at 11,0: 5 m", [[0, 0, 1], [0, 0, 0]])
    assert subject.start(depth.spec)(depth.output).item() == 2
    assert depth.find(Largest()).start(depth.spec)(depth.output).item() == 2.5
    relative = replace(depth, unit=DepthUnit.RELATIVE)
    assert relative.find(AtPoint(11, 0)).text == "depth at 11,0: 5"
    with pytest.raises(InputError, match="the model says depth and no classes, got 'car'; give a point instead"):
        depth.find(OfClass("car"))
    normals = said_of("normals", (torch.tensor([0.0, 0.6, -0.8]).view(1, 3, 1, 1).expand(1, 3, 4, 6),), None)
    subject = normals.find(AtPoint(0, 7))
    assert subject.text == "normals at 0,7: 0, 0.6, -0.8"
    assert subject.start(normals.spec)(normals.output).item() == pytest.approx(1)


def test_what_is_said_by_hand() -> None:
    masks = torch.tensor([[[[4.0, 2.0, -3.0]], [[-5.0, -5.0, 6.0]]]])
    output = QueryOutput(masks, torch.tensor([[[3.0, 0.0, 0.0], [-1.0, 5.0, 0.0]]]))

    def of(kind: ValueKind) -> HeadSpec:
        return HeadSpec(2, 3, 4, MaskNorm.SIGMOID, kind)

    assert said(output, of(ValueKind.IDENTITY), 0).item() == 1
    assert said(output, of(ValueKind.CENTRE_OFFSET), 0).item() == 1
    blended = (masks.sigmoid() * torch.tensor([3.0, -1.0]).view(1, 2, 1, 1)).sum(dim=1).mean()
    assert said(output, of(ValueKind.BLENDED), 0).item() == pytest.approx(blended.item())
    # Query 0 says class 0 at two cells; at the third, query 1 does, though it would rather say class 1.
    third = torch.sigmoid(masks[0, :, 0, 2]) * output.values[0].softmax(dim=-1)[:, 0]
    assert third.argmax() == 0
    assert said(output, of(ValueKind.CLASS_LOGITS), 0).item() == pytest.approx(3 + (4 + 2 - 3) / 3)
    assert said(output, of(ValueKind.CLASS_LOGITS), 1).item() == pytest.approx((0 + (4 + 2) / 2) + (5 + 6))


def test_a_point_outside_and_an_unknown_class() -> None:
    for x, y in ((12, 0), (0, 8), (-1, 0)):
        with pytest.raises(InputError, match=rf"wanted X,Y within the photo, 0..11,0..7, got {x},{y}"):
            SEMANTIC.find(AtPoint(x, y))
    with pytest.raises(InputError, match=r"class: wanted one of road, car, got 'cat'; did you mean 'car'\?"):
        SEMANTIC.find(OfClass("cat"))
    with pytest.raises(InputError, match=r"class: wanted one of road, car, got 'zebra'$"):
        SEMANTIC.find(OfClass("zebra"))


def test_heat_lies_on_the_class_and_without_it_the_class_is_said_less(street: LoadedModel) -> None:
    """Deletion (Samek et al. 2017): of the most relevant pixels, against as many random ones."""
    for seed, name in ((1, "tree"), (2, "car")):
        class_id = STREET.names.index(name)
        scene = render_scene(seed, (96, 128))
        explained = explain(street, scene.image, OfClass(name))
        there = scene.class_ids == class_id
        heat_for = explained.relevance.clip(0)
        assert heat_for[there].sum() / heat_for.sum() > 2.5 * there.mean()
        assert explained.relevance.sum() > 0
        pixels = torch.tensor(scene.image).permute(2, 0, 1)[None] / 255
        region = maps_of(street, pixels).argmax(dim=0) == class_id

        def logit_without(
            deleted: Tensor, pixels: Tensor = pixels, region: Tensor = region, k: int = class_id
        ) -> float:
            left = pixels.flatten(2).clone()
            left[:, :, deleted] = street.model.mean.view(1, 3, 1)
            return maps_of(street, left.view(pixels.shape))[k][region].mean().item()

        relevance = torch.tensor(explained.relevance).flatten()
        count = len(relevance) // 20
        generator = torch.Generator().manual_seed(0)
        random = [logit_without(torch.randperm(len(relevance), generator=generator)[:count]) for _ in range(5)]
        assert logit_without(relevance.topk(count).indices) < min(random)


@torch.no_grad()
def maps_of(loaded: LoadedModel, pixels: Tensor) -> Tensor:
    return loaded.model(pixels).mask_logits[0]


def test_any_size_and_shrunken_photos(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    image = photo(53, 37)
    whole = explain(tiny, image, Largest(), Method.GRADIENT)
    assert (whole.relevance.shape, whole.relevance.dtype, whole.notes) == ((53, 37), np.float32, ())
    monkeypatch.setattr(heat, "MOST_PX", 53 * 37 // 4)
    small = explain(tiny, image, Largest(), Method.GRADIENT)
    assert small.relevance.shape == (53, 37)
    assert small.notes == ("the photo of 37x53 px was seen at 18x26 px",)
    seen = np.array(Image.fromarray(image).resize((18, 26), Image.Resampling.BILINEAR, reducing_gap=3))
    own = explain(tiny, seen, Largest(), Method.GRADIENT)
    total = float(np.abs(own.relevance).sum())
    assert small.relevance.sum() == pytest.approx(own.relevance.sum(), rel=0.1, abs=0.02 * total)


def test_methods_agree_on_what_they_share(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network without attention: both relevance propagations are one; gradient does without that file."""
    image = photo(33, 41)
    found = {method: explain(tiny, image, AtPoint(20, 16), method) for method in (Method.LRP, Method.CP_LRP)}
    assert np.array_equal(found[Method.LRP].relevance, found[Method.CP_LRP].relevance)
    assert found[Method.LRP].subject.endswith(" at 20,16")
    monkeypatch.setitem(sys.modules, "denselab.compress.relevance.lrp", None)
    assert np.isfinite(explain(tiny, image, AtPoint(20, 16), Method.GRADIENT).relevance).all()
    with pytest.raises(ImportError):
        explain(tiny, image, AtPoint(20, 16), Method.LRP)


class Branching(nn.Module):
    """A part of a model that torch.export cannot capture."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head
        self.spec = head.spec

    def forward(self, maps: tuple[Tensor, ...]) -> QueryOutput:
        return self.head(maps) if maps[0].mean() > -1e6 else self.head(maps[::-1])


def test_a_model_that_cannot_be_captured() -> None:
    model = tiny_model()
    model.head = Branching(model.head)
    loaded = LoadedModel(model.eval(), ModelCard(("semantic",), "tiny", {}, CLASSES, None, None, ""))
    with pytest.raises(InputError, match=r"cannot capture the module 'head'.*or explain it by gradient"):
        explain(loaded, photo(32, 32), Largest())
    assert explain(loaded, photo(32, 32), Largest(), Method.GRADIENT).relevance.shape == (32, 32)


def test_models_that_cannot_be_explained(tiny: LoadedModel) -> None:
    with pytest.raises(InputError, match=r"got the artifact my.onnx, which only runs forward; give the checkpoint"):
        open_to_explain("my.onnx")
    with pytest.raises(InputError, match=r"wanted street, a checkpoint \(FILE.ckpt\), hf:NAME or kmax:FILE, got rode"):
        open_to_explain("rode")
    with pytest.raises(InputError, match=r"task: wanted one of the model's, semantic, got 'depth'"):
        explain(tiny, photo(32, 32), Largest(), task="depth")


def test_the_built_in_model_is_what_its_artifact_is(street: LoadedModel) -> None:
    from denselab import load

    image = render_scene(5, (96, 128)).image
    pixels = torch.tensor(image).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        answer = make_task("semantic", STREET).decode(street.model(pixels), street.model.spec, (96, 128))[0][0]
    assert np.mean(answer.numpy() == load("street")(image).class_ids) > 0.97


def test_colours_by_hand() -> None:
    relevance = np.zeros((40, 60), np.float32)
    relevance[5:15, 5:15], relevance[25:35, 40:50] = 1, -1
    image = np.full((40, 60, 3), 100, np.uint8)
    picture = np.asarray(heat_overlay(image, relevance, "car, 12.0 % of the photo"))
    assert tuple(picture[10, 10]) == FOR
    assert tuple(picture[30, 45]) == AGAINST
    assert tuple(picture[35, 5]) == (120, 120, 120)
    assert picture.shape[0] > 40
    marked = np.asarray(heat_overlay(image, relevance, "car", at_xy=(5, 35)))
    assert (marked[25:40, :15] == 255).any()
    assert full_colour_at(np.array([[4.0, -3.0, 2.0, 1.0]])) == 4
    assert full_colour_at(np.array([[1.0, -3.0, 0.0, 0.0] + [1.0] * 16])) == 1  # the 3 is less than a fifth of 20


def test_nothing_relevant_is_grey() -> None:
    image = np.full((20, 30, 3), 50, np.uint8)
    picture = np.asarray(heat_overlay(image, np.zeros((20, 30), np.float32), "car"))
    assert (picture[:20, :30] == 90).all()
    with pytest.raises(InputError, match="image: wanted uint8"):
        heat_overlay(image, np.zeros((21, 30), np.float32), "car")
