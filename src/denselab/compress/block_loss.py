"""What blocks are asked for when they are reconstructed: images on their way through a network, and a loss.

The loss compares what a block makes, quantized, of what the quantized blocks before it made of the images, with what
the float network has there.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from denselab.compress.blocks import Block, Blocks, Values
from denselab.compress.graph import Axis, Graph, Hook
from denselab.compress.quantizers import Quantizer, quantized
from denselab.compress.relevance.scores import Batches
from denselab.compress.relevance.sensitivity import Change
from denselab.errors import InputError


@dataclass(frozen=True, eq=False)
class FixedBlock:
    """A block with quantizers that do not change. parameters: those that differ from the start's."""

    block: Block
    quantizers: Mapping[str, Quantizer]
    parameters: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    def hooks(self) -> dict[str, Hook]:
        """What is read at the sites."""
        return {key: partial(quantized, quantizer) for key, quantizer in self.quantizers.items()}


@dataclass(eq=False)
class BlockImages:
    """A batch.

    rough, exact: values before the block, of the quantized and of the float network. target: float, after the block.
    wanted: what the float network answers.
    """

    count: int
    rough: Values
    exact: Values
    target: Values
    wanted: Any


class Passing:
    """The images on their way through the blocks of a float network. held: judged by alone, never learned from."""

    def __init__(
        self, exact: Blocks, batches: Sequence[Float[Tensor, "B 3 H W"]], held: Sequence[Float[Tensor, "B 3 H W"]]
    ) -> None:
        self.exact = exact
        with torch.no_grad():
            self.learned_from = [self._begin(each) for each in batches]
            self.held = [self._begin(part) for each in held for part in each.split(len(batches[0]))]

    @property
    def judged_by(self) -> list[BlockImages]:
        """The images that say what is left of a loss."""
        return self.held or self.learned_from

    def enter(self, number: int) -> None:
        """Find what the float network makes of the images in a block."""
        with torch.no_grad():
            for each in (*self.learned_from, *self.held):
                each.target = self.exact.blocks[number].run(each.exact)

    def leave(self, block: Block, hooks: Mapping[str, Hook]) -> None:
        """Go on to the next block, through a quantized one."""
        with torch.no_grad():
            for each in (*self.learned_from, *self.held):
                each.rough, each.exact = block.run(each.rough, hooks), each.target

    def _begin(self, pixels: Tensor) -> BlockImages:
        before = self.exact.start(pixels)
        after = before
        for block in self.exact.blocks:
            after = block.run(after)
        return BlockImages(len(pixels), before, before, before, self.exact.answer(after))


class BlockTask:
    """What is asked of a block.

    curvature: of its outputs, in a loss that is weighted by it. first: the terms of the loss before the block learns;
    without those that are 0 then.
    """

    def __init__(
        self, seen: Passing, number: int, now: FixedBlock, curvature: Mapping[str, Float[Tensor, "numbers"]]
    ) -> None:
        self.seen = seen
        self.curvature = curvature
        self.first = dict[str, float]()
        self.first = {name: value for name, value in self._terms(now).items() if value > 0}

    def loss(self, images: BlockImages, block: Block, before: Values, hooks: Mapping[str, Hook]) -> Tensor:
        """1 where nothing is better than it was."""
        terms = self._terms_of(images, block, before, hooks)
        return torch.stack([terms[name] / first for name, first in self.first.items()]).mean()

    def total(self, block: FixedBlock) -> float:
        """The loss on all images that are judged by."""
        with torch.no_grad():
            losses = [self.loss(each, block.block, each.rough, block.hooks()) for each in self.seen.judged_by]
        return torch.stack(losses).mean().item()

    def _terms(self, block: FixedBlock) -> dict[str, float]:
        found: dict[str, list[float]] = {}
        with torch.no_grad():
            for each in self.seen.judged_by:
                for name, value in self._terms_of(each, block.block, each.rough, block.hooks()).items():
                    found.setdefault(name, []).append(value.item())
        return {name: math.fsum(values) / len(values) for name, values in found.items()}

    def _terms_of(
        self, images: BlockImages, block: Block, before: Values, hooks: Mapping[str, Hook]
    ) -> dict[str, Tensor]:
        after = block.run(before, hooks)
        return {
            name: self._error(name, after[name], images)
            for name in block.outputs
            if isinstance(after[name], Tensor) and after[name].is_floating_point()
        }

    def _error(self, name: str, got: Tensor, images: BlockImages) -> Tensor:
        error = (got - images.target[name]).square()
        if name in self.curvature:
            error = error.reshape(images.count, -1) * self.curvature[name]
        return error.mean()


def average_curvature(
    seen: Passing, number: int, change: Change, most_pixels: int
) -> dict[str, Float[Tensor, "numbers"]]:
    """The average perturbation Hessian of every output of a block, with mean 1; without those that change nothing.

    most_pixels: no batch beyond so many is looked at, but one always is.
    """
    sums: dict[str, Tensor] = {}
    images_at_once = seen.learned_from[0].count
    batches = most_pixels // (images_at_once * math.prod(seen.exact.graph.example_shapes[0][-2:]))
    for images in seen.learned_from[: max(batches, 1)]:
        found = perturbed_hessian(seen.exact, number, images.target, images.wanted, images.count, change)
        sums = {name: sums.get(name, 0) + curved for name, curved in found.items()}
    return {name: curved / curved.mean() for name, curved in sums.items() if curved.mean() > 0}


def split_images(graph: Graph, batches: Batches, at_once: int, seed: int) -> list[Tensor]:
    """Shuffled images in batches of one size: at most so many, or as many as a graph that is tied to a number wants.

    Raises InputError for no images.
    """
    by_shape: dict[torch.Size, list[Tensor]] = {}
    for batch in batches:
        by_shape.setdefault(batch.shape[1:], []).append(batch)
    tied = None if Axis.BATCH in graph.free else graph.example_shapes[0][0]
    generator = torch.Generator().manual_seed(seed)
    found: list[Tensor] = []
    for group in by_shape.values():
        images = torch.cat(group)
        images = images[torch.randperm(len(images), generator=generator)]
        found += [part for part in images.split(tied or at_once) if tied in (None, len(part))]
    if not found:
        raise InputError("images: wanted at least one to reconstruct with, got none")
    return found


def perturbed_hessian(
    exact: Blocks, number: int, after: Values, wanted: Any, images: int, change: Change, step: float = 1e-3
) -> dict[str, Float[Tensor, "numbers"]]:
    """|J(o + h) - J(o - h)| / 2h of every output o of a block, summed over images; see `relevance.hessian`.

    number: of the block. after: float values behind it, of so many images. wanted: the float answer. step: h.
    """
    names = [
        name
        for name in exact.blocks[number].outputs
        if isinstance(value := after[name], Tensor) and value.is_floating_point() and value.numel() % images == 0
    ]
    gradients: list[Sequence[Tensor]] = []
    for moved in (step, -step):
        outputs = [(after[name].detach() + moved).requires_grad_() for name in names]
        with torch.enable_grad():
            values = {**after, **dict(zip(names, outputs, strict=True))}
            for block in exact.blocks[number + 1 :]:
                values = block.run(values)
            total = change(exact.answer(values), wanted).sum()
            gradients.append(torch.autograd.grad(total, outputs, allow_unused=True, materialize_grads=True))
    return {
        name: (above - below).abs().reshape(images, -1).sum(0) / (2 * step)
        for name, above, below in zip(names, *gradients, strict=True)
    }
