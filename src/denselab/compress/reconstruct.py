"""Reconstruction: the weights and scales of a quantized network are optimised block by block on calibration images.

Every block (`blocks`) in order of execution is given what the blocks before it, already quantized, make of the images,
and learns to say what the float network says. What "says" means is the loss:

- OUTPUT: squared error of the block's outputs. Li et al.: BRECQ, ICLR 2021, arXiv:2102.05426; I&S-ViT.
- HESSIAN: the same, weighted by the average perturbation Hessian of the change of the answer. Wu et al.: APHQ-ViT, CVPR
  2025; GoatWu/APHQ-ViT@44a985d utils/block_recon.py (see `relevance.hessian`).

A third, the change of the answer when the outputs run through the rest of the network, float and frozen (GLF-Q, 2026),
was tried and left out: from 128 images it fits what it sees and does worse on others.

What is learned: activation scales as in LSQ (`quantizers.uniform`), and weights either straight through, with their
scales, or as AdaRound rounds them (Nagel et al., ICML 2020, arXiv:2004.10568): to the step below or above, by
h = clip(1.2 sigmoid(V) - 0.1, 0, 1) and the regulariser 1 - |2 h - 1|^beta, beta falling from 20 to 2. QDrop (Wei et
al., ICLR 2022, arXiv:2203.05740): while learning, each element of an activation, and of what enters the block, stays
float by chance.

Deviations. Rates are relative, so that they suit any network and width: of scales, to the scale (their logarithm is
learned, so that they stay above 0); of weights, to the step of their grid, or to their root mean square where they stay
float. Every loss is divided by its first value, and the regulariser is a mean over weights, not their sum. Images come
in fixed batches, drawn at random. Only weights that one block alone reads are learned; AdaRound leaves those that are
computed (not stored as they are read) at the nearest step.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import partial
from typing import Any, assert_never

import torch
from jaxtyping import Float
from torch import Tensor, fx

from denselab.compress.blocks import Block, Blocks, Values, find_blocks, frozen, with_parameters
from denselab.compress.edit import float_dtype, is_stored
from denselab.compress.graph import Axis, Graph, Hook, ShapesRun
from denselab.compress.methods.method import Calibration
from denselab.compress.quantizers import Quantizer, Uniform, fake_quantized, quantized
from denselab.compress.relevance.scores import Batches
from denselab.compress.relevance.sensitivity import Change
from denselab.compress.simulate import QuantizedGraph
from denselab.errors import InputError

_STRETCH_LOW, _STRETCH_HIGH = -0.1, 1.1
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
class AdaRound:
    """Weights stay between two steps of their grid until they choose one.

    rate: of Adam, of V. strength: of the regulariser, beside an error that starts at 1. warm_up: share of the steps
    without it.
    """

    rate: float
    strength: float = 1.0
    warm_up: float = 0.2
    first_beta: float = 20.0
    last_beta: float = 2.0

    def beta(self, done: float) -> float:
        """The exponent when a share of the steps is done, falling linearly after the warm-up."""
        left = (1 - done) / (1 - self.warm_up)
        return self.last_beta + (self.first_beta - self.last_beta) * min(max(left, 0), 1)


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
    seen = _Calibrated(exact, calibration, recipe, held)
    shared = _shared(work)
    quantizers = dict(start.quantizers)
    changed: dict[str, Tensor] = {}
    for number, block in enumerate(work.blocks):
        seen.enter(number)
        ours = {key: quantizers[key] for key in block.graph.found.places if key in quantizers}
        now = _Fixed(block, ours)
        if any(ours[key].bits < recipe.below_bits for key in block.sites if key in ours):
            task = _Task(seen, number, now, recipe, calibration)
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


# AdaRound


def rounding_logits(rest: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """V at which h is what rounding down leaves over, 0 to 1."""
    return -((_STRETCH_HIGH - _STRETCH_LOW) / (rest - _STRETCH_LOW) - 1).log()


def rounded_up(logits: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """h, the share of a step that is rounded up: the rectified sigmoid (AdaRound, eq. 23)."""
    return (logits.sigmoid() * (_STRETCH_HIGH - _STRETCH_LOW) + _STRETCH_LOW).clamp(0, 1)


def undecided(share: Float[Tensor, "..."], beta: float) -> Float[Tensor, ""]:
    """The regulariser: 0 where all shares are 0 or 1 (AdaRound, eq. 24)."""
    return (1 - (2 * share - 1).abs().pow(beta)).sum()


def rounded(quantizer: Uniform, weight: Float[Tensor, "..."], share: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The weight a share of a step above the step below it, within the grid."""
    zero = torch.tensor(0) if quantizer.zero_point is None else quantizer.zero_point
    steps = (weight / quantizer.scale).floor() + share
    return steps.clamp(quantizer.lowest - zero, quantizer.highest - zero) * quantizer.scale


# Blocks as they are, and as they learn


@dataclass(frozen=True, eq=False)
class _Fixed:
    """A block with quantizers that do not change. parameters: those that differ from the start's."""

    block: Block
    quantizers: Mapping[str, Quantizer]
    parameters: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    def hooks(self) -> dict[str, Hook]:
        return {key: partial(quantized, quantizer) for key, quantizer in self.quantizers.items()}


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
                    key: self._learn(rounding_logits(_rest(quantizers[key], stored[name])), rate, falls=False)
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

    def fixed(self) -> _Fixed:
        """What was learned so far, weights rounded for good."""
        quantizers = {key: _without_gradient(self._quantizer(key)) for key in self.given}
        parameters = {name: each.detach() for name, each in self.parameters.items()}
        stored = dict(self.block.graph.module.named_parameters())
        for key, logits in self.logits.items():
            name, up = self.name_of[key], (rounded_up(logits.detach()) >= 0.5).to(logits.dtype)
            parameters[name] = self._rounded(key, stored[name].detach(), up)
        graph = with_parameters(self.block.graph, parameters)
        return _Fixed(replace(self.block, graph=frozen(graph)), quantizers, parameters)

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


def _learned(learning: _Learning, task: "_Task") -> _Fixed:
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


def _drawn(images: Sequence["_Images"], generator: torch.Generator) -> Iterator["_Images"]:
    """Batches in random order, again and again."""
    while True:
        for number in torch.randperm(len(images), generator=generator).tolist():
            yield images[number]


# What is asked of a block


@dataclass(eq=False)
class _Images:
    """A batch.

    rough, exact: values before the block, of the quantized and of the float network. target: float, after the block.
    wanted: what the float network answers.
    """

    count: int
    rough: Values
    exact: Values
    target: Values
    wanted: Any


class _Calibrated:
    """The images on their way through the blocks."""

    def __init__(
        self, exact: Blocks, calibration: Calibration, recipe: Recipe, held: Sequence[Float[Tensor, "B 3 H W"]]
    ) -> None:
        self.exact = exact
        at_once, most = _that_fit(exact, recipe)
        batches = split_images(exact.graph, calibration.batches, at_once, calibration.seed)
        with torch.no_grad():
            self.learned_from = [self._begin(each) for each in batches[: max(most // len(batches[0]), 1)]]
            self.held = [self._begin(part) for each in held for part in each.split(len(batches[0]))]

    @property
    def judged_by(self) -> list[_Images]:
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

    def _begin(self, pixels: Tensor) -> _Images:
        before = self.exact.start(pixels)
        after = before
        for block in self.exact.blocks:
            after = block.run(after)
        return _Images(len(pixels), before, before, before, self.exact.answer(after))


class _Task:
    """What is asked of a block. first: the terms of its loss before it learns; without those that are 0 then."""

    def __init__(self, seen: _Calibrated, number: int, now: _Fixed, recipe: Recipe, calibration: Calibration) -> None:
        self.seen = seen
        self.curvature = (
            _curvature(seen, number, calibration.change, recipe.curvature_pixels) if recipe.loss is Loss.HESSIAN else {}
        )
        self.first = dict[str, float]()
        self.first = {name: value for name, value in self._terms(now).items() if value > 0}

    def loss(self, images: _Images, block: Block, before: Values, hooks: Mapping[str, Hook]) -> Tensor:
        """1 where nothing is better than it was."""
        terms = self._terms_of(images, block, before, hooks)
        return torch.stack([terms[name] / first for name, first in self.first.items()]).mean()

    def total(self, block: _Fixed) -> float:
        """The loss on all images that are judged by."""
        with torch.no_grad():
            losses = [self.loss(each, block.block, each.rough, block.hooks()) for each in self.seen.judged_by]
        return torch.stack(losses).mean().item()

    def _terms(self, block: _Fixed) -> dict[str, float]:
        found: dict[str, list[float]] = {}
        with torch.no_grad():
            for each in self.seen.judged_by:
                for name, value in self._terms_of(each, block.block, each.rough, block.hooks()).items():
                    found.setdefault(name, []).append(value.item())
        return {name: math.fsum(values) / len(values) for name, values in found.items()}

    def _terms_of(self, images: _Images, block: Block, before: Values, hooks: Mapping[str, Hook]) -> dict[str, Tensor]:
        after = block.run(before, hooks)
        return {
            name: self._error(name, after[name], images)
            for name in block.outputs
            if isinstance(after[name], Tensor) and after[name].is_floating_point()
        }

    def _error(self, name: str, got: Tensor, images: _Images) -> Tensor:
        error = (got - images.target[name]).square()
        if name in self.curvature:
            error = error.reshape(images.count, -1) * self.curvature[name]
        return error.mean()


def _curvature(seen: _Calibrated, number: int, change: Change, most_pixels: int) -> dict[str, Float[Tensor, "numbers"]]:
    """The average perturbation Hessian of every output of a block, with mean 1; without those that change nothing."""
    sums: dict[str, Tensor] = {}
    images_at_once = seen.learned_from[0].count
    batches = most_pixels // (images_at_once * math.prod(seen.exact.graph.example_shapes[0][-2:]))
    for images in seen.learned_from[: max(batches, 1)]:
        found = perturbed_hessian(seen.exact, number, images.target, images.wanted, images.count, change)
        sums = {name: sums.get(name, 0) + curved for name, curved in found.items()}
    return {name: curved / curved.mean() for name, curved in sums.items() if curved.mean() > 0}


# Small questions


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


def _rest(quantizer: Quantizer, weight: Tensor) -> Tensor:
    """What rounding weights down leaves over, in steps."""
    assert isinstance(quantizer, Uniform)
    steps = weight.detach() / quantizer.scale
    return steps - steps.floor()


def _step(quantizer: Quantizer | None, weight: Tensor) -> float:
    """How far apart the numbers of a weight's grid are, in the mean over channels."""
    return quantizer.scale.mean().item() if isinstance(quantizer, Uniform) else _size(weight)


def _size(value: Tensor) -> float:
    """The root mean square; 1 for zeros."""
    return value.detach().square().mean().sqrt().item() or 1.0


def _without_gradient(quantizer: Quantizer) -> Quantizer:
    return replace(quantizer, scale=quantizer.scale.detach()) if isinstance(quantizer, Uniform) else quantizer
