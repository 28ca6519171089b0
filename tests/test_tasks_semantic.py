"""Decoding: values worked by hand for both kinds of values, and PIL as an independent bilinear resize."""

import numpy as np
import pytest
import torch
from PIL import Image

from denselab.tasks.semantic import class_scores, decode, logits_at_source
from denselab.types import HeadSpec, MaskNorm, QueryOutput, ValueKind
from tiny_models import tiny_model


def per_pixel(classes: int, stride: int) -> HeadSpec:
    return HeadSpec(classes, classes, stride, MaskNorm.SOFTMAX, ValueKind.IDENTITY)


def blended(norm: MaskNorm, queries: int = 2, classes: int = 3) -> HeadSpec:
    return HeadSpec(queries, classes, 1, norm, ValueKind.BLENDED)


def test_per_pixel_scores_are_upsampled_and_cropped() -> None:
    # Two cells of stride 2: output columns lie at -1/4, 1/4, 3/4 and 5/4 of the cells' distance, clamped at the ends.
    logits = torch.tensor([[[[4.0, 0.0]], [[1.0, 3.0]]]])
    output = QueryOutput(logits, torch.eye(2)[None])
    scores = logits_at_source(output, per_pixel(2, 2), (1, 3))
    assert scores.shape == (1, 2, 1, 3)
    assert scores[0, :, 0].tolist() == [[4.0, 3.0, 1.0], [1.0, 1.5, 2.5]]
    assert decode(output, per_pixel(2, 2), (1, 3)).tolist() == [[[0, 0, 1]]]


def test_masks_that_compete_blend_values() -> None:
    # Softmax of (ln 3, 0) is (3/4, 1/4).
    output = QueryOutput(
        torch.tensor([3.0, 1.0]).log().view(1, 2, 1, 1), torch.tensor([[[0.4, 0.6, 0.0], [0.4, 0.0, 0.6]]])
    )
    scores = class_scores(output, blended(MaskNorm.SOFTMAX))
    assert scores.flatten().tolist() == pytest.approx([0.4, 0.45, 0.15])
    assert decode(output, blended(MaskNorm.SOFTMAX), (1, 1)).item() == 1


def test_masks_of_their_own_blend_values() -> None:
    # Sigmoid of (ln 3, 0) is (3/4, 1/2): the same masks and values as above now say class 0.
    output = QueryOutput(
        torch.tensor([3.0, 1.0]).log().view(1, 2, 1, 1), torch.tensor([[[0.4, 0.6, 0.0], [0.4, 0.0, 0.6]]])
    )
    scores = class_scores(output, blended(MaskNorm.SIGMOID))
    assert scores.flatten().tolist() == pytest.approx([0.5, 0.45, 0.3])
    assert decode(output, blended(MaskNorm.SIGMOID), (1, 1)).item() == 0


def test_learned_identity_values_decode_like_a_per_pixel_classifier() -> None:
    logits = torch.randn(2, 4, 5, 7, generator=torch.Generator().manual_seed(0))
    output = QueryOutput(logits, torch.eye(4).expand(2, 4, 4))
    learned = decode(output, blended(MaskNorm.SOFTMAX, 4, 4), (5, 7))
    assert torch.equal(learned, decode(output, per_pixel(4, 1), (5, 7)))


@pytest.mark.parametrize(
    ("grid_hw", "stride", "size_hw"), [((1, 1), 16, (1, 1)), ((3, 5), 4, (11, 17)), ((2, 3), 8, (16, 23))]
)
def test_upsampling_agrees_with_pil(grid_hw: tuple[int, int], stride: int, size_hw: tuple[int, int]) -> None:
    logits = torch.randn(1, 3, *grid_hw, generator=torch.Generator().manual_seed(1))
    height, width = size_hw
    full_wh = (grid_hw[1] * stride, grid_hw[0] * stride)
    pil = [Image.fromarray(channel.numpy()).resize(full_wh, Image.Resampling.BILINEAR) for channel in logits[0]]
    expected = np.stack([np.asarray(channel)[:height, :width] for channel in pil])
    output = QueryOutput(logits, torch.eye(3)[None])
    np.testing.assert_allclose(logits_at_source(output, per_pixel(3, stride), size_hw)[0].numpy(), expected, atol=1e-5)
    np.testing.assert_array_equal(decode(output, per_pixel(3, stride), size_hw)[0].numpy(), expected.argmax(0))


@pytest.mark.parametrize("size_hw", [(1, 1), (16, 16), (17, 31), (5, 50)])
def test_a_model_of_any_size_decodes_to_its_input(size_hw: tuple[int, int]) -> None:
    model = tiny_model()
    with torch.no_grad():
        output = model(torch.rand(2, 3, *size_hw))
    class_ids = decode(output, model.spec, size_hw)
    assert class_ids.shape == (2, *size_hw)
    assert torch.equal(class_ids, logits_at_source(output, model.spec, size_hw).argmax(1))
