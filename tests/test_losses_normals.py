"""Normal losses by hand, against torch's own, and at the angles where gradients break."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from denselab.errors import InputError
from denselab.losses.normals import NormalsLossWeights, normals_loss, truncated_angle

EVERY = NormalsLossWeights(cosine=0.5, angular=2, l2=0.25)


def sample(seed: int) -> tuple[Tensor, Tensor]:
    """Vectors predicted, with gradient, and true, a quarter of them unknown."""
    generator = torch.Generator().manual_seed(seed)
    pred = torch.randn(2, 3, 4, 5, generator=generator)
    target = F.normalize(torch.randn(2, 3, 4, 5, generator=generator), dim=1)
    known = torch.rand(2, 1, 4, 5, generator=generator) > 0.25
    return pred.requires_grad_(), target * known


def at_angle(degrees: float, length: float = 1.0) -> tuple[Tensor, Tensor]:
    """One pixel whose prediction is turned by an angle against the camera's axis."""
    angle = math.radians(degrees)
    pred = length * torch.tensor([math.sin(angle), 0, -math.cos(angle)]).view(1, 3, 1, 1)
    return pred.requires_grad_(), torch.tensor([0.0, 0, -1]).view(1, 3, 1, 1)


@pytest.mark.parametrize("degrees", [0.5, 30.0, 60.0, 89.0])
def test_acute_angles(degrees: float) -> None:
    pred, target = at_angle(degrees, length=2.5)
    _, parts = normals_loss(pred, target, EVERY)
    assert parts["angular"].item() == pytest.approx(math.radians(degrees), rel=1e-3)
    assert parts["cosine"].item() == pytest.approx(1 - math.cos(math.radians(degrees)), abs=1e-6)
    assert parts["l2"].item() == pytest.approx(1 + 2.5**2 - 2 * 2.5 * math.cos(math.radians(degrees)))


def test_obtuse_angles_go_on_straight() -> None:
    for degrees in (90.0, 120.0, 180.0):
        _, parts = normals_loss(*at_angle(degrees), EVERY)
        assert parts["angular"].item() == pytest.approx(math.pi / 2 - math.cos(math.radians(degrees)), abs=1e-6)


@pytest.mark.parametrize("degrees", [0.0, 1e-4, 0.08, 0.1, 90.0, 179.999, 180.0])
@pytest.mark.parametrize("length", [1.0, 1e-8, 1e4])
def test_gradients_are_finite_everywhere(degrees: float, length: float) -> None:
    pred, target = at_angle(degrees, length)
    gradient = torch.autograd.grad(normals_loss(pred, target, EVERY)[0], pred)[0]
    assert gradient.isfinite().all()


def test_a_prediction_of_zeros() -> None:
    pred, target = torch.zeros(1, 3, 1, 1, requires_grad=True), torch.tensor([0.0, 0, -1]).view(1, 3, 1, 1)
    gradient = torch.autograd.grad(normals_loss(pred, target, EVERY)[0], pred)[0]
    assert gradient.isfinite().all()
    assert gradient[0, 2] > 0  # towards -z


def test_cosine_is_that_of_torch_and_unknown_pixels_count_nowhere() -> None:
    pred, target = sample(1)
    known = target.abs().sum(dim=1) > 0
    total, parts = normals_loss(pred, target, EVERY)
    expected = 1 - F.cosine_similarity(pred, target, dim=1)
    means = [one[seen].mean() for one, seen in zip(expected, known, strict=True)]
    assert parts["cosine"].item() == pytest.approx(torch.stack(means).mean().item())
    assert total.item() == pytest.approx(sum(getattr(EVERY, name) * part.item() for name, part in parts.items()))
    gradient = torch.autograd.grad(total, pred)[0]
    assert gradient.movedim(1, -1)[~known].abs().max() == 0
    assert gradient.movedim(1, -1)[known].abs().min() > 0


def test_nothing_known_costs_nothing() -> None:
    pred, target = sample(2)
    total, _ = normals_loss(pred, torch.zeros_like(target), EVERY)
    assert total.item() == 0
    assert torch.autograd.grad(total, pred)[0].abs().max() == 0


def test_truncated_angle_is_smooth() -> None:
    cosine = torch.linspace(-1, 1, 2001, dtype=torch.float64)
    angle = truncated_angle(cosine)
    assert (angle.diff() <= 0).all()
    assert angle.diff().abs()[:-3].max() < 0.02  # no jump where the pieces meet
    slope = torch.autograd.functional.jacobian(lambda x: truncated_angle(x).sum(), torch.tensor([-1e-9, 1e-9]))
    assert slope.tolist() == pytest.approx([-1, -1], abs=1e-6)


def test_float32_under_autocast() -> None:
    pred, target = sample(3)
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = normals_loss(pred.bfloat16(), target, EVERY)
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(normals_loss(pred.bfloat16().float(), target, EVERY)[0].item())


@pytest.mark.parametrize("bad", [{"angular": 0.0, "l2": 0.0}, {"cosine": -1.0}, {"l2": math.inf}])
def test_weights_that_make_no_sense(bad: dict[str, float]) -> None:
    with pytest.raises(InputError, match=r"normals weights: wanted numbers >= 0, one of them above 0, got "):
        NormalsLossWeights(**bad)
