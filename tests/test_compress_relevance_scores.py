"""Relevance from gradients: worked by hand, against automatic differentiation, saved and read, and what goes wrong."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from denselab.compress.graph import Axis, Graph, capture
from denselab.compress.relevance.lrp import lrp, lrp_graph
from denselab.compress.relevance.scores import (
    Relevance,
    SavedRelevance,
    Score,
    fisher,
    fisher_diagonal,
    gradient_times_activation,
    pixel_relevance,
)
from denselab.errors import InputError

pytestmark = pytest.mark.usefixtures("one_thread")

BATCHES = frozenset({Axis.BATCH})
METHODS: list[Relevance] = [gradient_times_activation, fisher, lrp]


class Line(nn.Module):
    """y = w relu(x), with numbers that can be worked by hand."""

    def __init__(self, weight: list[float]) -> None:
        super().__init__()
        self.last = nn.Linear(len(weight), 1, bias=False)
        self.last.weight = nn.Parameter(torch.tensor([weight]))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x.relu())


def total(out: Tensor) -> Tensor:
    return out.sum(dim=1)


@pytest.fixture(scope="module")
def line() -> Graph:
    return capture(Line([2.0, -1.0]), torch.rand(2, 2), free=BATCHES)


TWO = torch.tensor([[1.0, 2.0], [3.0, -5.0]])  # messages 2, -2 and 6, 0


def test_gradient_times_activation_by_hand(line: Graph) -> None:
    scores = gradient_times_activation(line, [TWO], total)
    assert scores == {key: Score(5.0, 3.0, 1.0) for key in ("last/linear/input", "last/linear/weight")}
    assert list(scores) == [site.key for site in line.sites]


def test_fisher_by_hand(line: Graph) -> None:
    scores = fisher(line, TWO.split(1), total)
    assert scores["last/linear/input"] == Score(5.0, 5.0, 0.0)  # 2^2 + 1^2 at both images
    assert scores["last/linear/weight"] == Score(7.0, 7.0, 4.0)  # 1^2 + 2^2 and 3^2
    diagonal = fisher_diagonal(line, [TWO], total, ["last/linear/weight", "last/linear/input"])
    torch.testing.assert_close(diagonal["last/linear/weight"], torch.tensor([[5.0, 2.0]]))
    torch.testing.assert_close(diagonal["last/linear/input"], torch.tensor([[4.0, 1.0]]))


def test_pixels_by_hand_and_the_colour_that_says_nothing() -> None:
    graph = capture(nn.Sequential(nn.Conv2d(3, 1, 1), nn.Flatten()), torch.rand(1, 3, 2, 2), free=frozenset())
    weight = graph.module.get_submodule("0").weight.detach()[:, :, 0, 0]
    pixels = torch.rand(1, 3, 2, 2)
    torch.testing.assert_close(pixel_relevance(graph.run, pixels, total), torch.einsum("bchw,kc->bhw", pixels, weight))
    none = pixel_relevance(graph.run, pixels, total, blank=pixels)
    assert none.abs().max() == 0


class Block(nn.Module):
    """Attention, a norm, a GELU, and one weight that two layers share."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm, self.inner, self.head = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.stem(pixels).flatten(2).transpose(1, 2)
        x = x + self.attend(x, x, x, need_weights=False)[0]
        x = x + self.inner(F.gelu(self.inner(self.norm(x))))
        return self.head(x.mean(dim=1))


@pytest.fixture(scope="module")
def block() -> Graph:
    torch.manual_seed(0)
    return capture(Block(), torch.rand(2, 3, 8, 8), free=BATCHES)


def test_weights_against_automatic_differentiation(block: Graph) -> None:
    pixels = torch.rand(3, 3, 8, 8)
    scores = gradient_times_activation(block, [pixels[:2], pixels[2:]], lambda out: out[:, 1])
    for key in ("stem/conv/weight", "inner/linear/weight", "head/linear/weight"):
        weight = block.module.get_parameter(f"{key.split('/')[0]}.weight")
        each = [torch.autograd.grad(block.run(image)[0, 1], [weight])[0] * weight for image in pixels.split(1)]
        sums = torch.stack([relevance.abs().sum() for relevance in each])
        assert scores[key].magnitude == pytest.approx(sums.mean().item(), rel=1e-4)
        assert scores[key].signed == pytest.approx(sum(each).sum().item() / 3, rel=1e-4, abs=1e-6)
        assert scores[key].variance == pytest.approx(sums.var(correction=0).item(), rel=1e-3)


def test_batches_do_not_change_the_scores(block: Graph) -> None:
    pixels = torch.rand(3, 3, 8, 8)
    for method in METHODS:
        together, apart = (method(block, batches, total) for batches in ([pixels], pixels.split(1)))
        assert together == apart


def test_a_frozen_model_has_the_same_relevance(block: Graph) -> None:
    pixels = torch.rand(1, 3, 8, 8)
    before = lrp(block, [pixels], total)
    block.module.requires_grad_(False)
    frozen = lrp(block, [pixels], total)
    block.module.requires_grad_(True)
    assert frozen == before


def test_a_graph_of_one_batch_size_is_run_at_it() -> None:
    graph = capture(Line([2.0, -1.0]), TWO, free=frozenset())
    assert gradient_times_activation(graph, [torch.cat([TWO, TWO])], total)["last/linear/input"] == Score(5.0, 3.0, 0.0)
    with pytest.raises(InputError, match=r"wanted shapes like 2x2 .* got 1x2"):
        gradient_times_activation(graph, [TWO[:1]], total)


def test_silent_networks_have_relevance_zero(line: Graph) -> None:
    no_logits = capture(Line([0.0, 0.0]), torch.ones(1, 2), free=frozenset())
    for method in METHODS:
        dead = method(line, [-torch.ones(1, 2)], total)
        assert dead["last/linear/weight"] == Score(0.0, 0.0, 0.0)
        assert method(no_logits, [torch.ones(1, 2)], total)["last/linear/input"] == Score(0.0, 0.0, 0.0)


def test_one_pixel() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GELU(), nn.Conv2d(4, 2, 3, padding=1), nn.Flatten())
    graph = capture(model, torch.rand(1, 3, 1, 1), free=frozenset())
    pixels = torch.rand(1, 3, 1, 1)
    assert pixel_relevance(lrp_graph(graph).run, pixels, total).shape == (1, 1, 1)
    for method in METHODS:
        assert all(math.isfinite(score.magnitude) for score in method(graph, [pixels], total).values())


def test_the_site_of_a_nan_is_named() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).square().sqrt())

    model = Root()
    nn.init.zeros_(model.first.weight)
    nn.init.zeros_(model.first.bias)
    graph = capture(model, torch.ones(1, 2), free=frozenset())
    with pytest.raises(InputError, match=r"infinity in 1 of 2 of the value at the site 'first/linear/input'"):
        gradient_times_activation(graph, [torch.tensor([[math.nan, 1.0]])], total)
    # The slope of a root is infinite at 0, and times that of the square, which is 0, no number at all.
    with pytest.raises(InputError, match=r"of the gradient at the site 'first/linear/weight'"):
        gradient_times_activation(graph, [torch.ones(1, 2)], total)
    with pytest.raises(InputError, match="got NaN or infinity at the pixels; is the image finite"):
        pixel_relevance(graph.run, torch.ones(1, 2), total)
    assert lrp(graph, [torch.ones(1, 2)], total)["first/linear/weight"] == Score(0.0, 0.0, 0.0)


def test_bad_input(line: Graph) -> None:
    for method in METHODS:
        with pytest.raises(InputError, match="images: wanted at least one to measure relevance with, got none"):
            method(line, [], total)
    with pytest.raises(InputError, match="start: wanted a number that depends on the output of the model"):
        fisher(line, [TWO], lambda out: out.argmax(dim=1).float())
    with pytest.raises(InputError, match="did you mean 'last/linear/input'"):
        fisher_diagonal(line, [TWO], total, ["last/linear/inputs"])


def test_scores_are_saved_and_read(line: Graph, tmp_path: Path) -> None:
    scores = gradient_times_activation(line, [TWO], total)
    saved = SavedRelevance(line.model, "gradient x activation", 2, scores)
    saved.write(tmp_path / "relevance.json")
    assert SavedRelevance.read(tmp_path / "relevance.json", line) == saved
    assert json.loads((tmp_path / "relevance.json").read_text())["scores"]["last/linear/input"] == {
        "magnitude": 5.0,
        "signed": 3.0,
        "variance": 1.0,
    }


def test_files_that_cannot_be_read(line: Graph, block: Graph, tmp_path: Path) -> None:
    path = tmp_path / "relevance.json"
    with pytest.raises(InputError, match=r"relevance.json: cannot be read \(No such file"):
        SavedRelevance.read(path, line)
    path.write_text("{")
    with pytest.raises(InputError, match=r"wanted relevance by site, but it is damaged"):
        SavedRelevance.read(path, line)
    path.write_text(json.dumps({"format_version": 1}))
    with pytest.raises(InputError, match="wanted relevance by site, but it lacks 'scores'"):
        SavedRelevance.read(path, line)
    SavedRelevance(line.model, "Fisher", 1, {"a/linear/input": Score(1.0, 1.0, 0.0)}).write(path)
    with pytest.raises(InputError, match="wanted sites of this model, got 'a/linear/input'"):
        SavedRelevance.read(path, line)
    SavedRelevance(line.model, "Fisher", 1, {"last/linear/input": Score(math.inf, 0.0, 0.0)}).write(path)
    with pytest.raises(InputError, match=r"damaged \(a score is not finite"):
        SavedRelevance.read(path, line)
    SavedRelevance(block.model, "Fisher", 1, {}).write(path)
    with pytest.raises(InputError, match="wanted a file made for this model"):
        SavedRelevance.read(path, line)
    path.write_text(json.dumps({"format_version": 99}))
    with pytest.raises(InputError, match="format version 99 is newer than this DenseLab"):
        SavedRelevance.read(path, line)
