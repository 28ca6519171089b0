"""What cannot be captured, and which operator, module or output is named."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress_models import images
from denselab.compress.graph import Axis, capture
from denselab.errors import InputError

pytestmark = pytest.mark.usefixtures("one_thread")

ONE_SIZE: frozenset[Axis] = frozenset()


class Odd(nn.Module):
    """A convolution and then what a test wants."""

    def __init__(self, then: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Conv2d(3, 3, 1), Then(then)])

    def forward(self, x: Tensor) -> Any:
        for block in self.blocks:
            x = block(x)
        return x


class Then(nn.Module):
    def __init__(self, then: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.then = then

    def forward(self, x: Tensor) -> Any:
        return self.then(x)


@pytest.mark.parametrize(
    ("then", "reason"),
    [
        (lambda x: x if x.max() > 0 else -x, "data-dependent"),
        (lambda x: torch.from_numpy(x.numpy()), "numpy"),
        (lambda x: x[..., : int(x.sum().item())], "data-dependent"),
    ],
)
def test_what_cannot_be_captured_is_named(then: Callable[[Tensor], Any], reason: str) -> None:
    with pytest.raises(InputError, match=rf"the module 'blocks\.1': `return self\.then\(x\)` \(.*{reason}"):
        capture(Odd(then), images(1, side_px=8), free=ONE_SIZE)


def test_an_operator_that_cannot_be_captured_is_named() -> None:
    with pytest.raises(InputError, match=r"'blocks\.1': the operator aten\.equal\.default in `return self"):
        capture(Odd(lambda x: x if torch.equal(x, x.relu()) else -x), images(1, side_px=8), free=ONE_SIZE)


def test_a_model_that_does_not_run_on_the_example_says_so() -> None:
    with pytest.raises(InputError, match=r"example: wanted inputs that the model runs on, got 1x4x8x8 \(.*channels"):
        capture(Odd(torch.relu), torch.rand(1, 4, 8, 8))


def test_an_output_that_differs_is_named() -> None:
    with pytest.raises(InputError, match=r"another output\['b'\]: wanted a difference of at most 1e-05"):
        capture(Odd(lambda x: {"a": x, "b": x + torch.rand_like(x)}), images(1, side_px=8), free=ONE_SIZE)
    with pytest.raises(
        InputError, match=r"got NaN in output, which arises in the module 'blocks\.1' \(aten\.sqrt\.default\); take"
    ):
        capture(Odd(lambda x: x.sub(9).sqrt()), images(1, side_px=8), free=ONE_SIZE)


def test_a_damaged_weight_is_named() -> None:
    model = Odd(torch.relu)
    with torch.no_grad():
        model.blocks[0].weight[1, 0] = math.nan
    with pytest.raises(InputError, match=r"got NaN or infinity in 'blocks\.0\.weight'"):
        capture(model, images(1, side_px=8))
