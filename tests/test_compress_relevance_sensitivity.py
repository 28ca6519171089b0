"""What quantizing one site does to the output, and how the output curves: by hand, and against exact Hessians."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, kl_divergence

from denselab.compress.graph import Axis, Graph, capture
from denselab.compress.quantizers import Uniform
from denselab.compress.ranges import affine, extremes
from denselab.compress.relevance.hessian import perturbation_hessian
from denselab.compress.relevance.scores import Score
from denselab.compress.relevance.sensitivity import (
    by_sensitivity,
    kl_change,
    segments_change,
    sensitivity,
    squared_change,
)
from denselab.errors import InputError
from denselab.types import HeadSpec, MaskNorm, QueryOutput, ValueKind

pytestmark = pytest.mark.usefixtures("one_thread")

BATCHES = frozenset({Axis.BATCH})
INPUT, WEIGHT = "0/linear/input", "0/linear/weight"
HALVES = Uniform(torch.tensor(0.5), None, 8)


@pytest.fixture(scope="module")
def line() -> Graph:
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    model[0].weight = nn.Parameter(torch.tensor([[2.0, 0.6]]))
    return capture(model, torch.rand(2, 2), free=BATCHES)


def test_sensitivity_by_hand(line: Graph) -> None:
    batch = torch.tensor([[1.0, 0.0], [1.2, 1.0]])  # outputs 2 and 3
    scores = sensitivity(line, [batch[:1], batch[1:]], {INPUT: HALVES, WEIGHT: HALVES}, squared_change)
    of_input, of_weight = (2 * 0.2 / 3) ** 2, (0.1 / 3) ** 2  # 1.2 becomes 1, 0.6 becomes 0.5
    assert scores[INPUT].magnitude == pytest.approx(of_input / 2, rel=1e-5)
    assert scores[WEIGHT].magnitude == pytest.approx(of_weight / 2, rel=1e-5)
    assert scores[WEIGHT].variance == pytest.approx((of_weight / 2) ** 2, rel=1e-5)
    together = by_sensitivity({WEIGHT: HALVES}, squared_change)(line, [batch], lambda out: out)
    assert together[WEIGHT].magnitude == pytest.approx(scores[WEIGHT].magnitude)


def test_more_bits_change_less() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    x = torch.randn(4, 8)
    graph = capture(model, x, free=BATCHES)
    changes = []
    for bits in (2, 4, 8):
        quantizers = {f"{i}/linear/weight": affine(*extremes(model[i].weight), bits) for i in (0, 2)}
        scores = sensitivity(graph, [x], quantizers, kl_change())
        changes.append([score.magnitude for score in scores.values()])
    assert changes[0] > changes[1] > changes[2]
    assert min(map(min, changes)) >= 0


def test_changes_against_the_distributions_of_torch() -> None:
    torch.manual_seed(0)
    got, wanted = torch.randn(2, 2, 5)
    divergence = kl_divergence(Categorical(logits=wanted), Categorical(logits=got))
    torch.testing.assert_close(kl_change()(got, wanted), divergence)
    warm = kl_divergence(Categorical(logits=wanted / 20), Categorical(logits=got / 20))
    torch.testing.assert_close(kl_change(temperature=20.0)(got, wanted), warm)
    maps = torch.randn(2, 2, 5, 3, 4)
    of_pixels = [Categorical(logits=each.movedim(1, -1)) for each in maps]
    torch.testing.assert_close(kl_change()(maps[0], maps[1]), kl_divergence(of_pixels[1], of_pixels[0]).mean((1, 2)))
    picked = kl_change(logits=lambda output: output["classes"])({"classes": got}, {"classes": wanted})
    torch.testing.assert_close(picked, divergence)


@pytest.mark.parametrize("norm", MaskNorm)
def test_change_of_segments(norm: MaskNorm) -> None:
    torch.manual_seed(0)
    spec = HeadSpec(3, 5, 4, norm, ValueKind.CLASS_LOGITS)
    got, wanted = (QueryOutput(torch.randn(2, 3, 4, 4), torch.randn(2, 3, 5)) for _ in range(2))
    classes = kl_divergence(*(Categorical(logits=each.values) for each in (wanted, got))).mean(1)
    if norm is MaskNorm.SIGMOID:
        masks = kl_divergence(*(Bernoulli(logits=each.mask_logits) for each in (wanted, got)))
    else:
        masks = kl_divergence(*(Categorical(logits=each.mask_logits.movedim(1, -1)) for each in (wanted, got)))
    torch.testing.assert_close(segments_change(spec)(got, wanted), classes + masks.flatten(1).mean(1))
    torch.testing.assert_close(segments_change(spec)(got, got), torch.zeros(2), atol=1e-6, rtol=0)


def test_squared_change_of_structures() -> None:
    wanted = {"a": torch.tensor([[3.0, 4.0], [0.0, 0.0]]), "ids": torch.tensor([[1], [2]])}
    got = {"a": torch.tensor([[3.0, 5.0], [0.0, 0.0]]), "ids": torch.tensor([[7], [2]])}
    assert squared_change(got, wanted).tolist() == pytest.approx([1 / 25, 0.0])


def test_bad_sensitivity(line: Graph) -> None:
    with pytest.raises(InputError, match="images: wanted at least one to measure sensitivity with, got none"):
        sensitivity(line, [], {INPUT: HALVES}, squared_change)
    with pytest.raises(InputError, match="got NaN or infinity at the site '0/linear/weight'"):
        sensitivity(line, [torch.ones(1, 2)], {WEIGHT: HALVES}, lambda got, wanted: got[:, 0] * math.nan)
    assert sensitivity(line, [torch.zeros(1, 2)], {WEIGHT: HALVES}, squared_change) == {WEIGHT: Score(0.0, 0.0, 0.0)}


class Bend(nn.Module):
    """Two layers, of which the second reads what the Hessian is of."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.gelu(self.first(x)))


def exact_row_sums(model: Bend, x: Tensor, temperature: float) -> Tensor:
    """Magnitudes of the sums of the rows of the Hessian of KL at the input of the second layer, in float64."""
    model = model.double()
    with torch.no_grad():
        site = F.gelu(model.first(x.double()))
        wanted = model.second(site)

    def change(moved: Tensor) -> Tensor:
        return kl_change(temperature)(model.second(moved[None]), wanted)[0]

    hessian = torch.autograd.functional.hessian(change, site[0])
    model.float()
    assert isinstance(hessian, Tensor)
    return hessian.sum(dim=1).abs()[None].float()


def test_perturbation_hessian_against_the_exact_one() -> None:
    torch.manual_seed(0)
    model = Bend()
    x = torch.randn(3, 3)
    for temperature in (1.0, 20.0):
        wanted = torch.stack([exact_row_sums(model, image, temperature) for image in x.split(1)]).mean(0)
        graph = capture(model, x, free=BATCHES)
        got = perturbation_hessian(graph, [x], ["second/linear/input"], kl_change(temperature))["second/linear/input"]
        torch.testing.assert_close(got, wanted, rtol=1e-2, atol=1e-3 * wanted.max().item())


def test_perturbation_hessian_worked_by_hand(line: Graph) -> None:
    def half_square(got: Tensor, wanted: Tensor) -> Tensor:
        return 0.5 * (got - wanted).square().sum(dim=1)

    # y = w x: the Hessian in x is w w^T, whose rows sum to w_i (w_1 + w_2).
    hessian = perturbation_hessian(line, [torch.rand(2, 2)], [INPUT], half_square)[INPUT]
    torch.testing.assert_close(hessian, torch.tensor([[2 * 2.6, 0.6 * 2.6]]), rtol=1e-3, atol=0)
    with pytest.raises(InputError, match="Hessian: wanted finite numbers, got NaN or infinity at the site"):
        perturbation_hessian(line, [torch.rand(1, 2)], [INPUT], lambda got, _: got[:, 0] * math.nan)
    with pytest.raises(InputError, match="got none"):
        perturbation_hessian(line, [], [INPUT], half_square)
