"""ReMask and ReClass by loops, by hand, and what they must leave alone."""

import pytest
import torch
import torch.nn.functional as F

from denselab.losses.remax import reclass, remask


def test_remask_pixel_by_pixel() -> None:
    generator = torch.Generator().manual_seed(0)
    mask_logits = torch.randn(2, 3, 2, 4, generator=generator)
    class_logits = torch.randn(2, 3, 5 + 1, generator=generator)
    semantic_logits = torch.randn(2, 5, 2, 4, generator=generator)
    expected = torch.empty_like(mask_logits)
    for image in range(2):
        for query in range(3):
            for row in range(2):
                for column in range(4):
                    gate = sum(
                        class_logits[image, query, k].sigmoid() * semantic_logits[image, k, row, column].sigmoid()
                        for k in range(5)
                    )
                    expected[image, query, row, column] = mask_logits[image, query, row, column] * (1 + gate)
    torch.testing.assert_close(remask(mask_logits, class_logits, semantic_logits), expected)
    with_void = torch.cat([semantic_logits, torch.full((2, 1, 2, 4), 9.0)], dim=1)
    torch.testing.assert_close(remask(mask_logits, class_logits, with_void), expected)


def test_remask_strengthens_where_the_semantic_branch_agrees() -> None:
    mask_logits = torch.tensor([[[[2.0, 2, -2, -2]]]])
    sure_of_first = torch.tensor([[[50.0, -50, 0]]])
    semantic_logits = torch.tensor([[[[50.0, -50, 50, -50]], [[-50, 50, -50, 50]]]])
    assert remask(mask_logits, sure_of_first, semantic_logits).flatten().tolist() == [4, 2, -4, -2]


def test_no_gradient_but_into_masks() -> None:
    mask_logits, semantic_logits = torch.randn(1, 2, 3, 3).requires_grad_(), torch.randn(1, 2, 3, 3).requires_grad_()
    class_logits = torch.randn(1, 2, 3).requires_grad_()
    leaves = (mask_logits, class_logits, semantic_logits)
    gradients = torch.autograd.grad(remask(*leaves).sum(), leaves, allow_unused=True)
    assert gradients[0] is not None
    assert (gradients[0] >= 1).all()  # 1 + gate: no gradient is lost
    assert gradients[1] is None
    assert gradients[2] is None
    targets = reclass(F.one_hot(torch.tensor([[0, 2]]), 3).float(), mask_logits.sigmoid(), semantic_logits, 0.1)
    assert not targets.requires_grad


def test_reclass_worked_by_hand() -> None:
    # class 0 on two pixels, class 1 on one; the mask covers one of class 0, and half of the one of class 1
    semantic = torch.tensor([[[[1.0, 1, 0, 0]], [[0, 0, 1, 0]], [[0, 0, 0, 0]]]])
    mask_probs = torch.tensor([[[[1.0, 0, 0.5, 1]]]])
    matched = reclass(torch.tensor([[[1.0, 0, 0, 0]]]), mask_probs, semantic, 0.1)
    assert matched.flatten().tolist() == pytest.approx([1, 0.05, 0, 0])
    empty = reclass(torch.tensor([[[0.0, 0, 0, 1]]]), mask_probs, semantic, 0.1)
    assert empty.flatten().tolist() == pytest.approx([0.05, 0.05, 0, 1])
    unchanged = reclass(torch.tensor([[[0.0, 0, 0, 1]]]), mask_probs, semantic, 0.0)
    assert unchanged.flatten().tolist() == [0, 0, 0, 1]


def test_an_image_without_any_class() -> None:
    one_hot = F.one_hot(torch.tensor([[3, 3]]), 4).float()
    targets = reclass(one_hot, torch.rand(1, 2, 3, 3), torch.zeros(1, 3, 3, 3), 0.1)
    assert targets.equal(one_hot)
