"""Reconstruction: the weights and scales of a quantized network are optimised block by block on calibration images.

Every block (`blocks`) in order of execution is given what the blocks before it, already quantized, make of the images,
and learns to say what the float network says. What "says" means is the loss:

- OUTPUT: squared error of the block's outputs. Li et al.: BRECQ, ICLR 2021, arXiv:2102.05426; I&S-ViT.
- HESSIAN: the same, weighted by the average perturbation Hessian of the change of the answer. Wu et al.: APHQ-ViT, CVPR
  2025; GoatWu/APHQ-ViT@44a985d utils/block_recon.py (see `relevance.hessian`).

A third, the change of the answer when the outputs run through the rest of the network, float and frozen (GLF-Q, 2026),
was tried and left out: from 128 images it fits what it sees and does worse on others.

What is learned: activation scales as in LSQ (`quantizers.uniform`), and weights either straight through, with their
scales, or as AdaRound rounds them (`adaround`). QDrop (Wei et al., ICLR 2022, arXiv:2203.05740): while learning, each
element of an activation, and of what enters the block, stays float by chance.

Deviations. Rates are relative, so that they suit any network and width: of scales, to the scale (their logarithm is
learned, so that they stay above 0); of weights, to the step of their grid, or to their root mean square where they stay
float. Every loss is divided by its first value, and the regulariser is a mean over weights, not their sum. Images come
in fixed batches, drawn at random. Only weights that one block alone reads are learned; AdaRound leaves those that are
computed (not stored as they are read) at the nearest step.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from typing import Any, assert_never

import torch
from jaxtyping import Float
from torch import Tensor, fx

from denselab.compress.adaround import AdaRound, left_over, rounded, rounded_up, rounding_logits, undecided
from denselab.compress.block_loss import BlockImages, BlockTask, FixedBlock, Passing, average_curvature, split_images
from denselab.compress.blocks import Block, Blocks, find_blocks, frozen, with_parameters
from denselab.compress.edit import float_dtype, is_stored
from denselab.compress.graph import Graph, Hook, ShapesRun
from denselab.compress.methods.method import Calibration
from denselab.compress.quantizers import Quantizer, Uniform, fake_quantized
from denselab.compress.simulate import QuantizedGraph

_MOST_GROWTH = 4.0


class Loss(Enum):
    """What a block is asked to keep; see the module."""

    OUTPUT = "output"
    HESSIAN = "hessian"


@dataclass(frozen=True)
class StraightThrough:
    """Weights move, and are rounded to the nearest step. rate: of Adam, in steps of their grid."""

    rate: float


@dataclass(frozen=True)
class Recipe:
    """How blocks are optimised, each with Adam; rates fall as a cosine, but for that of AdaRound.

    steps: per block. scale_rate: relative, of the scales. drop: share of activations that stay float while learning.
    images_per_step, pixels_per_step: at most; a large image teaches as much as many small ones. curvature_pixels: no
    batch beyond so many says how much the outputs of a block matter, which costs a run of all that follows it.
    memory_bytes: for what is kept of all images, and for one step; fewer images are used where they do not fit.
    below_bits: a block with as many bits at every site is left as it is.
    """

    loss: Loss
    rounding: StraightThrough | AdaRound
    steps: int
    scale_rate: float
    drop: float = 0.0
    images_per_step: int = 16
    pixels_per_step: int = 2**18
    curvature_pixels: int = 2**20
    memory_bytes: int = 2**30
    below_bits: int = 9


def reconstruct(
    start: QuantizedGraph,
    calibration: Calibration,
    recipe: Recipe,
    held: Sequence[Float[Tensor, "B 3 H W"]] = (),
    wanted: Graph | None = None,
) -> QuantizedGraph:
    """The quantized network with other weights and scales; plan, grids and the user's model stay.

    calibration: images, change, seed, and who is told of every block. held: batches of other images, default the same;
    a block whose loss on them did not fall is put back. wanted: the float network to imitate, of the same operations;
    default the start's.
    Raises InputError for no images, and for outputs that are NaN or infinite.
    """
    if not recipe.steps:
        return start
    source = frozen(start.graph)
    work = find_blocks(source)
    exact = work if wanted is None else find_blocks(frozen(wanted))
    at_once, most = _that_fit(exact, recipe)
    batches = split_images(exact.graph, calibration.batches, at_once, calibration.seed)
    seen = Passing(exact, batches[: max(most // len(batches[0]), 1)], held)
    shared = _shared(work)
    quantizers = dict(start.quantizers)
    changed: dict[str, Tensor] = {}
    for number, block in enumerate(work.blocks):
        seen.enter(number)
        ours = {key: quantizers[key] for key in block.graph.found.places if key in quantizers}
        now = FixedBlock(block, ours)
        if any(ours[key].bits < recipe.below_bits for key in block.sites if key in ours):
            curvature = (
                average_curvature(seen, number, calibration.change, recipe.curvature_pixels)
                if recipe.loss is Loss.HESSIAN
                else {}
            )
            task = BlockTask(seen, number, now, curvature)
            generator = torch.Generator().manual_seed(calibration.seed + number)
            learned = _learned(_Learning(block, ours, recipe, shared, generator), task)
            loss = task.total(learned)
            calibration.say(
                f"block {number + 1} of {len(work.blocks)} ({block.name or 'model'}): {loss:.0%} of its loss is left"
            )
            if loss < 1:
                now = learned
                changed |= learned.parameters
                quantizers |= learned.quantizers
        seen.leave(now.block, now.hooks())
    graph = with_parameters(start.graph, changed, trainable=True)
    return QuantizedGraph(graph, start.plan, quantizers)


class _Learning:
    """A block whose parameters and scales take gradients.

    groups: of Adam. logits: V by site. growth: of scales, logarithms by site. parameters: those that move, by name.
    """

    def __init__(
        self,
        block: Block,
        quantizers: Mapping[str, Quantizer],
        recipe: Recipe,
        shared: frozenset[str],
        generator: torch.Generator,
    ) -> None:
        self.recipe = recipe
        self.given = quantizers
        self.generator = generator
        self.groups: list[dict[str, Any]] = []
        self.sites = block.graph.found.by_key
        stored = {name: each for name, each in block.graph.module.named_parameters() if name not in shared}
        site_of = {name: key for key in self.sites for name in _weights_behind(block.graph, key)}
        own = [key for key in block.sites if key in quantizers and recipe.scale_rate]
        match recipe.rounding:
            case StraightThrough(rate):
                rates = {
                    name: rate * _step(quantizers.get(site_of[name]), stored[name])
                    for name in stored
                    if name in site_of
                }
                self.logits: dict[str, Tensor] = {}
            case AdaRound(rate):
                rates = dict[str, float]()
                own = [key for key in own if not self.sites[key].is_weight]
                self.logits = {
                    key: self._learn(rounding_logits(left_over(quantizers[key], stored[name])), rate, falls=False)
                    for name, key in site_of.items()
                    if name in stored
                    and isinstance(quantizers.get(key), Uniform)
                    and _reads_as_stored(block.graph, key)
                }
            case _:
                assert_never(recipe.rounding)
        self.name_of = {key: name for name, key in site_of.items()}
        graph = with_parameters(block.graph, {name: stored[name].detach().clone() for name in rates}, trainable=True)
        self.block = replace(block, graph=graph)
        self.parameters = {name: each for name, each in graph.module.named_parameters() if name in rates}
        self.groups += [{"params": [each], "lr": rates[name], "falls": True} for name, each in self.parameters.items()]
        self.growth = self._scales(own)

    def hooks(self) -> dict[str, Hook]:
        """What is read at the sites while learning."""
        return {key: partial(self._read, key) for key in self.given}

    def mixed(self, rough: Tensor, exact: Tensor) -> Tensor:
        """QDrop: some elements of the float tensor in place of the quantized ones."""
        if not self.recipe.drop:
            return rough
        kept = torch.rand(rough.shape, generator=self.generator) < self.recipe.drop
        return torch.where(kept.to(rough.device), exact, rough)

    def regulariser(self, done: float) -> Tensor | float:
        """What AdaRound adds to the error when a share of the steps is done."""
        rounding = self.recipe.rounding
        if not isinstance(rounding, AdaRound) or not self.logits or done < rounding.warm_up:
            return 0.0
        total = sum(undecided(rounded_up(each), rounding.beta(done)) for each in self.logits.values())
        return rounding.strength * total / sum(each.numel() for each in self.logits.values())

    def fixed(self) -> FixedBlock:
        """What was learned so far, weights rounded for good."""
        quantizers = {key: _without_gradient(self._quantizer(key)) for key in self.given}
        parameters = {name: each.detach() for name, each in self.parameters.items()}
        stored = dict(self.block.graph.module.named_parameters())
        for key, logits in self.logits.items():
            name, up = self.name_of[key], (rounded_up(logits.detach()) >= 0.5).to(logits.dtype)
            parameters[name] = self._rounded(key, stored[name].detach(), up)
        graph = with_parameters(self.block.graph, parameters)
        return FixedBlock(replace(self.block, graph=frozen(graph)), quantizers, parameters)

    def _learn(self, start: Tensor, rate: float, falls: bool = True) -> Tensor:
        value = start.detach().clone().requires_grad_()
        self.groups.append({"params": [value], "lr": rate, "falls": falls})
        return value

    def _scales(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """What reads one tensor through equal quantizers keeps doing so: an engine quantizes it once."""
        growth: dict[str, Tensor] = {}
        found: dict[tuple[Any, ...], Tensor] = {}
        for key in keys:
            quantizer = self.given[key]
            if isinstance(quantizer, Uniform):
                same = (self.sites[key].tensor, quantizer.bits, *quantizer.scale.flatten().tolist())
                if same not in found:
                    found[same] = self._learn(torch.zeros_like(quantizer.scale), self.recipe.scale_rate)
                growth[key] = found[same]
        return growth

    def _quantizer(self, key: str) -> Quantizer:
        given = self.given[key]
        if key not in self.growth:
            return given
        assert isinstance(given, Uniform)
        return replace(given, scale=given.scale * self.growth[key].clamp(-_MOST_GROWTH, _MOST_GROWTH).exp())

    def _read(self, key: str, x: Tensor) -> Tensor:
        if key in self.logits:
            return self._rounded(key, x, rounded_up(self.logits[key]))
        read = fake_quantized(self._quantizer(key), x)
        return read if self.sites[key].is_weight else self.mixed(read, x)

    def _rounded(self, key: str, weight: Tensor, share: Tensor) -> Tensor:
        quantizer = self.given[key]
        assert isinstance(quantizer, Uniform)
        return rounded(quantizer, weight, share)


def _learned(learning: _Learning, task: BlockTask) -> FixedBlock:
    """The block after all steps."""
    if not learning.groups or not task.first:
        return learning.fixed()
    steps = learning.recipe.steps
    optimizer = torch.optim.Adam(learning.groups)
    # AdaRound decides at the end, when its regulariser is steepest.
    shares = [partial(_cosine, steps=steps) if group["falls"] else _constant for group in learning.groups]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, shares)
    hooks = learning.hooks()
    with torch.enable_grad():
        for step, images in zip(range(steps), _drawn(task.seen.learned_from, learning.generator), strict=False):
            before = images.rough
            if learning.recipe.drop:
                before = {name: _mixed(learning, each, images.exact[name]) for name, each in before.items()}
            loss = task.loss(images, learning.block, before, hooks) + learning.regulariser(step / steps)
            if not loss.isfinite():
                break
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return learning.fixed()


def _cosine(step: int, steps: int) -> float:
    return (1 + math.cos(math.pi * step / steps)) / 2


def _constant(step: int) -> float:
    return 1.0


def _mixed(learning: _Learning, rough: Any, exact: Any) -> Any:
    is_number = isinstance(rough, Tensor) and rough.is_floating_point()
    return learning.mixed(rough, exact) if is_number else rough


def _drawn(images: Sequence[BlockImages], generator: torch.Generator) -> Iterator[BlockImages]:
    """Batches in random order, again and again."""
    while True:
        for number in torch.randperm(len(images), generator=generator).tolist():
            yield images[number]


def _that_fit(exact: Blocks, recipe: Recipe) -> tuple[int, int]:
    """Images per step, and in all, whose values fit into the memory of a recipe."""
    graph = exact.graph
    run = ShapesRun(graph.module)
    with torch.no_grad():
        run.run(*(torch.zeros(shape, dtype=float_dtype(graph)) for shape in graph.example_shapes))
    images = graph.example_shapes[0][0]
    numbers = {node.name: math.prod(shape) / images for node, shape in run.shapes.items() if node.op != "get_attr"}
    passing = max(sum(numbers.get(name, 0) for name in block.live) for block in exact.blocks)
    answer = sum(numbers.get(node.name, 0) for node in graph.module.graph.output_node().all_input_nodes)
    kept = 3 * passing + answer  # quantized, float, and float after the block
    at_once, in_all = (int(recipe.memory_bytes / (4 * each)) for each in (sum(numbers.values()), kept))
    at_once = min(at_once, recipe.pixels_per_step // math.prod(graph.example_shapes[0][-2:]))
    return min(max(at_once, 1), recipe.images_per_step), in_all


def _shared(work: Blocks) -> frozenset[str]:
    """Parameters that several blocks read."""
    readers = Counter(name for block in work.blocks for name, _ in block.graph.module.named_parameters())
    return frozenset(name for name, count in readers.items() if count > 1)


def _weights_behind(graph: Graph, key: str) -> set[str]:
    """The parameters that a weight is computed from; none for what is no weight."""
    if not graph.found.by_key[key].is_weight:
        return set()
    waiting = [place.node.args[place.argument] for place in graph.found.places[key]]
    found: set[str] = set()
    while waiting:
        node = waiting.pop()
        if isinstance(node, fx.Node):
            waiting += node.all_input_nodes
            found |= {str(node.target)} if is_stored(node) else set()
    return found


def _reads_as_stored(graph: Graph, key: str) -> bool:
    return all(is_stored(place.node.args[place.argument]) for place in graph.found.places[key])


def _step(quantizer: Quantizer | None, weight: Tensor) -> float:
    """How far apart the numbers of a weight's grid are, in the mean over channels."""
    return quantizer.scale.mean().item() if isinstance(quantizer, Uniform) else _size(weight)


def _size(value: Tensor) -> float:
    """The root mean square; 1 for zeros."""
    return value.detach().square().mean().sqrt().item() or 1.0


def _without_gradient(quantizer: Quantizer) -> Quantizer:
    return replace(quantizer, scale=quantizer.scale.detach()) if isinstance(quantizer, Uniform) else quantizer
