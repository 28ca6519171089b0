"""The objective of MaskFormer and Mask2Former against transformers', by hand, and where there is nothing to learn."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from denselab import _vision  # noqa: F401 (transformers imports torchvision)
from denselab.losses import mask_classification
from denselab.losses.mask_classification import (
    MASK2FORMER,
    MASKFORMER,
    MaskClassificationWeights,
    PixelLoss,
    class_loss,
    dice_loss,
    logits_at,
    mask_classification_loss,
    matching_cost,
    pixel_loss,
)
from denselab.losses.matching import match
from denselab.types import HeadSpec, MaskNorm, QueryOutput, SegmentTargets, ValueKind

QUERIES, CLASSES, HEIGHT, WIDTH = 6, 4, 5, 7


def spec_of(layers: int = 0, stride: int = 1) -> HeadSpec:
    one = HeadSpec(QUERIES, CLASSES + 1, stride, MaskNorm.SIGMOID, ValueKind.CLASS_LOGITS)
    return replace(one, aux=(one,) * layers)


def sample(
    seed: int, counts: tuple[int, ...] = (3, 5), stride: int = 1
) -> tuple[QueryOutput, tuple[SegmentTargets, ...]]:
    """An output with two earlier layers, and images tiled by segments, the first by overlapping ones."""
    generator = torch.Generator().manual_seed(seed)
    size = (HEIGHT * stride, WIDTH * stride)

    def layer() -> QueryOutput:
        masks = 2 * torch.randn(len(counts), QUERIES, HEIGHT, WIDTH, generator=generator)
        classes = torch.randn(len(counts), QUERIES, CLASSES + 1, generator=generator)
        return QueryOutput(masks.requires_grad_(), classes.requires_grad_())

    targets: list[SegmentTargets] = []
    for count in counts:
        ids = torch.randint(max(count, 1), size, generator=generator)
        masks = ids == torch.arange(count)[:, None, None]
        if not targets and count > 1:
            masks[0] |= masks[1]
        targets.append(SegmentTargets(masks, torch.randint(CLASSES, (count,), generator=generator)))
    return replace(layer(), aux=(layer(), layer())), tuple(targets)


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch):
    """transformers' loss, its points made the middles of all cells: what it reads there bilinearly are the cells."""
    from transformers import Mask2FormerConfig
    from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

    right, down = (torch.arange(WIDTH) + 0.5) / WIDTH, (torch.arange(HEIGHT) + 0.5) / HEIGHT
    middles = torch.stack([right.expand(HEIGHT, -1), down[:, None].expand(-1, WIDTH)], dim=2).view(1, -1, 2)
    rand = torch.rand

    def points(*shape: int, **options: object) -> Tensor:
        return middles if shape == middles.shape else rand(*shape, **options)

    monkeypatch.setattr(torch, "rand", points)
    config = Mask2FormerConfig(num_labels=CLASSES, train_num_points=HEIGHT * WIDTH)
    loss = Mask2FormerLoss(config, {})
    monkeypatch.setattr(loss, "sample_points_using_uncertainty", lambda logits, *_: middles.expand(len(logits), -1, -1))
    return loss


@pytest.mark.parametrize("seed", range(4))
def test_losses_and_gradients_are_those_of_transformers(published, seed: int) -> None:
    output, targets = sample(seed)
    earlier = [{"masks_queries_logits": a.mask_logits, "class_queries_logits": a.values} for a in output.aux]
    theirs = published(
        output.mask_logits,
        output.values,
        [each.masks.float() for each in targets],
        [each.class_ids for each in targets],
        earlier,
    )
    total, parts = mask_classification_loss(output, spec_of(2), targets)
    names = {"class": ("loss_cross_entropy", 2), "mask": ("loss_mask", 5), "dice": ("loss_dice", 5)}
    assert len(parts) == len(theirs) == 9
    expected = torch.zeros(())
    for ours, (name, weight) in names.items():
        for suffix in ("", "_0", "_1"):
            assert parts[ours + suffix].item() == pytest.approx(theirs[name + suffix].item(), rel=1e-5)
            expected = expected + weight * theirs[name + suffix]
    leaves = [leaf for each in (output, *output.aux) for leaf in (each.mask_logits, each.values)]
    for found, gradient in zip(torch.autograd.grad(total, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(found, gradient)


@pytest.mark.parametrize("seed", range(4))
def test_matching_is_that_of_transformers(published, seed: int) -> None:
    output, targets = sample(seed, counts=(5, 8))
    pairs = published.matcher(
        output.mask_logits,
        output.values,
        [each.masks.float() for each in targets],
        [each.class_ids for each in targets],
    )
    for index, (each, (queries, segments)) in enumerate(zip(targets, pairs, strict=True)):
        known = torch.ones(HEIGHT, WIDTH)
        cost = matching_cost(
            output.mask_logits[index],
            output.values[index],
            each.class_ids,
            each.masks.float(),
            known,
            MASK2FORMER,
        )
        (ours,) = match([cost])
        assert (ours.queries.tolist(), ours.segments.tolist()) == (queries.tolist(), segments.tolist())


def test_least_certain_points_are_those_of_transformers() -> None:
    from transformers import Mask2FormerConfig
    from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

    loss = Mask2FormerLoss(Mask2FormerConfig(num_labels=CLASSES), {})
    mask_logits = F.pad(torch.randn(3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0)), (1, 1, 1, 1))
    torch.manual_seed(1)
    expected = loss.sample_points_using_uncertainty(mask_logits[:, None], loss.calculate_uncertainty, 40, 3.0, 0.75)
    image = SegmentTargets(torch.ones(1, HEIGHT + 2, WIDTH + 2, dtype=torch.bool), torch.tensor([0]))
    truth = mask_classification._truth(image, (HEIGHT + 2, WIDTH + 2), 1)
    weights = MaskClassificationWeights(points=40)
    found = mask_classification._points(mask_logits, truth, weights, torch.Generator().manual_seed(1))
    torch.testing.assert_close(found, expected)


def test_values_worked_by_hand() -> None:
    three = math.log(3)
    logits, inside = torch.tensor([[three, -three, 0]]), torch.tensor([[1.0, 0, 0]])  # probabilities 3/4 1/4 1/2
    known = torch.tensor([[1.0, 1, 0]])
    entropy = pixel_loss(logits, inside, known, PixelLoss.CROSS_ENTROPY)
    assert entropy.item() == pytest.approx(-math.log(0.75))
    focal = pixel_loss(logits, inside, known, PixelLoss.FOCAL)
    assert focal.item() == pytest.approx(-(0.25 + 0.75) / 2 * 0.25**2 * math.log(0.75))
    assert dice_loss(logits, inside, known).item() == pytest.approx(1 - (2 * 0.75 + 1) / (0.75 + 0.25 + 1 + 1))
    half = torch.tensor([[0.5]])
    shared = pixel_loss(torch.tensor([[three]]), half, torch.ones(1, 1), PixelLoss.CROSS_ENTROPY)
    assert shared.item() == pytest.approx(-(math.log(0.75) + math.log(0.25)) / 2)
    # two queries over two classes and no object: ln 3 each, weights 1 and 0.1
    found = class_loss(torch.tensor([[[0.0, 0, 0], [0, 0, three]]]), torch.tensor([[0, 2]]), 0.1)
    assert found.item() == pytest.approx((three - 0.1 * math.log(3 / 5)) / 1.1)


@pytest.mark.parametrize("kind", PixelLoss)
def test_cost_of_a_pair_is_its_loss(kind: PixelLoss) -> None:
    output, targets = sample(5)
    weights = MaskClassificationWeights(class_=0, mask=3, dice=7, pixel_loss=kind)
    known = torch.rand(HEIGHT, WIDTH, generator=torch.Generator().manual_seed(2))
    masks = targets[1].masks * known
    cost = matching_cost(output.mask_logits[1], output.values[1], targets[1].class_ids, masks, known, weights)
    for query in range(QUERIES):
        logits = output.mask_logits[1, query].expand(len(masks), -1, -1).flatten(1)
        pixels = pixel_loss(logits, masks.flatten(1), known.flatten()[None], kind)
        dices = dice_loss(logits, masks.flatten(1), known.flatten()[None])
        torch.testing.assert_close(cost[query], (3 * pixels + 7 * dices).detach())


def test_focal_loss_is_that_of_torchvision_on_probabilities() -> None:
    logits = torch.randn(2, 9, generator=torch.Generator().manual_seed(3))
    inside = (torch.rand(2, 9, generator=torch.Generator().manual_seed(4)) < 0.5).float()
    from torchvision.ops import sigmoid_focal_loss

    expected = sigmoid_focal_loss(logits, inside, alpha=0.25, gamma=2).mean(dim=1)
    torch.testing.assert_close(pixel_loss(logits, inside, torch.ones(1, 9), PixelLoss.FOCAL), expected)


def test_even_points_say_on_average_what_cells_say() -> None:
    """Expected loss over even points of an image whose left half is one mask, at constant logits."""
    masks = torch.zeros(2, 16, 32, dtype=torch.bool)
    masks[0, :, :16], masks[1, :, 16:] = True, True
    target = SegmentTargets(masks, torch.tensor([0, 1]))
    mask_logits = torch.zeros(1, 2, 4, 8)
    mask_logits[0, 0], mask_logits[0, 1] = 1.0, -2.0
    output = QueryOutput(mask_logits.requires_grad_(), torch.zeros(1, 2, 3))
    spec = HeadSpec(2, 3, 4, MaskNorm.SIGMOID, ValueKind.CLASS_LOGITS)
    _, cells = mask_classification_loss(output, spec, (target,))
    few = MaskClassificationWeights(points=31, important=0)
    generator = torch.Generator().manual_seed(0)
    draws = [mask_classification_loss(output, spec, (target,), few, generator)[1]["mask"].item() for _ in range(60)]
    assert sum(draws) / 60 == pytest.approx(cells["mask"].item(), rel=0.05)
    assert min(draws) < max(draws)


def test_points_read_true_masks_at_input_size() -> None:
    masks = torch.zeros(1, 6, 10, dtype=torch.bool)
    masks[0, 2, 7] = True
    image = SegmentTargets(masks, torch.tensor([0]), torch.zeros(6, 10, dtype=torch.bool))
    truth = mask_classification._truth(image, (2, 3), 4)  # the grid covers 8x12 px
    points = torch.tensor([[[7.5 / 12, 2.5 / 8], [6.9 / 12, 2.5 / 8], [11 / 12, 2.5 / 8], [7.5 / 12, 6.1 / 8]]])
    inside, known = mask_classification._at_points(truth, torch.tensor([0]), points)
    assert inside.tolist() == [[1, 0, 0, 0]]
    assert known.tolist() == [[1, 1, 0, 0]]
    assert logits_at(torch.tensor([[[0.0, 4]]]), torch.tensor([[[0.5, 0.2], [1, 1]]])).tolist() == [[2, 4]]


@pytest.mark.parametrize("points", [None, 9])
def test_void_pixels_have_no_say_in_masks(points: int | None) -> None:
    output, (first, second) = sample(6)
    first.masks[:, :, 4:] = False  # void is not told: what is in no mask is void
    void = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    void[3:] = True
    second.masks[:, 2:] = False
    targets = (first, replace(second, void=void))
    weights = MaskClassificationWeights(class_=0, points=points)
    alone = QueryOutput(output.mask_logits, output.values)
    generator = torch.Generator().manual_seed(0)
    total, _ = mask_classification_loss(alone, spec_of(), targets, weights, generator)
    gradient = torch.autograd.grad(total, output.mask_logits)[0].abs().amax(dim=1)
    if points is None:
        assert gradient[0, :, 4:].max() == gradient[1, 3:].max() == 0
        assert gradient[0, :, :4].min() > 0
        assert gradient[1, :3].min() > 0  # row 2 is background: in no mask, and not void
    else:
        assert gradient[0, :, 5:].max() == gradient[1, 4:].max() == 0  # bilinear: neighbours of known cells


def test_images_without_segments() -> None:
    output, targets = sample(7, counts=(0, 0))
    total, parts = mask_classification_loss(output, spec_of(2), targets)
    assert parts["mask"].item() == parts["dice"].item() == 0
    assert parts["class"].item() > 0
    leaves = [output.mask_logits, output.values]
    masks, classes = torch.autograd.grad(total, leaves)
    assert masks.abs().max() == 0
    assert classes.isfinite().all()


def test_more_segments_than_queries() -> None:
    output, targets = sample(8, counts=(9, 0))
    total, _ = mask_classification_loss(output, spec_of(2), targets)
    assert total.isfinite()
    assert torch.autograd.grad(total, output.mask_logits)[0][0].abs().amax(dim=(1, 2)).min() > 0


def test_float32_under_autocast_and_repeatable_points() -> None:
    output, targets = sample(9, stride=2)
    weights = MaskClassificationWeights(points=8)

    def loss(seed: int) -> float:
        generator = torch.Generator().manual_seed(seed)
        return mask_classification_loss(output, spec_of(2, 2), targets, weights, generator)[0].item()

    plain = loss(1)
    with torch.autocast("cpu", torch.bfloat16):
        assert loss(1) == plain
    assert loss(2) != plain


def test_maskformer_weights() -> None:
    output, targets = sample(10)
    total, parts = mask_classification_loss(
        QueryOutput(output.mask_logits, output.values), spec_of(), targets, MASKFORMER
    )
    assert total.item() == pytest.approx(parts["class"].item() + 20 * parts["mask"].item() + parts["dice"].item())
