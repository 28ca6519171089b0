"""Depth losses by their definitions, by hand, and where nothing is known."""

import math

import pytest
import torch
from torch import Tensor

from denselab.errors import InputError
from denselab.losses.depth import DepthLossWeights, aligned_l1, depth_loss, gradient_matching, known_mean, silog

EVERY = DepthLossWeights(silog=1, l1=0.5, log_l1=2, aligned=0.25, gradient=3)


def sample(seed: int, size: tuple[int, int, int] = (2, 6, 9)) -> tuple[Tensor, Tensor]:
    """Metres predicted, with gradient, and true, a quarter of them unknown."""
    generator = torch.Generator().manual_seed(seed)
    pred_m = 0.5 + 9 * torch.rand(size, generator=generator, dtype=torch.float64)
    target_m = 0.5 + 9 * torch.rand(size, generator=generator, dtype=torch.float64)
    target_m[torch.rand(size, generator=generator) < 0.25] = 0
    return pred_m.requires_grad_(), target_m


def log_ratios(pred_m: Tensor, target_m: Tensor) -> list[list[float]]:
    return [
        [math.log(p / t) for p, t in zip(p.flatten().tolist(), t.flatten().tolist(), strict=True) if t > 0]
        for p, t in zip(pred_m, target_m, strict=True)
    ]


@pytest.mark.parametrize("focus", [0.0, 0.5, 0.85, 1.0])
def test_silog_by_pairs_of_pixels(focus: float) -> None:
    """Eigen et al., eq. 2 and 4: the variance is half the mean squared difference over all pairs of pixels."""
    pred_m, target_m = sample(1)
    known = target_m > 0
    log_ratio = pred_m.log() - target_m.where(known, 1).log()
    expected = 0.0
    for ratios in log_ratios(pred_m, target_m):
        pairs = sum((a - b) ** 2 for a in ratios for b in ratios) / (2 * len(ratios) ** 2)
        squares = sum(a**2 for a in ratios) / len(ratios)
        expected += 10 * math.sqrt(focus * pairs + (1 - focus) * squares) / 2
    assert silog(log_ratio, known, variance_focus=focus).item() == pytest.approx(expected)


def test_values_worked_by_hand() -> None:
    pred_m, target_m = torch.tensor([[[2.0, 4, 8, 7]]]), torch.tensor([[[1.0, 4, 4, 0]]])
    _, parts = depth_loss(pred_m, target_m, EVERY)
    ln2 = math.log(2)  # log ratios ln2, 0, ln2: mean 2/3, mean square 2/3
    assert parts["silog"].item() == pytest.approx(10 * ln2 * math.sqrt(2 / 3 - 0.85 * 4 / 9))
    assert parts["l1"].item() == pytest.approx(5 / 3)
    assert parts["log_l1"].item() == pytest.approx(2 / 3 * ln2)
    # scale 1: two steps of ln2 over three pixels; scale 2: one pair (ln2, ln2); coarser: a single pixel
    assert parts["gradient"].item() == pytest.approx(2 * ln2 / 3)
    # disparities 1/2 1/4 1/8 and 1 1/4 1/4 about their median 1/4: spreads 1/8 and 1/4, so 2 0 -1 and 3 0 0
    assert parts["aligned"].item() == pytest.approx((0 + 1 + 1) / 6)
    three = aligned_l1(1 / pred_m, 1 / target_m.where(target_m > 0, 1), target_m > 0, kept=0.5)
    assert three.item() == pytest.approx((0 + 1) / 6)


def test_invariances() -> None:
    pred_m, target_m = sample(2)
    known = target_m > 0
    factor = torch.tensor([3.0, 0.2]).view(2, 1, 1)

    def log_ratio(metres: Tensor) -> Tensor:
        return metres.log() - target_m.where(known, 1).log()

    before = silog(log_ratio(pred_m), known, variance_focus=1)
    assert silog(log_ratio(factor * pred_m), known, variance_focus=1).item() == pytest.approx(before.item())
    moved = aligned_l1(factor * pred_m + 4, target_m, known)
    assert moved.item() == pytest.approx(aligned_l1(pred_m, target_m, known).item())
    slopes = gradient_matching(log_ratio(factor * pred_m), known)
    assert slopes.item() == pytest.approx(gradient_matching(log_ratio(pred_m), known).item())


def test_unknown_pixels_count_nowhere() -> None:
    pred_m, target_m = sample(3)
    changed = pred_m.detach() + 100 * (target_m == 0)
    assert depth_loss(changed, target_m, EVERY)[0].item() == pytest.approx(
        depth_loss(pred_m, target_m, EVERY)[0].item()
    )
    total, parts = depth_loss(pred_m, target_m, EVERY)
    gradient = torch.autograd.grad(total, pred_m)[0]
    assert gradient[target_m == 0].abs().max() == 0
    assert total.item() == pytest.approx(sum(getattr(EVERY, name) * part.item() for name, part in parts.items()))
    assert not any(part.requires_grad for part in parts.values())


def test_images_without_a_known_pixel_are_left_out() -> None:
    pred_m, target_m = sample(4)
    target_m[1] = 0
    alone = depth_loss(pred_m[:1], target_m[:1], EVERY)[0]
    total = depth_loss(pred_m, target_m, EVERY)[0]
    assert total.item() == pytest.approx(alone.item())
    none = depth_loss(pred_m, torch.zeros_like(target_m), EVERY)[0]
    assert none.item() == 0
    assert torch.autograd.grad(none, pred_m)[0].abs().max() == 0


def test_perfect_constant_and_impossible_predictions_have_finite_gradients() -> None:
    target_m = torch.tensor([[[1.0, 2], [3, 0]]])
    for values in ([[1.0, 2], [3, 4]], [[2.0, 2], [2, 2]], [[0.0, -1], [3, 0]]):
        pred_m = torch.tensor([values], requires_grad=True)
        total, _ = depth_loss(pred_m, target_m, EVERY)
        gradient = torch.autograd.grad(total, pred_m)[0]
        assert total.isfinite()
        assert gradient.isfinite().all()
    perfect, _ = depth_loss(target_m.clone(), target_m, EVERY)
    assert perfect.item() == pytest.approx(0, abs=1e-6)
    below = torch.tensor([[[-1.0]]], requires_grad=True)
    log_l1, _ = depth_loss(below, torch.ones(1, 1, 1), DepthLossWeights(silog=0, log_l1=1))
    assert torch.autograd.grad(log_l1, below)[0].item() < 0  # upwards


def test_gradients_by_finite_differences() -> None:
    pred_m, target_m = sample(5, size=(2, 3, 4))
    known = target_m > 0

    def losses(metres: Tensor) -> tuple[Tensor, ...]:
        ratio = metres.log() - target_m.where(known, 1).log()
        return silog(ratio, known), known_mean(ratio.square(), known), gradient_matching(ratio, known)

    assert torch.autograd.gradcheck(losses, (pred_m,))


def test_float32_under_autocast() -> None:
    pred_m, target_m = sample(6)
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = depth_loss(pred_m.bfloat16(), target_m.float(), EVERY)
    exact, _ = depth_loss(pred_m.bfloat16().double(), target_m, EVERY)
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(exact.item(), rel=1e-4)


@pytest.mark.parametrize("bad", [{"silog": 0.0}, {"l1": -1.0}, {"gradient": math.nan}])
def test_weights_that_make_no_sense(bad: dict[str, float]) -> None:
    with pytest.raises(InputError, match=r"depth weights: wanted numbers >= 0, one of them above 0, got "):
        DepthLossWeights(**bad)
