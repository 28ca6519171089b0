"""Panoptic-DeepLab's objective and targets: pixel by pixel, by hand, and without any thing."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from denselab.errors import InputError
from denselab.losses.centre_offset import (
    CentreOffsetRules,
    CentreOffsetWeights,
    bootstrapped_cross_entropy,
    centre_offset_loss,
    centre_targets,
    small_thing_weights,
)
from denselab.losses.pixel import LossWeights, dice
from denselab.types import HeadSpec, MaskNorm, QueryOutput, SegmentTargets, ValueKind

THINGS = (1, 2)


def spec_of(classes: int, stride: int) -> HeadSpec:
    return HeadSpec(classes + 3, classes + 3, stride, MaskNorm.SOFTMAX, ValueKind.CENTRE_OFFSET)


def sample(stride: int = 2) -> tuple[QueryOutput, HeadSpec, tuple[SegmentTargets, ...], Tensor]:
    """Two images of 9x14 px, three classes: road (stuff) with two things on it and void; all void."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 6, 6, 8, generator=generator).requires_grad_()
    masks = torch.zeros(3, 9, 14, dtype=torch.bool)
    masks[0, 4:], masks[1, 2:7, 1:6], masks[2, 1:4, 8:12] = True, True, True
    class_ids = torch.full((2, 9, 14), 255)
    for mask, class_id in zip(masks, (0, 1, 2), strict=True):
        class_ids[0][mask] = class_id
    none = SegmentTargets(masks[:0], torch.zeros(0, dtype=torch.long))
    output = QueryOutput(maps, torch.eye(6).expand(2, -1, -1))
    return output, spec_of(3, stride), (SegmentTargets(masks, torch.tensor([0, 1, 2])), none), class_ids


def at_full_size(masks: Tensor, sigma_px: float) -> tuple[Tensor, Tensor, Tensor]:
    """Heat, offsets and thing pixels at stride 1, by loops over pixels; later masks lie on top."""
    height, width = masks.shape[1:]
    heat, inside = torch.zeros(height, width), torch.zeros(height, width, dtype=torch.bool)
    offsets_px = torch.zeros(2, height, width)
    for mask in masks:
        places = mask.nonzero().tolist()
        down, right = (sum(axis) / len(places) for axis in zip(*places, strict=True))
        peak = (math.floor(down + 0.5), math.floor(right + 0.5))
        for row in range(height):
            for column in range(width):
                squared = (row - peak[0]) ** 2 + (column - peak[1]) ** 2
                heat[row, column] = max(heat[row, column].item(), math.exp(-squared / (2 * sigma_px**2)))
                if mask[row, column]:
                    offsets_px[:, row, column] = torch.tensor([down - row, right - column])
                    inside[row, column] = True
    return heat, offsets_px, inside


def test_targets_at_full_size_pixel_by_pixel() -> None:
    generator = torch.Generator().manual_seed(1)
    masks = torch.rand(3, 7, 9, generator=generator) < 0.3
    rules = CentreOffsetRules(sigma_px=2.5, sigma_of_side=None)
    heat, offsets_px, inside = centre_targets(masks, (7, 9), 1, rules)
    expected = at_full_size(masks, 2.5)
    torch.testing.assert_close(heat, expected[0])
    assert inside.equal(expected[2])
    torch.testing.assert_close(offsets_px * inside, expected[1])


def test_targets_on_a_grid_worked_by_hand() -> None:
    masks = torch.zeros(2, 8, 16, dtype=torch.bool)
    masks[0, :4, :8] = True  # centre 2 px down, 4 px right of the corner: on the edge of the second cell
    masks[1, 6, 13] = True  # a single pixel at (6.5, 13.5)
    heat, offsets_px, inside = centre_targets(masks, (2, 4), 4, CentreOffsetRules(sigma_of_side=None))
    assert inside.tolist() == [[True, True, False, False], [False, False, False, True]]
    assert offsets_px[:, 0, :2].tolist() == [[0, 0], [2, -2]]
    assert offsets_px[:, 1, 3].tolist() == [0.5, -0.5]
    assert heat[0, 1].item() == heat[1, 3].item() == 1
    assert heat[0, 0].item() == pytest.approx(math.exp(-16 / 128))
    assert heat[0, 2].item() == pytest.approx(max(math.exp(-16 / 128), math.exp(-32 / 128)))
    narrow = CentreOffsetRules(sigma_of_side=0.5)
    heat, _, _ = centre_targets(masks, (2, 4), 4, narrow)
    assert heat[0, 0].item() == pytest.approx(math.exp(-16 / (2 * 0.25 * 32)))
    assert heat[1, 2].item() == pytest.approx(math.exp(-32 / (2 * 0.25 * 32)))  # the pixel's own is all but 0
    heat, _, _ = centre_targets(masks[1:], (2, 4), 4, CentreOffsetRules(sigma_of_side=0.5))
    assert heat[1, 2].item() == pytest.approx(math.exp(-16 / (2 * 2**2)))  # half a cell, not half of the pixel's side


def test_no_thing_and_empty_masks() -> None:
    for masks in (torch.zeros(0, 8, 8, dtype=torch.bool), torch.zeros(2, 8, 8, dtype=torch.bool)):
        heat, offsets_px, inside = centre_targets(masks, (2, 2), 4)
        assert heat.shape == inside.shape == (2, 2)
        assert offsets_px.shape == (2, 2, 2)
        assert heat.sum() == inside.sum() == 0


def test_another_loss_of_classes_takes_the_place_of_the_published() -> None:
    output, spec, segments, class_ids = sample()
    chosen = LossWeights(cross_entropy=1, dice=0.5)
    _, parts = centre_offset_loss(output, spec, segments, class_ids, THINGS, class_loss=chosen)
    logits = F.interpolate(output.mask_logits.detach()[:, :3], scale_factor=2, mode="bilinear")[:, :, :9, :14]
    wanted = F.cross_entropy(logits, class_ids, ignore_index=255) + 0.5 * dice(logits, class_ids)
    assert parts["semantic"].item() == pytest.approx(wanted.item())


def test_hard_pixels_worked_by_hand() -> None:
    probs = torch.tensor([0.9, 0.5, 0.25, 0.8, 0.1])
    logits = torch.stack([probs, 1 - probs]).log()[None, :, None]
    target = torch.tensor([[[0, 0, 0, 0, 255]]])
    even = torch.ones(1, 1, 5)
    found = bootstrapped_cross_entropy(logits, target, even, 0.5)
    assert found.item() == pytest.approx(-(math.log(0.5) + math.log(0.25)) / 2)
    tenfold = torch.tensor([[[1.0, 1, 1, 10, 1]]])
    found = bootstrapped_cross_entropy(logits, target, tenfold, 0.25)
    assert found.item() == pytest.approx(-10 * math.log(0.8))
    whole = bootstrapped_cross_entropy(logits, target, even, 1.0)
    assert whole.item() == pytest.approx(F.cross_entropy(logits, target, ignore_index=255).item())
    assert bootstrapped_cross_entropy(logits, target, even, 1e-9).item() == pytest.approx(-math.log(0.25))


def test_small_things_weigh_more() -> None:
    masks = torch.zeros(2, 3, 6, dtype=torch.bool)
    masks[0, :2, :2], masks[1, :, 3:] = True, True
    weights = small_thing_weights(masks, CentreOffsetRules(small_px=3))
    assert weights.tolist() == [[3, 3, 1, 1, 1, 1], [3, 3, 1, 1, 1, 1], [1] * 6]
    assert small_thing_weights(masks[:0], CentreOffsetRules()).eq(1).all()


def test_the_whole_loss_by_its_definition() -> None:
    output, spec, segments, class_ids = sample()
    weights = CentreOffsetWeights(semantic=2, heat=30, offset=0.5)
    rules = CentreOffsetRules(hard_share=1.0, small_px=4, sigma_px=3)
    total, parts = centre_offset_loss(output, spec, segments, class_ids, THINGS, weights, rules)
    maps = output.mask_logits.detach()
    logits = F.interpolate(maps[:, :3], scale_factor=2, mode="bilinear")[:, :, :9, :14]
    pixel_weights = 1 + 2 * (class_ids == 2)  # the second thing has 12 of at most 16 px
    losses = F.cross_entropy(logits, class_ids, ignore_index=255, reduction="none") * pixel_weights
    assert parts["semantic"].item() == pytest.approx((losses.sum() / (class_ids != 255).sum()).item())
    heat, offsets_px, inside = centre_targets(segments[0].masks[1:], (6, 8), 2, rules)
    known = F.avg_pool2d(F.pad((class_ids[:1] != 255).float(), (0, 2, 0, 3)), 2)[0]
    errors = (maps[0, 3].sigmoid() - heat).square()
    assert parts["heat"].item() == pytest.approx(((errors * known).sum() / known.sum()).item())
    assert parts["offset"].item() == pytest.approx((maps[0, 4:] - offsets_px)[:, inside].abs().mean().item())
    assert total.item() == pytest.approx(
        2 * parts["semantic"].item() + 30 * parts["heat"].item() + 0.5 * parts["offset"].item()
    )


def test_perfect_answers_cost_nothing() -> None:
    output, spec, segments, _ = sample(stride=1)
    masks = segments[0].masks[:, :6, :8]
    segments = (SegmentTargets(masks, segments[0].class_ids),) * 2
    class_ids = torch.zeros(2, 6, 8, dtype=torch.long)
    heat, offsets_px, _ = centre_targets(masks[1:], (6, 8), 1)
    right = F.one_hot(class_ids[0], 3).movedim(2, 0) * 50.0
    maps = torch.cat([right, heat.logit(eps=1e-7)[None], offsets_px])
    total, _ = centre_offset_loss(
        replace(output, mask_logits=maps.expand(2, -1, -1, -1)), spec, segments, class_ids, THINGS
    )
    assert total.item() == pytest.approx(0, abs=1e-5)


def test_gradients_reach_every_channel_but_nothing_beyond_the_labels() -> None:
    output, spec, segments, class_ids = sample()
    total, _ = centre_offset_loss(output, spec, segments, class_ids, THINGS)
    gradient = torch.autograd.grad(total, output.mask_logits)[0]
    assert gradient.isfinite().all()
    assert (gradient[0].abs().amax(dim=(1, 2)) > 0).all()
    assert gradient[1].abs().max() == 0
    assert gradient[0, 4:, 5].abs().max() == 0  # below the image


def test_nothing_labelled_costs_nothing() -> None:
    output, spec, segments, class_ids = sample()
    none = (segments[1], segments[1])
    total, parts = centre_offset_loss(output, spec, none, torch.full_like(class_ids, 255), THINGS)
    assert total.item() == 0
    assert set(parts) == {"semantic", "heat", "offset"}
    assert torch.autograd.grad(total, output.mask_logits)[0].abs().max() == 0


def test_background_of_objects_only_teaches_that_no_centre_is_there() -> None:
    output, spec, segments, class_ids = sample()
    weights = CentreOffsetWeights(semantic=0, offset=0)
    told = replace(segments[1], void=torch.zeros(9, 14, dtype=torch.bool))
    total, _ = centre_offset_loss(output, spec, (segments[0], told), class_ids, THINGS, weights)
    gradient = torch.autograd.grad(total, output.mask_logits)[0][1, 3]
    assert (gradient[:4, :7] > 0).all()
    assert gradient[:, 7].abs().max() == 0


def test_float32_under_autocast() -> None:
    output, spec, segments, class_ids = sample()
    expected, _ = centre_offset_loss(output, spec, segments, class_ids, THINGS)
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = centre_offset_loss(output, spec, segments, class_ids, THINGS)
    assert total.item() == expected.item()


def test_heads_and_weights_that_make_no_sense() -> None:
    output, spec, segments, class_ids = sample()
    with pytest.raises(TypeError, match="value_kind: wanted CENTRE_OFFSET, got"):
        centre_offset_loss(output, replace(spec, value_kind=ValueKind.IDENTITY), segments, class_ids, THINGS)
    with pytest.raises(InputError, match=r"centre_offset weights: wanted numbers >= 0, .* got .*heat=-1"):
        CentreOffsetWeights(heat=-1)
