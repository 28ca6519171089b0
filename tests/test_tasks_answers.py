"""Depth, normals and instances out of a QueryOutput, by hand."""

import math

import pytest
import torch

from denselab.classes import Classes
from denselab.errors import InputError
from denselab.tasks import instance
from denselab.tasks.blend import at_source, mask_probs
from denselab.tasks.depth import depth_m
from denselab.tasks.instance import InstanceRules
from denselab.tasks.normals import normals
from denselab.tasks.task import InstanceTask, make_task
from denselab.types import HeadSpec, MaskNorm, QueryOutput, SegmentTargets, ValueKind

HALVES = torch.zeros(1, 2, 1, 1)


def test_depth_is_the_mean_of_values_by_mask() -> None:
    spec = HeadSpec(2, 1, 1, MaskNorm.SOFTMAX, ValueKind.BLENDED)
    masks = torch.tensor([[[[0.0, math.log(3.0)]], [[0.0, 0.0]]]])
    output = QueryOutput(masks, torch.tensor([[[2.0], [6.0]]]))
    torch.testing.assert_close(depth_m(output, spec, (1, 2)), torch.tensor([[[4.0, 3.0]]]))


def test_metres_of_a_regression_are_upsampled_and_cropped() -> None:
    spec = HeadSpec(1, 1, 2, MaskNorm.SOFTMAX, ValueKind.IDENTITY)
    output = QueryOutput(torch.tensor([[[[1.0, 3.0]]]]), torch.eye(1)[None])
    torch.testing.assert_close(depth_m(output, spec, (1, 3)), torch.tensor([[[1.0, 1.5, 2.5]]]))


def test_a_network_of_fixed_size_answers_at_the_size_of_the_photo() -> None:
    spec = HeadSpec(1, 1, 1, MaskNorm.SOFTMAX, ValueKind.IDENTITY)
    output = QueryOutput(torch.tensor([[[[1.0, 3.0]]]]), torch.eye(1)[None])
    torch.testing.assert_close(depth_m(output, spec, (1, 4), (1, 2)), torch.tensor([[[1.0, 1.5, 2.5, 3.0]]]))


def test_normals_are_blended_and_then_made_unit() -> None:
    spec = HeadSpec(2, 3, 1, MaskNorm.SOFTMAX, ValueKind.BLENDED)
    output = QueryOutput(HALVES, torch.tensor([[[0.0, 0.0, -1.0], [1.0, 0.0, 0.0]]]))
    root = math.sqrt(0.5)
    torch.testing.assert_close(normals(output, spec, (1, 1))[0, :, 0, 0], torch.tensor([root, 0.0, -root]))


def test_opposite_normals_give_finite_numbers() -> None:
    spec = HeadSpec(2, 3, 1, MaskNorm.SOFTMAX, ValueKind.BLENDED)
    values = torch.tensor([[[0.0, 0.0, -1.0], [0.0, 0.0, 1.0]]])
    assert normals(QueryOutput(HALVES, values), spec, (1, 1)).isfinite().all()


def test_instances_come_best_first_under_every_class_that_is_a_thing() -> None:
    spec = HeadSpec(2, 3, 1, MaskNorm.SIGMOID, ValueKind.CLASS_LOGITS)
    masks = torch.tensor([[[[9.0, -9.0]], [[9.0, 9.0]]]])
    class_probs = torch.tensor([[[0.2, 0.1, 0.7], [0.6, 0.3, 0.1]]])
    output = QueryOutput(masks, class_probs.log())
    found, classes, scores = instance.decode(output, spec, (1, 2), (0, 1), InstanceRules(max_instances=3))
    assert classes.tolist() == [[0, 1, 0]]
    assert found[0, :, 0].tolist() == [[1, 1], [1, 1], [1, 0]]
    torch.testing.assert_close(scores, torch.tensor([[0.6, 0.3, 0.2]]), atol=1e-3, rtol=0)


@pytest.mark.parametrize("norm", list(MaskNorm))
def test_instances_a_few_at_a_time_are_those_all_at_once(norm: MaskNorm) -> None:
    """Eleven answers of seven queries, so that some masks come under several classes."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 7, 5, 6, generator=generator)
    output = QueryOutput(logits, torch.randn(2, 7, 4, generator=generator))
    spec = HeadSpec(7, 4, 4, norm, ValueKind.CLASS_LOGITS)
    rules = InstanceRules(max_instances=11)
    found, classes, scores = instance.decode(output, spec, (19, 22), (0, 2), rules)
    probs = mask_probs(at_source(logits, 4, (19, 22)), norm)
    masks = probs > (0.5 if norm is MaskNorm.SIGMOID else rules.mask_confidence)
    class_probs = output.values.softmax(dim=-1)[..., [0, 2]]
    for image in range(2):
        pairs = sorted(((float(class_probs[image, q, k]), q, k) for q in range(7) for k in range(2)), reverse=True)[:11]
        rated = []
        for class_prob, q, k in pairs:
            inside = probs[image, q][masks[image, q]]
            rated.append((class_prob * float(inside.mean()) if len(inside) else 0.0, q, k))
        rated.sort(key=lambda each: -each[0])
        torch.testing.assert_close(scores[image], torch.tensor([score for score, _, _ in rated]))
        sure = [place for place, (score, _, _) in enumerate(rated) if score]
        assert classes[image, sure].tolist() == [[0, 2][rated[place][2]] for place in sure]
        assert torch.equal(found[image, sure].bool(), masks[image, [rated[place][1] for place in sure]])


def test_background_is_one_segment_and_void_is_none() -> None:
    masks = torch.tensor([[[True, False, False]]])
    void = torch.tensor([[False, False, True]])
    targets = SegmentTargets(masks, torch.tensor([0]), void)
    both = InstanceTask(1, (0,))._with_background(targets)
    assert both.class_ids.tolist() == [0, 1]
    assert both.masks[1].tolist() == [[False, True, False]]
    covered = SegmentTargets(torch.tensor([[[True, True, False]]]), torch.tensor([0]), void)
    assert InstanceTask(1, (0,))._with_background(covered) is covered


def test_a_task_that_needs_classes_says_so() -> None:
    with pytest.raises(InputError, match=r"semantic needs classes, got data without; name them in dataset\.yaml"):
        make_task("semantic", None)
    with pytest.raises(InputError, match="wanted one of semantic, instance, panoptic, depth, normals"):
        make_task("boxes", Classes.named(["a"]))
