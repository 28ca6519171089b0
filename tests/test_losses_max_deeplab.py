"""The objective of MaX-DeepLab against kMaX-DeepLab's own numbers, by hand, and where there is nothing to learn."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from denselab.losses.matching import match
from denselab.losses.max_deeplab import (
    MaxDeepLabWeights,
    NegativeWeight,
    class_loss,
    dice_loss,
    dice_similarity,
    instance_discrimination_loss,
    mask_id_loss,
    max_deeplab_loss,
    semantic_loss,
)
from denselab.losses.remax import ReMax
from denselab.types import HeadSpec, MaskNorm, QueryOutput, SegmentTargets, ValueKind

CASES = ["full", "nosharefull", "sampled", "novoidmask"]
TERMS = {"ce": "class", "mask": "mask_id", "dice": "dice", "pixel_insdis": "instance", "aux_semantic": "semantic"}
INPUTS = {"pred_logits": "values", "pred_masks": "mask_logits", "pixel_feature": "pixel_embed"}


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    path = Path(__file__).resolve().parents[2] / "shared" / "golden" / "kmax_losses.npz"
    if not path.is_file():
        pytest.skip(f"no golden numbers at {path}")
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


class Case:
    """Inputs of one golden case as our types, with gradients, and options as our weights."""

    def __init__(self, golden: dict[str, np.ndarray], name: str) -> None:
        def tensor(key: str) -> Tensor:
            return torch.from_numpy(golden[f"{name}.{key}"])

        cfg = json.loads(str(golden[f"{name}.cfg"]))
        self.inputs = {
            key.removeprefix(f"{name}.in."): torch.from_numpy(golden[key]).requires_grad_()
            for key in golden
            if key.startswith(f"{name}.in.") and ".target" not in key
        }
        queries, classes = self.inputs["pred_logits"].shape[1:]

        def output(prefix: str) -> QueryOutput:
            return QueryOutput(**{ours: self.inputs[prefix + theirs] for theirs, ours in INPUTS.items()})

        one = HeadSpec(queries, classes, 1, MaskNorm.SOFTMAX, ValueKind.CLASS_LOGITS)
        semantic_logits = self.inputs["aux_semantic_pred"]
        branch = HeadSpec(classes, classes, 2, MaskNorm.SOFTMAX, ValueKind.IDENTITY)
        branch_output = QueryOutput(semantic_logits, torch.eye(classes).expand(2, -1, -1))
        self.output = replace(output(""), aux=(output("aux0."), branch_output, output("aux1.")))
        self.spec = replace(one, aux=(one, branch, one))
        self.targets = tuple(
            SegmentTargets(tensor(f"in.target{b}.masks"), tensor(f"in.target{b}.labels")) for b in range(2)
        )
        ids = torch.stack([tensor(f"in.target{b}.semantic_masks") for b in range(2)])
        self.class_ids = ids.where(ids >= 0, 255)
        self.weights = MaxDeepLabWeights(
            instance_samples=cfg["pixel_insdis_sample_k"],
            instance_share=1.0,
            semantic_samples=cfg["aux_semantic_sample_k"],
            share_matching=cfg["share_final_matching"],
            dice_on_void=not cfg["masking_void_pixel"],
        )
        draws = sorted(key for key in golden if key.startswith(f"{name}.uniform_noise"))
        self.noise = [torch.from_numpy(golden[key]) for key in draws] or None

    def loss(self) -> tuple[Tensor, dict[str, Tensor]]:
        return max_deeplab_loss(self.output, self.spec, self.targets, self.class_ids, self.weights, noise=self.noise)


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_those_of_kmax_deeplab(golden: dict[str, np.ndarray], name: str) -> None:
    case = Case(golden, name)
    total, parts = case.loss()
    for theirs, ours in TERMS.items():
        for suffix in ("", "_0", "_1"):
            expected = golden.get(f"{name}.loss.loss_{theirs}{suffix}")
            assert (ours + suffix in parts) == (expected is not None)
            if expected is not None:
                assert parts[ours + suffix].item() == pytest.approx(float(expected), rel=1e-4)
    assert total.item() == pytest.approx(float(golden[f"{name}.total_weighted"]), rel=1e-4)
    total.backward()
    checked = [key for key in golden if key.startswith(f"{name}.grad.")]
    assert len(checked) >= 3
    for key in checked:
        gradient = case.inputs[key.removeprefix(f"{name}.grad.")].grad
        torch.testing.assert_close(gradient, torch.from_numpy(golden[key]), atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_matching_is_that_of_kmax_deeplab(golden: dict[str, np.ndarray], name: str) -> None:
    case = Case(golden, name)
    for index, target in enumerate(case.targets):
        mask_probs = case.output.mask_logits[index].softmax(dim=0)
        masks = target.masks.float()
        dice = dice_similarity(mask_probs, masks, target.masks.any(dim=0).float())
        class_probs = case.output.values[index].softmax(dim=-1)[:, target.class_ids]
        (pairs,) = match([-dice * class_probs])
        assert pairs.queries.tolist() == golden[f"{name}.match.query{index}"].tolist()
        assert pairs.segments.tolist() == golden[f"{name}.match.gt{index}"].tolist()
        for ours, theirs in ((dice, "dice"), (class_probs, "cls_prob")):
            expected = torch.from_numpy(golden[f"{name}.match.{theirs}{index}"])
            torch.testing.assert_close(ours[pairs.queries, pairs.segments], expected, rtol=1e-4, atol=1e-6)


def spec_of(queries: int, classes: int, stride: int = 1, *aux: HeadSpec) -> HeadSpec:
    return HeadSpec(queries, classes + 1, stride, MaskNorm.SOFTMAX, ValueKind.CLASS_LOGITS, aux)


def sample(stride: int = 2, seed: int = 0) -> tuple[QueryOutput, HeadSpec, tuple[SegmentTargets, ...], Tensor]:
    """Five queries, three classes, one earlier layer of half the resolution and a semantic branch; 7x10 px images.

    The first image is tiled by a stuff segment and two that overlap, and has void; the second has no segment.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).requires_grad_()

    def layer(height: int, width: int) -> QueryOutput:
        embed = F.normalize(random(2, 6, height, width), dim=1)
        return QueryOutput(random(2, 5, height, width), random(2, 5, 4), embed)

    branch = HeadSpec(3, 3, 2 * stride, MaskNorm.SOFTMAX, ValueKind.IDENTITY)
    spec = spec_of(5, 3, stride, spec_of(5, 3, 2 * stride), branch)
    semantic = QueryOutput(random(2, 3, 2, 3), torch.eye(3).expand(2, -1, -1))
    output = replace(layer(4, 6), aux=(layer(2, 3), semantic))
    masks = torch.zeros(3, 7, 10, dtype=torch.bool)
    masks[0, :4], masks[1, 3:6, :5], masks[2, 5:, 4:8] = True, True, True
    class_ids = torch.full((2, 7, 10), 255)
    for mask, class_id in zip(masks, (0, 2, 2), strict=True):
        class_ids[0][mask] = class_id
    none = SegmentTargets(masks[:0], torch.zeros(0, dtype=torch.long))
    return output, spec, (SegmentTargets(masks, torch.tensor([0, 2, 2])), none), class_ids


def leaves(output: QueryOutput) -> list[Tensor]:
    own = [output.mask_logits, *([output.values] if output.values.requires_grad else [])]
    return own + [leaf for aux in output.aux for leaf in leaves(aux)]


def test_every_output_is_trained_and_the_empty_image_costs_nothing() -> None:
    output, spec, targets, class_ids = sample()
    total, parts = max_deeplab_loss(output, spec, targets, class_ids)
    names = {"class", "dice", "mask_id", "instance"}
    assert set(parts) == names | {"semantic"} | {f"{name}_0" for name in names}
    assert total.dtype == torch.float32
    assert not any(part.requires_grad for part in parts.values())
    weights = {"class": 3, "dice": 3, "mask_id": 0.3, "instance": 1, "semantic": 1}
    assert total.item() == pytest.approx(sum(weights[n.removesuffix("_0")] * p.item() for n, p in parts.items()))
    for gradient in torch.autograd.grad(total, leaves(output)):
        assert gradient.isfinite().all()
        assert gradient[0].abs().max() > 0
    masks = torch.autograd.grad(max_deeplab_loss(output, spec, targets, class_ids)[0], output.mask_logits)[0]
    assert masks[1].abs().max() == 0


def test_nothing_labelled_anywhere() -> None:
    output, spec, targets, class_ids = sample()
    none = (targets[1], targets[1])
    total, parts = max_deeplab_loss(output, spec, none, torch.full_like(class_ids, 255))
    assert all(parts[name].item() == 0 for name in ("dice", "mask_id", "instance", "semantic"))
    assert parts["class"].item() > 0  # masks that claim void say "no object"
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(total, leaves(output)))


def test_final_output_alone_and_without_embeddings() -> None:
    output, spec, targets, class_ids = sample()
    alone = QueryOutput(output.mask_logits, output.values)
    _, parts = max_deeplab_loss(alone, spec, targets, class_ids)
    assert set(parts) == {"class", "dice", "mask_id"}
    _, full = max_deeplab_loss(output, spec, targets, None)
    assert "semantic" not in full
    assert full["dice"].item() == parts["dice"].item()


def test_more_segments_than_queries_leaves_the_worst_unmatched() -> None:
    mask_logits = torch.zeros(1, 2, 1, 4)
    mask_logits[0, 0, 0, :2] = mask_logits[0, 1, 0, 2:] = 20
    masks = torch.tensor([[[1, 1, 0, 0]], [[0, 0, 1, 0]], [[0, 0, 0, 1]]], dtype=torch.bool)
    values = torch.tensor([[[30.0, 0, 0], [0, 30, 0]]])
    output = QueryOutput(mask_logits, values)
    target = SegmentTargets(masks, torch.tensor([0, 0, 1]))
    _, parts = max_deeplab_loss(output, spec_of(2, 2), (target,), None)
    # the second query takes the last pixel; the pixel of the segment left over is void, and costs nothing
    assert parts["mask_id"].item() == pytest.approx(0, abs=1e-6)
    assert parts["dice"].item() == pytest.approx(0, abs=1e-6)


def test_float32_under_autocast() -> None:
    output, spec, targets, class_ids = sample()
    expected, _ = max_deeplab_loss(output, spec, targets, class_ids)
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = max_deeplab_loss(output, spec, targets, class_ids)
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)  # all 24 cells are drawn, in any order


def test_a_generator_repeats_its_draws() -> None:
    output, spec, targets, class_ids = sample()
    weights = MaxDeepLabWeights(instance_samples=4, instance_share=1.0, semantic_samples=2)

    def loss(seed: int) -> float:
        noise = torch.Generator().manual_seed(seed)
        return max_deeplab_loss(output, spec, targets, class_ids, weights, noise=noise)[0].item()

    assert loss(1) == loss(1) != loss(2)


def test_void_and_padding_pixels_have_no_say_in_masks() -> None:
    output, spec, targets, class_ids = sample(stride=2)
    weights = MaxDeepLabWeights(class_=0, instance=0, semantic=0)
    total, _ = max_deeplab_loss(output, spec, targets, class_ids, weights)
    gradient = torch.autograd.grad(total, output.mask_logits)[0][0]
    assert gradient[:, :, 5].abs().max() == 0  # the sixth column of cells is beyond the image of 10 px
    assert gradient[:, 3, :2].abs().max() == 0  # row 6 of the image has no segment in its first four columns


def test_negatives_as_in_the_paper_and_in_the_code() -> None:
    mask_logits = torch.zeros(1, 2, 1, 2).requires_grad_()
    values = torch.zeros(1, 2, 3)
    target = SegmentTargets(torch.tensor([[[True, True]]]), torch.tensor([0]))
    dice = 2 * 0.5 * 2 / (1 + 2)
    log3 = torch.tensor(3.0).log().item()
    for negatives, weight in ((NegativeWeight.ONE, 1), (NegativeWeight.VOID_OVERLAP, 1e-5)):
        weights = MaxDeepLabWeights(negatives=negatives)
        _, parts = max_deeplab_loss(QueryOutput(mask_logits, values), spec_of(2, 2), (target,), None, weights)
        assert parts["class"].item() == pytest.approx((0.75 * dice + 0.25 * weight) * log3 / 2, rel=1e-4)
        # smoothed dice (2 * 1 + 1) / (1 + 2 + 1), weighted by the class probability 1/3, mean over two queries
        assert parts["dice"].item() == pytest.approx(0.75 * (1 - 3 / 4) / 3 / 2)
        assert parts["mask_id"].item() == pytest.approx(torch.tensor(2.0).log().item())


def test_terms_worked_by_hand() -> None:
    third = torch.tensor([[[0.0, 0, 0]]])
    assert class_loss(third, torch.tensor([[[0.0, 0, 1]]]), torch.tensor([[2.0]])).item() == pytest.approx(
        2 * 0.25 * 1.0986123
    )
    probs, masks = torch.tensor([[[[0.5, 0.25]]]]), torch.tensor([[[[1.0, 0]]]])
    assert dice_loss(probs, masks, torch.tensor([[0.5]])).item() == pytest.approx(0.75 * 0.5 * (1 - 2 / 2.75))
    logits = torch.tensor([[[[0.0, 9]], [[0, 0]]]])
    half = torch.tensor([[[[0.5, 0]], [[0.5, 0]]]])  # overlapping masks share the first pixel, the second is void
    assert mask_id_loss(logits, half).item() == pytest.approx(0.6931472)
    # three pixels, two in one mask and one on void: targets of the first two are 1/2, 1/2, 0
    embed = torch.tensor([[[1.0, 0, -1], [0, 1, 0]]])
    mask = torch.tensor([[[1.0, 1, 0]]])
    similar = torch.tensor([[1.0, 0, -1], [0, 1, 0]]) / 0.5
    expected = -(similar.log_softmax(dim=1)[:, :2].sum(dim=1) / 2).mean()
    assert instance_discrimination_loss(embed, mask, 0.5).item() == pytest.approx(expected.item())
    semantic = torch.tensor([[[[0.0, 5]], [[0, 0]]]])
    assert semantic_loss(semantic, torch.tensor([[[1, 255]]]), torch.ones(1, 1, 2), 0, 1, torch.rand_like).item() == (
        pytest.approx(0.6931472)
    )


def test_small_segments_are_drawn_oftener_and_void_last() -> None:
    logits = torch.zeros(1, 2, 1, 4)
    logits[0, 1, 0] = torch.tensor([0.0, 1, 2, 3])  # so that the loss tells which pixel was drawn
    areas = torch.tensor([[[3.0, 1, 3, 0]]])
    even: list[Tensor] = [torch.full((1, 4), 0.5)]
    draws = iter(even * 2)

    def draw(like: Tensor) -> Tensor:
        return next(draws).to(like)

    ids = torch.tensor([[[1, 1, 1, 1]]])
    each = [torch.tensor(x).neg().exp().log1p().item() for x in (0.0, 1, 2, 3)]
    assert semantic_loss(logits, ids, areas, 1, 2.0, draw).item() == pytest.approx(each[1])
    assert semantic_loss(logits, ids, areas, 3, 2.0, draw).item() == pytest.approx(sum(each[:3]) / 3)


def test_a_grid_of_stride_two_is_taught_what_it_covers() -> None:
    masks = torch.tensor([[[1, 0, 0, 0], [1, 0, 0, 0]], [[0, 1, 1, 1], [0, 1, 1, 1]]], dtype=torch.bool)
    target = SegmentTargets(masks, torch.tensor([0, 1]))
    mask_logits = torch.zeros(1, 2, 1, 2, requires_grad=True)
    output = QueryOutput(mask_logits, torch.zeros(1, 2, 3))
    total, _ = max_deeplab_loss(output, spec_of(2, 2, 2), (target,), None, MaxDeepLabWeights(class_=0, dice=0))
    gradient = torch.autograd.grad(total, mask_logits)[0][0, :, 0]
    # of the left cell half belongs to each, of the right one all to the second; mean over two cells
    both = sorted(gradient[:, 1].tolist())
    assert gradient[:, 0].abs().max() == pytest.approx(0, abs=1e-7)
    assert both == pytest.approx([-0.3 / 4, 0.3 / 4])


def test_remax_changes_earlier_layers_and_class_targets_only() -> None:
    output, spec, targets, class_ids = sample()
    _, plain = max_deeplab_loss(output, spec, targets, class_ids)

    def changed(remax: ReMax) -> set[str]:
        _, parts = max_deeplab_loss(output, spec, targets, class_ids, remax=remax)
        return {name for name in plain if parts[name].item() != pytest.approx(plain[name].item(), rel=1e-5)}

    assert changed(ReMax(eta=0)) == {"dice_0", "mask_id_0"}
    assert changed(ReMax(relaxed_layers=0)) == {"class", "class_0"}


def test_background_goes_to_queries_without_a_segment() -> None:
    mask_logits = torch.tensor([[[[0.0, 0, 0]], [[0, 1, 2]], [[0, 3, 4]]]], requires_grad=True)
    masks = torch.zeros(1, 3, 1, 3)
    masks[0, 0, 0, 0] = 1
    free = torch.tensor([[[0.0, 1, 0]]])  # the third pixel is void
    found = mask_id_loss(mask_logits, masks, free)
    at_second = torch.tensor([0.0, 1, 3]).softmax(dim=0)[1:].sum()
    assert found.item() == pytest.approx((1.0986123 - at_second.log().item()) / 2)
    gradient = torch.autograd.grad(found, mask_logits)[0]
    assert gradient[..., 2].abs().max() == 0
    none_left = mask_id_loss(mask_logits, torch.full((1, 3, 1, 3), 1 / 3), free)
    assert torch.autograd.grad(none_left, mask_logits)[0].isfinite().all()


def test_objects_only_with_void_told_from_background() -> None:
    output, spec, (target, none), class_ids = sample()
    void = torch.zeros(7, 10, dtype=torch.bool)
    void[6, :4] = True
    told = (replace(target, void=void), none)
    weights = MaxDeepLabWeights(class_=0, instance=0, semantic=0)

    def gradient(targets: tuple[SegmentTargets, ...]) -> Tensor:
        total, _ = max_deeplab_loss(output, spec, targets, class_ids, weights)
        return torch.autograd.grad(total, output.mask_logits)[0][0]

    known, unknown = gradient(told), gradient((target, none))
    assert known[:, 3, :2].abs().max() == 0  # void in both
    assert unknown[:, 2, 4].abs().max() == 0  # rows 4 and 5, columns 8 and 9: in no mask, so void ...
    assert known[:, 2, 4].abs().max() > 0  # ... but background where void is told
    _, parts = max_deeplab_loss(output, spec, told, class_ids)
    assert all(part.isfinite() for part in parts.values())


def test_an_earlier_layer_counts_as_if_it_had_been_resized() -> None:
    output, spec, targets, class_ids = sample()
    earlier = output.aux[0]
    assert earlier.pixel_embed is not None
    masks, embed = (
        F.interpolate(maps, size=(4, 6), mode="bilinear") for maps in (earlier.mask_logits, earlier.pixel_embed)
    )
    full = QueryOutput(masks, earlier.values, F.normalize(embed, dim=1))
    _, parts = max_deeplab_loss(output, spec, targets, class_ids)
    _, resized = max_deeplab_loss(
        replace(output, aux=(full, output.aux[1])),
        replace(spec, aux=(replace(spec.aux[0], mask_stride=2), spec.aux[1])),
        targets,
        class_ids,
    )
    assert {name: part.item() for name, part in parts.items()} == pytest.approx(
        {name: part.item() for name, part in resized.items()}, rel=1e-5
    )
