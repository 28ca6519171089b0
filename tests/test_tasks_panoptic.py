import json
from pathlib import Path

import numpy as np
import pytest
import torch

from denselab.tasks.panoptic import MergeRules, decode, merge_by_mask, merge_by_pixel
from denselab.types import HeadSpec, MaskNorm, QueryOutput, ValueKind

GOLDEN = Path(__file__).parents[1].parent / "shared" / "golden" / "kmax_postprocess.npz"
NAMES = {
    "mask_confidence": "pixel_confidence_threshold",
    "thing_score": "class_threshold_thing",
    "stuff_score": "class_threshold_stuff",
    "overlap": "overlap_threshold",
    "class_weight": "reorder_class_weight",
    "mask_weight": "reorder_mask_weight",
}


@pytest.mark.skipif(not GOLDEN.is_file(), reason="the golden fixtures are not beside the repository")
@pytest.mark.parametrize("image", range(4))
@pytest.mark.parametrize("params", range(3))
def test_segments_are_those_of_the_reference(image: int, params: int) -> None:
    golden = np.load(GOLDEN)
    given = json.loads(str(golden["params"]))[params]
    rules = MergeRules(**{name: given[theirs] for name, theirs in NAMES.items()})
    things = tuple(golden["thing_class_indices"].tolist())
    output = QueryOutput(
        torch.from_numpy(golden[f"img{image}.mask_logits"])[None],
        torch.from_numpy(golden[f"img{image}.class_logits"])[None],
    )
    queries, dims = output.values.shape[1:]
    spec = HeadSpec(queries, dims, 1, MaskNorm.SOFTMAX, ValueKind.CLASS_LOGITS)
    ids, classes, _ = decode(output, spec, tuple(output.mask_logits.shape[2:]), things, rules)
    wanted = golden[f"img{image}.p{params}.panoptic"]
    segments = json.loads(str(golden[f"img{image}.p{params}.segments"]))
    renamed = np.zeros_like(wanted)
    for segment in segments:
        (own,) = np.unique(ids[0].numpy()[wanted == segment["id"]])
        assert classes[0, own - 1] == segment["category_id"]
        renamed[ids[0].numpy() == own] = segment["id"]
    np.testing.assert_array_equal(renamed, wanted)


def spec_of(norm: MaskNorm, queries: int, values: int, stride: int = 1) -> HeadSpec:
    return HeadSpec(queries, values, stride, norm, ValueKind.CLASS_LOGITS)


def test_the_surer_mask_takes_what_both_claim_and_the_other_falls_below_the_overlap() -> None:
    scores, labels = torch.tensor([[0.9, 0.8, 0.95]]), torch.tensor([[0, 0, 1]])
    probs = torch.tensor([[[[0.6, 0.6, 0.0, 0.0]], [[0.0, 0.5, 0.5, 0.0]], [[0.0, 0.0, 0.0, 0.9]]]])
    ids, classes, kept = merge_by_mask(scores, labels, probs, (0,), MergeRules(overlap=0.4))
    assert ids.tolist() == [[[1, 1, 2, 3]]]
    assert classes.tolist() == [[0, 0, 1]]
    # class probability times mean mask probability
    torch.testing.assert_close(kept, torch.tensor([[0.9 * 0.6, 0.8 * 0.5, 0.95 * 0.9]]))
    ids, _, kept = merge_by_mask(scores, labels, probs, (0,), MergeRules(overlap=0.5))  # it keeps half, wanted more
    assert ids.tolist() == [[[1, 1, 0, 3]]]
    assert kept[0, 1] == 0


def test_two_masks_of_one_stuff_class_become_one_segment() -> None:
    scores, labels = torch.tensor([[0.8, 0.9]]), torch.tensor([[1, 1]])
    probs = torch.tensor([[[[0.9, 0.0]], [[0.0, 0.9]]]])
    ids, _, kept = merge_by_mask(scores, labels, probs, (0,), MergeRules())
    assert ids.tolist() == [[[2, 2]]]  # the surer one came first
    assert kept[0].count_nonzero() == 1
    ids, _, _ = merge_by_mask(scores, labels, probs, (0, 1), MergeRules())
    assert ids.tolist() == [[[1, 2]]]


def test_merging_by_pixel_weighs_masks_by_their_class_probability() -> None:
    scores, labels = torch.tensor([[0.9, 0.8, 0.3]]), torch.tensor([[0, 0, 0]])
    probs = torch.tensor([[[[0.9, 0.6, 0.2, 0.1]], [[0.5, 0.7, 0.9, 0.4]], [[1.0, 1.0, 1.0, 1.0]]]])
    # weighed: 0.81 0.54 0.18 0.09 | 0.40 0.56 0.72 0.32 | the third is too unsure to take part
    ids, _, kept = merge_by_pixel(scores, labels, probs, (0,), MergeRules(overlap=0.5))
    assert ids.tolist() == [[[1, 2, 2, 0]]]  # the last pixel is no mask's own
    assert (kept > 0).tolist() == [[True, True, False]]


@pytest.mark.parametrize("norm", MaskNorm)
def test_an_image_where_no_mask_is_sure_is_void(norm: MaskNorm) -> None:
    output = QueryOutput(torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 5))
    ids, classes, scores = decode(output, spec_of(norm, 3, 5, stride=4), (7, 5), (0,), MergeRules())
    assert ids.shape == (1, 7, 5)
    assert not ids.any()
    assert not scores.any()
    assert classes.shape == (1, 3)


@pytest.mark.parametrize("norm", MaskNorm)
def test_a_batch_is_merged_as_its_images_are(norm: MaskNorm) -> None:
    generator = torch.Generator().manual_seed(0)
    masks, values = torch.randn(3, 6, 5, 4, generator=generator) * 4, torch.randn(3, 6, 4, generator=generator) * 4
    rules, spec = MergeRules(overlap=0.3), spec_of(norm, 6, 4, stride=2)
    together = decode(QueryOutput(masks, values), spec, (9, 8), (0, 1), rules)
    assert len(together[0].unique()) > 3
    for index in range(3):
        alone = decode(QueryOutput(masks[index : index + 1], values[index : index + 1]), spec, (9, 8), (0, 1), rules)
        assert all(torch.equal(whole[index], own[0]) for whole, own in zip(together, alone, strict=True))


def test_only_the_surest_masks_are_looked_at_and_keep_their_numbers() -> None:
    values = torch.tensor([[[0.0, 9.0], [9.0, 0.0], [8.0, 0.0]]])  # the first says "no object"
    masks = torch.tensor([[[[-9.0, -9.0]], [[9.0, -9.0]], [[-9.0, 9.0]]]])
    output, spec = QueryOutput(masks, values), spec_of(MaskNorm.SOFTMAX, 3, 2)
    ids, _, _ = decode(output, spec, (1, 2), (0,), MergeRules())
    assert ids.tolist() == [[[2, 3]]]
    ids, _, scores = decode(output, spec, (1, 2), (0,), MergeRules(max_segments=2))
    assert scores.shape == (1, 2)
    assert ids.tolist() == [[[1, 2]]]
