"""One-to-one matching, and masks and ids on coarser grids."""

from itertools import permutations

import pytest
import torch
from torch import Tensor

from denselab.errors import InputError
from denselab.losses.matching import background, ids_on_grid, masks_on_grid, match, solid
from denselab.types import SegmentTargets


def least_total(cost: Tensor) -> float:
    """By trying every one-to-one choice."""
    rows, columns = cost.shape
    if rows < columns:
        return least_total(cost.T)
    return min(
        sum(cost[row, column].item() for column, row in enumerate(rs)) for rs in permutations(range(rows), columns)
    )


@pytest.mark.parametrize("segments", [(1, 3), (4, 0), (6, 2)])
def test_total_is_the_least_of_all_choices(segments: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(sum(segments))
    costs = [torch.randn(4, count, generator=generator) for count in segments]
    for cost, pairs in zip(costs, match(costs), strict=True):
        assert len(pairs.queries) == len(pairs.segments) == min(cost.shape)
        assert len(set(pairs.queries.tolist())) == len(set(pairs.segments.tolist())) == min(cost.shape)
        assert pairs.queries.tolist() == sorted(pairs.queries.tolist())
        assert cost[pairs.queries, pairs.segments].sum().item() == pytest.approx(least_total(cost), abs=1e-5)


def test_worked_by_hand() -> None:
    # greedy would take 1 and then pay 9; together 2 + 3 is less
    (pairs,) = match([torch.tensor([[1.0, 2], [3, 9]])])
    assert (pairs.queries.tolist(), pairs.segments.tolist()) == ([0, 1], [1, 0])
    # three segments for two queries: the dearest is left
    (pairs,) = match([torch.tensor([[5.0, 1, 4], [5, 4, 2]])])
    assert pairs.segments.tolist() == [1, 2]


def test_costs_that_are_not_finite_come_last() -> None:
    cost = torch.tensor([[float("nan"), 1.0], [float("inf"), 0.5], [2.0, 3.0]])
    (pairs,) = match([cost])
    assert (pairs.queries.tolist(), pairs.segments.tolist()) == ([1, 2], [1, 0])
    assert len(match([torch.full((2, 2), float("nan"))])[0].queries) == 2


def test_shares_of_cells_worked_by_hand() -> None:
    masks = torch.zeros(2, 3, 5, dtype=torch.bool)
    masks[0, :, :3] = True
    masks[1, 2, 4] = True
    shares = masks_on_grid(masks, (2, 3), 2)  # cells reach a row and a column beyond the image
    assert shares.tolist() == [[[1, 0.5, 0], [0.5, 0.25, 0]], [[0, 0, 0], [0, 0, 0.25]]]
    assert solid(shares).tolist() == [
        [[True, True, False], [True, False, False]],
        [[False, False, False], [False, False, True]],
    ]


def test_many_masks_none_and_an_empty_one() -> None:
    masks = torch.rand(37, 8, 8, generator=torch.Generator().manual_seed(0)) < 0.5
    shares = masks_on_grid(masks, (2, 2), 4)
    for row in range(2):
        for column in range(2):
            cell = masks[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            torch.testing.assert_close(shares[:, row, column], cell.float().mean(dim=(1, 2)))
    assert masks_on_grid(masks[:0], (2, 2), 4).shape == (0, 2, 2)
    assert solid(shares[:0]).shape == (0, 2, 2)
    assert not solid(torch.zeros(1, 2, 2)).any()
    assert masks_on_grid(masks, (8, 8), 1).equal(masks.float())


def test_a_grid_too_small_for_its_masks() -> None:
    with pytest.raises(InputError, match=r"masks of at most 4x8 px, the area of a 1x2 mask grid of stride 4, got 5x8"):
        masks_on_grid(torch.zeros(1, 5, 8, dtype=torch.bool), (1, 2), 4)


def test_ids_at_the_centres_of_cells() -> None:
    ids = torch.arange(30).view(1, 5, 6)
    assert ids_on_grid(ids, (5, 6), 1).equal(ids)
    assert ids_on_grid(ids, (3, 3), 2).tolist() == [[[0, 2, 4], [12, 14, 16], [24, 26, 28]]]
    assert ids_on_grid(ids, (2, 3), 3).tolist() == [[[7, 10, 255], [25, 28, 255]]]


def test_background_is_neither_void_nor_in_a_mask() -> None:
    masks = torch.tensor([[[True, False, False, True]]])
    void = torch.tensor([[False, True, False, True]])
    one = torch.tensor([0])
    assert background(SegmentTargets(masks, one, void)).tolist() == [[False, False, True, False]]
    assert not background(SegmentTargets(masks, one)).any()
    assert background(SegmentTargets(masks[:0], one[:0], void)).tolist() == [[True, False, True, False]]
