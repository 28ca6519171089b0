"""Per-pixel losses against slow definitions, hand-worked values and batches without labels."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from denselab.errors import InputError
from denselab.losses.pixel import (
    LossWeights,
    cross_entropy,
    dice,
    inverse_log_weights,
    lovasz_softmax,
    ohem_cross_entropy,
    pixel_loss,
)

Loss = Callable[[Tensor, Tensor], Tensor]
LOSSES: list[Loss] = [cross_entropy, ohem_cross_entropy, dice, lovasz_softmax]


def sample(seed: int, classes: int = 4, size: tuple[int, int, int] = (2, 5, 6)) -> tuple[Tensor, Tensor]:
    """Logits [B, K, H, W] with gradient, and targets of which a fifth are ignored and class K-1 is absent."""
    generator = torch.Generator().manual_seed(seed)
    batch, height, width = size
    logits = 2 * torch.randn(batch, classes, height, width, generator=generator, dtype=torch.float64)
    target = torch.randint(0, classes - 1, size, generator=generator)
    target[torch.rand(size, generator=generator) < 0.2] = 255
    return logits.requires_grad_(), target


def labelled_pixels(logits: Tensor, target: Tensor) -> list[tuple[Tensor, int]]:
    """Class probabilities [K] and true class of every labelled pixel."""
    probs = logits.detach().softmax(1).movedim(1, -1).reshape(-1, logits.shape[1])
    return [(p, int(t)) for p, t in zip(probs, target.flatten(), strict=True) if t != 255]


def logits_of(probs: list[list[float]]) -> Tensor:
    """Logits [1, K, 1, P] whose softmax is `probs`, one list of K per pixel."""
    return torch.tensor(probs).log().T[None, :, None]


def jaccard_loss_of_mistakes(truth: list[bool], mistakes: set[int]) -> float:
    """Berman et al. 2018, eq. 6: |M| / |{y = c} or M|, 1 - IoU when exactly the pixels M are wrong."""
    union = {i for i, positive in enumerate(truth) if positive} | mistakes
    return len(mistakes) / len(union) if union else 0.0


def lovasz_extension(truth: list[bool], errors: list[float]) -> float:
    """Its definition as a Choquet integral: of the set loss at {i : error_i >= level} over all levels 0..1."""
    levels = sorted({0.0, *errors})
    return sum(
        (upper - lower) * jaccard_loss_of_mistakes(truth, {i for i, error in enumerate(errors) if error >= upper})
        for lower, upper in pairwise(levels)
    )


@pytest.mark.parametrize("seed", range(3))
def test_cross_entropy_by_its_definition(seed: int) -> None:
    logits, target = sample(seed)
    class_weights = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
    pixels = labelled_pixels(logits, target)
    assert cross_entropy(logits, target).item() == pytest.approx(
        sum(-p[t].log().item() for p, t in pixels) / len(pixels)
    )
    weighted = sum((-class_weights[t] * p[t].log()).item() for p, t in pixels) / sum(
        class_weights[t].item() for _, t in pixels
    )
    assert cross_entropy(logits, target, class_weights=class_weights).item() == pytest.approx(weighted)
    assert weighted == pytest.approx(F.cross_entropy(logits, target, class_weights, ignore_index=255).item())


@pytest.mark.parametrize("seed", range(3))
def test_dice_by_its_definition(seed: int) -> None:
    logits, target = sample(seed)
    pixels = labelled_pixels(logits, target)
    coefficients = []
    for each in range(3):
        overlap = sum(p[each].item() for p, t in pixels if t == each)
        sizes = sum(p[each].item() + (t == each) for p, t in pixels)
        coefficients.append(2 * overlap / sizes)
    assert dice(logits, target).item() == pytest.approx(1 - sum(coefficients) / 3)


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.7, 0.99])
@pytest.mark.parametrize("min_kept", [0.0, 1 / 16, 0.5, 1.0])
def test_ohem_by_its_definition(threshold: float, min_kept: float) -> None:
    logits, target = sample(3)
    losses = sorted((-p[t].log().item() for p, t in labelled_pixels(logits, target)), reverse=True)
    hard = [loss for loss in losses if loss > -math.log(threshold)]
    fewest = math.ceil(min_kept * len(losses))
    kept = hard if len(hard) >= fewest else losses[:fewest]
    found = ohem_cross_entropy(logits, target, threshold=threshold, min_kept=min_kept)
    assert found.item() == pytest.approx(sum(kept) / len(kept) if kept else 0)


@pytest.mark.parametrize("seed", range(5))
def test_lovasz_is_the_extension_of_the_jaccard_loss(seed: int) -> None:
    logits, target = sample(seed, size=(2, 2, 3))
    pixels = labelled_pixels(logits, target)
    present = sorted({t for _, t in pixels})
    expected = []
    for each in present:
        truth = [t == each for _, t in pixels]
        expected.append(
            lovasz_extension(truth, [1 - p[each].item() if t == each else p[each].item() for p, t in pixels])
        )
    assert lovasz_softmax(logits, target).item() == pytest.approx(sum(expected) / len(expected))


def test_lovasz_at_hard_predictions_is_one_minus_iou() -> None:
    predicted, target = torch.tensor([0, 0, 1, 1, 1, 0]), torch.tensor([0, 1, 1, 1, 0, 255])
    logits = 1e3 * F.one_hot(predicted, 2).T[None, :, None].float()
    # class 0: 1 hit of 3 in the union; class 1: 2 of 4
    assert lovasz_softmax(logits, target[None, None]).item() == pytest.approx(1 - (1 / 3 + 2 / 4) / 2)


def test_values_worked_by_hand() -> None:
    logits = logits_of([[0.8, 0.2], [0.4, 0.6], [0.9, 0.1]])
    target = torch.tensor([[[0, 1, 1]]])
    assert cross_entropy(logits, target).item() == pytest.approx(-math.log(0.8 * 0.6 * 0.1) / 3)
    # OHEM at 0.7 keeps the second and third; weights 1 and 3 weigh both alike
    hard = -math.log(0.6 * 0.1) / 2
    assert ohem_cross_entropy(logits, target).item() == pytest.approx(hard)
    assert ohem_cross_entropy(logits, target, class_weights=torch.tensor([1.0, 3.0])).item() == pytest.approx(hard)
    # at 0.05 none is hard; a third of three pixels is the worst one
    worst = ohem_cross_entropy(logits, target, threshold=0.05, min_kept=1 / 3)
    assert worst.item() == pytest.approx(-math.log(0.1))
    # Dice: class 0 is 2*0.8 / (2.1 + 1), class 1 is 2*0.7 / (0.9 + 2)
    assert dice(logits, target).item() == pytest.approx(1 - (1.6 / 3.1 + 1.4 / 2.9) / 2)
    # Lovasz, class 0: errors 0.9 0.4 (others) 0.2 (its own); the loss grows 1/2, 2/3, 1
    class_0 = 0.9 * 1 / 2 + 0.4 * (2 / 3 - 1 / 2) + 0.2 * (1 - 2 / 3)
    # class 1: errors 0.9 0.4 (its own) 0.2 (other); the loss grows 1/2, 1, 1
    class_1 = 0.9 * 1 / 2 + 0.4 * 1 / 2
    assert lovasz_softmax(logits, target).item() == pytest.approx((class_0 + class_1) / 2)


def test_inverse_log_weights_worked_by_hand() -> None:
    weights = inverse_log_weights(torch.tensor([3.0, 1.0, 0.0]), offset=1.02)
    assert weights.tolist() == pytest.approx([1 / math.log(1.77), 1 / math.log(1.27), 1 / math.log(1.02)], rel=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
def test_ignored_pixels_count_nowhere(loss: Loss) -> None:
    logits, target = sample(7)
    changed = logits.detach() + 50 * (target == 255)[:, None] * torch.randn_like(logits)
    assert loss(changed, target).item() == pytest.approx(loss(logits, target).item())
    gradient = torch.autograd.grad(loss(logits, target), logits)[0]
    assert gradient.isfinite().all()
    assert gradient.movedim(1, -1)[target == 255].abs().max() == 0


@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_labelled_costs_nothing(loss: Loss) -> None:
    logits, target = sample(1)
    value = loss(logits, torch.full_like(target, 255))
    assert value.item() == 0
    assert torch.autograd.grad(value, logits)[0].abs().max() == 0


@pytest.mark.parametrize("loss", LOSSES)
def test_one_pixel_and_perfect_prediction(loss: Loss) -> None:
    logits = torch.tensor([50.0, 0.0]).view(1, 2, 1, 1).requires_grad_()
    value = loss(logits, torch.zeros(1, 1, 1, dtype=torch.long))
    assert value.item() == pytest.approx(0, abs=1e-6)
    assert torch.autograd.grad(value, logits)[0].isfinite().all()


@pytest.mark.parametrize("loss", [cross_entropy, dice, lovasz_softmax])
def test_gradients_by_finite_differences(loss: Loss) -> None:
    logits, target = sample(2, size=(1, 2, 3))
    assert torch.autograd.gradcheck(lambda x: loss(x, target), (logits,))


def test_pixel_loss_adds_its_parts() -> None:
    logits, target = sample(4)
    logits = logits.detach().float().requires_grad_()
    class_weights = torch.tensor([1.0, 2.0, 0.5, 3.0])
    weights = LossWeights(cross_entropy=0.5, ohem=1, dice=2, lovasz=0.25)
    total, parts = pixel_loss(logits, target, weights, class_weights=class_weights)
    assert parts["cross_entropy"].item() == pytest.approx(cross_entropy(logits, target, 255, class_weights).item())
    assert parts["ohem"].item() == pytest.approx(ohem_cross_entropy(logits, target, 255, class_weights).item())
    expected = 0.5 * parts["cross_entropy"] + parts["ohem"] + 2 * parts["dice"] + 0.25 * parts["lovasz"]
    assert total.item() == pytest.approx(expected.item())
    assert total.requires_grad
    assert not parts["dice"].requires_grad


def test_pixel_loss_leaves_out_what_has_no_weight_and_works_in_float32() -> None:
    logits, target = sample(5)
    with torch.autocast("cpu", torch.bfloat16):
        total, parts = pixel_loss(logits.bfloat16(), target, LossWeights(lovasz=1))
    assert list(parts) == ["cross_entropy", "lovasz"]
    assert total.dtype == torch.float32
    exact = cross_entropy(logits.bfloat16().double(), target) + lovasz_softmax(logits.bfloat16().double(), target)
    assert total.item() == pytest.approx(exact.item(), rel=1e-5)


@pytest.mark.parametrize("bad", [{"cross_entropy": 0.0}, {"dice": -1.0}, {"lovasz": math.nan}, {"ohem": math.inf}])
def test_loss_weights_that_make_no_sense(bad: dict[str, float]) -> None:
    with pytest.raises(InputError, match=r"loss weights: wanted numbers >= 0, one of them above 0, got LossWeights\("):
        LossWeights(**bad)
