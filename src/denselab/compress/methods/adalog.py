"""AdaLog: logarithms whose base is fitted for what follows a softmax or a GELU, and every range by what a layer gives.

Wu et al.: AdaLog: Post-Training Quantization for Vision Transformers with Adaptive Logarithm Quantizer, ECCV 2024,
arXiv:2407.12951; GoatWu/AdaLog@75a57d2 quant_layers, utils/calibrator.py. Attention maps have scale 1, and the base
of least error of attention times values (section 3.2). GELUs are lifted by -min GELU, and get the scale and base of
least error of the next layer; an export feeds that layer `AdaLog.shifted_values` and `bias_without_shift`. What follows
a LayerNorm is made per tensor as in RepQ-ViT. All else is uniform: queries, keys and values per head, weights per
output channel. Two parameters at a time are searched from coarse to fine (section 3.3, `ranges.fpcs`), in turn of the
two operands of a product, for `ROUNDS` rounds; the error is that of the product, the other operand being quantized.

Deviations. The error is estimated, from some rows and columns of the operands of 32 images, and for layers on random
sums of outputs (`_sketched`), which leave its mean what it is. There are two rounds, not three. Zero points are tried
around the one found before, not around the middle code, and a search never ends worse than it began: it begins at the
fit of RepQ-ViT. Bases start at q = 1 instead of 10, whose steps of 20 % leave most of 256 codes unused. Convolutions
whose windows overlap or come in groups, stored factors of matrix products, and tensors per channel keep RepQ-ViT's fit.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import islice
from operator import itemgetter
from typing import TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, fx

from denselab.compress.edit import argument, packet
from denselab.compress.graph import Graph, Hook
from denselab.compress.methods import repq_vit
from denselab.compress.methods.method import Calibration, Method, Seen, unfit
from denselab.compress.observing import Stats, weights
from denselab.compress.plan import Granularity, Grid, QuantPlan, QuantSpec, finest
from denselab.compress.quantizers import AdaLog, Quantizer, Uniform, parameter_shape, quantized
from denselab.compress.ranges import (
    adalog_bases,
    affine,
    extremes,
    fpcs,
    least_error,
    percentile_ranges,
    percentile_scales,
    symmetric,
)
from denselab.compress.relevance.scores import single_images
from denselab.compress.simulate import QuantizedGraph
from denselab.compress.sites import Op, Operand, QuantSite, Source

aten = torch.ops.aten

ROUNDS = 2
IMAGES = 32
GELU_SHIFT = 0.16997124254703522
"""Minus the least number that a GELU gives."""

_BASES = range(1, 129)
_NUMBERS_PER_IMAGE = 2**12
_SKETCH = 64
_AT_ONCE = 2**17

Rows = Float[Tensor, "M H R K"]
Groups = Float[Tensor, "N G"]
Found = TypeVar("Found", bound=Quantizer)


def spec(site: QuantSite, bits: int) -> QuantSpec:
    """AdaLog for attention maps and after GELUs; else affine: weights per output channel, attention per head."""
    if site.operand is Operand.ATTENTION and site.made_by is Source.SOFTMAX:
        return QuantSpec(bits, Grid.ADALOG)
    if site.operand is Operand.INPUT and site.made_by is Source.GELU:
        return QuantSpec(bits, Grid.ADALOG)
    finely = site.is_weight or site.operand in (Operand.QUERY, Operand.KEY, Operand.VALUE)
    return QuantSpec(bits, Grid.UNIFORM, finest(site) if finely else Granularity.PER_TENSOR)


def quantize(graph: Graph, stats: Stats, plan: QuantPlan, calibration: Calibration) -> QuantizedGraph:
    """Begin at RepQ-ViT's fit, then search by the error of every product.

    Raises InputError as `fitted`, for grids it cannot fit, and for no calibration images.
    """
    start = repq_vit.reparameterized(graph, stats, plan, fit=fit)
    found = dict(start.quantizers)
    generator = torch.Generator().manual_seed(calibration.seed)
    products = _products(start.graph, plan, calibration, generator)
    searched: set[str] = set()
    for number, (left, right) in enumerate(products):
        calibration.say(f"adalog: product {number + 1} of {len(products)}")
        turns = [each for each in ((left, right), (right, left)) if each[0].key in found.keys() - searched]
        for _ in range(ROUNDS):
            for mine, other in turns:
                found[mine.key] = _searched(mine, other, found, generator)
        searched.update(mine.key for mine, _ in turns)
    return QuantizedGraph(start.graph, plan, found)


def fit(site: QuantSite, spec: QuantSpec, seen: Seen) -> Quantizer:
    """Where a search begins: `fit_adalog` where the plan has one, else as RepQ-ViT."""
    match spec.grid:
        case Grid.ADALOG:
            return fit_adalog(site, seen, spec.bits)
        case Grid.UNIFORM | Grid.LOG_SQRT2:
            return repq_vit.fit(site, spec, seen)
        case Grid.LOG2 | Grid.SULQ | Grid.TANQ | Grid.TERNARY:
            raise unfit(ADALOG.name, spec)


def fit_adalog(site: QuantSite, seen: Seen, bits: int) -> AdaLog:
    """The AdaLog quantizer of least squared error of the site itself, of every eighth base.

    The scale is 1 after a softmax, the shift that of a GELU after one, else what lifts the least number to 0.
    """
    lift = GELU_SHIFT if site.made_by is Source.GELU else (-seen.low).clamp(min=0)
    shift = torch.zeros_like(seen.low) + lift
    values = seen.values if seen.keep else seen.values.flatten()[:: max(seen.values.numel() // 2**14, 1)]
    if site.made_by is Source.SOFTMAX:
        scales = [torch.ones_like(seen.high)]
    else:
        greatest = seen.high + shift
        scales = [*percentile_scales(values + shift, keep=seen.keep), torch.where(greatest > 0, greatest, 1)]
    bases = _BASES[7::8]
    return least_error(values, [each for scale in scales for each in adalog_bases(scale, bits, shift, bases)])


@dataclass(frozen=True, eq=False)
class _Operand:
    """Some rows of an operand: a product is x y^T of both, in M windows of images and H heads, which layers have not.

    site: that is quantized. values: a weight has a row per output. axis: of what keeps parameters of its own.
    """

    site: QuantSite
    values: Rows

    @property
    def key(self) -> str:
        return self.site.key

    @property
    def axis(self) -> int:
        return 2 if self.site.is_weight else 1

    def kept(self, quantizer: Quantizer | None) -> Rows:
        """As a quantizer keeps them."""
        if quantizer is None:
            return self.values
        shape = [1, 1, 1, 1]
        shape[self.axis] = parameter_shape(quantizer).numel()
        return quantized(_changed(quantizer, partial(torch.reshape, shape=shape)), self.values)


def _changed(quantizer: Found, change: Callable[[Tensor], Tensor]) -> Found:
    """The same quantizer with each of its parameters, in the one shape of all, changed."""
    shape = parameter_shape(quantizer)
    parts = {each.name: getattr(quantizer, each.name) for each in fields(quantizer)}
    return replace(quantizer, **{name: change(x.expand(shape)) for name, x in parts.items() if isinstance(x, Tensor)})


def _joined(pieces: Sequence[Found]) -> Found:
    """One quantizer of the groups of several."""
    names = [each.name for each in fields(pieces[0]) if isinstance(getattr(pieces[0], each.name), Tensor)]
    return replace(pieces[0], **{name: torch.cat([getattr(each, name) for each in pieces]) for name in names})


def _searched(
    mine: _Operand, other: _Operand, quantizers: Mapping[str, Quantizer], generator: torch.Generator
) -> Quantizer:
    """The quantizer of one operand of least error of the product, the other's given."""
    start = quantizers[mine.key]
    if not isinstance(start, Uniform | AdaLog):
        return start
    shape = parameter_shape(start)
    axis = mine.axis if shape.numel() > 1 else None
    kept = other.kept(quantizers.get(other.key))
    kept, change = _sketched([kept, kept - other.values], generator)
    flat = _changed(start, torch.flatten)
    # Weights block by block, so that the candidates of one stay in the cache.
    rows = max(_AT_ONCE // mine.values.shape[3], 1) if axis == 2 else mine.values.shape[2]
    found: list[Uniform | AdaLog] = []
    for first in range(0, mine.values.shape[2], rows):
        x = mine.values[:, :, first : first + rows]
        begun = _changed(flat, itemgetter(slice(first, first + rows))) if axis == 2 else flat
        error = _ProductError(x, kept, x @ change.mT, axis)
        match begun:
            case Uniform():
                found.append(_least_uniform(error, begun))
            case AdaLog():
                found.append(_least_adalog(error, begun, mine.site.made_by is Source.SOFTMAX))
    return _changed(_joined(found), partial(torch.reshape, shape=shape))


def _sketched(operands: list[Rows], generator: torch.Generator) -> list[Rows]:
    """Sums of rows with random signs in place of many rows: the squares of products with them add up to as much.

    In the mean over signs; Achlioptas: Database-friendly random projections, 2003.
    """
    rows = operands[0].shape[2]
    if rows <= _SKETCH:
        return operands
    signs = torch.randint(2, (_SKETCH, rows), generator=generator) * 2 - 1
    mixing = (signs / _SKETCH**0.5).to(operands[0].dtype)
    return [mixing @ each for each in operands]


@dataclass(frozen=True, eq=False)
class _ProductError:
    """|| x^ y^^T - x y^T ||^2 of candidates for x^, per group that has parameters of its own.

    kept: y^. rest: x (y^ - y)^T. axis: of x, that groups lie along; None for one group.
    """

    x: Rows
    kept: Rows
    rest: Float[Tensor, "M H R C"]
    axis: int | None

    def of(self, candidates: Callable[[Tensor, Tensor], Quantizer], scales: Groups, others: Tensor) -> Groups:
        """candidates: a quantizer of scales and other parameters [N, G]."""
        x, at_once = self.x.unsqueeze(2), max(_AT_ONCE // self.x.numel(), 1)
        errors: list[Tensor] = []
        for scale, other in zip(scales.split(at_once), others.split(at_once), strict=True):
            change = quantized(candidates(self.spread(scale), self.spread(other)), x) - x
            product = (change.flatten(2, 3) @ self.kept.mT).unflatten(2, change.shape[2:4])
            errors.append(self._per_group(product.add_(self.rest.unsqueeze(2)).square_()))
        return torch.cat(errors)

    def per_group(self) -> Float[Tensor, "G numbers"]:
        """x, with the numbers of every group together."""
        return self.x.flatten()[None] if self.axis is None else self.x.movedim(self.axis, 0).flatten(1)

    def spread(self, parameter: Float[Tensor, "n G"]) -> Tensor:
        """Beside x with candidates as third dimension."""
        match self.axis:
            case 1:
                return parameter.t()[None, :, :, None, None]
            case _:
                return parameter[None, None, :, :, None]

    def _per_group(self, squares: Float[Tensor, "M H n R C"]) -> Float[Tensor, "n G"]:
        match self.axis:
            case None:
                return squares.sum((0, 1, 3, 4))[:, None]
            case 1:
                return squares.sum((0, 3, 4)).t()
            case _:
                return squares.sum((0, 1, 4))


def _least_uniform(error: _ProductError, start: Uniform) -> Uniform:
    """8 scales, from the range of nine tenths of the numbers to that of all, times 16 zero points; then finer."""
    values, symmetrically = error.per_group(), start.zero_point is None
    scales = (
        (symmetric if symmetrically else affine)(low.flatten(), high.flatten(), start.bits).scale
        for low, high in (*percentile_ranges(values, (0.9,), keep=(0,)), extremes(values, keep=(0,)))
    )
    if start.zero_point is None:
        zero_points = torch.zeros(1, len(start.scale), dtype=torch.int32)
    else:
        steps = torch.arange(-8, 8, dtype=torch.int32)[:, None]
        zero_points = (start.zero_point + steps).clamp(start.lowest, start.highest)

    def candidates(scale: Tensor, zero_point: Tensor) -> Uniform:
        return Uniform(scale, None if symmetrically else zero_point, start.bits)

    score = partial(error.of, candidates)
    found = fpcs(_evenly(8, *scales), zero_points, score, steps=3, beam=8, budget=64)
    begun = start.scale, zero_points[0] if start.zero_point is None else start.zero_point
    return candidates(*_better(score, found, begun))


def _least_adalog(error: _ProductError, start: AdaLog, scale_is_known: bool) -> AdaLog:
    """The best base for the scale that it has; or the 8 best times 16 scales, then finer scales."""

    def candidates(scale: Tensor, base: Tensor) -> AdaLog:
        return AdaLog(scale, base, start.bits, error.spread(start.shift[None]), start.zero)

    score = partial(error.of, candidates)
    bases = torch.tensor(_BASES)[:, None].expand(-1, len(start.scale))
    best = score(start.scale.expand(bases.shape), bases).argsort(stable=True, dim=0)
    found = start.scale, bases.gather(0, best[:1])[0]
    if not scale_is_known:
        lifted = error.per_group() + start.shift[:, None]
        scales = (each.flatten() for each in percentile_scales(lifted, (0.9, 1.0), keep=(0,)))
        found = fpcs(_evenly(16, *scales), bases.gather(0, best[:8]), score, steps=3, beam=8, budget=64)
    scale, base = _better(score, found, (start.scale, start.q))
    return AdaLog(scale, base, start.bits, start.shift, start.zero)


def _evenly(count: int, least: Float[Tensor, "G"], most: Float[Tensor, "G"]) -> Groups:
    """So many scales up to the greatest, from the least or what of a half to a sixteenth of the greatest is nearest."""
    least = least.minimum(most / 2).maximum(most / 16)
    return least + torch.linspace(0, 1, count, dtype=most.dtype)[:, None] * (most - least)


def _better(
    score: Callable[[Tensor, Tensor], Groups], first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Per group, the pair of less error, the second of equals."""
    errors = score(torch.stack([first[0], second[0]]), torch.stack([first[1], second[1]]))
    better = errors[0] < errors[1]
    return torch.where(better, first[0], second[0]), torch.where(better, first[1], second[1])


def _products(
    graph: Graph, plan: QuantPlan, calibration: Calibration, generator: torch.Generator
) -> list[tuple[_Operand, _Operand]]:
    """Both operands of every product that is searched, sampled from the first images."""
    sites, stored = graph.found.by_key, weights(graph)
    samplers: list[_Sampler] = []
    for product in graph.found.products:
        left, right = sites[product.left], sites[product.right]
        planned = plan.specs.get(left.key)
        if planned is not None and planned.granularity is Granularity.PER_CHANNEL:
            continue
        if left.op is Op.MATMUL:
            if not left.is_weight and not right.is_weight and left.shape[:-2] == right.shape[:-2]:
                samplers.append(_Sampler(left, right, None, None, generator))
        elif right.is_weight:
            patch = _patch(graph.found.places[left.key][0].node, right)
            if left.op is Op.LINEAR or patch is not None:
                weight = stored[right.key].detach().flatten(1)[None, None]
                samplers.append(_Sampler(left, right, patch, weight, generator))
    hooks: dict[str, Hook] = {}
    for each in samplers:
        hooks[each.left.key] = each.see_left  # before the right one, which sees the same windows
        if each.weight is None:
            hooks[each.right.key] = each.see_right
    with torch.no_grad():
        for pixels in islice(single_images(graph, calibration.batches), IMAGES):
            graph.run(pixels, hooks=hooks)
    return [each.operands() for each in samplers]


def _patch(layer: fx.Node, weight: QuantSite) -> tuple[int, int] | None:
    """Height and width of the windows of a convolution that reads every pixel at most once, as patch embeddings do."""
    if packet(layer) is not aten.conv2d:
        return None
    height_px, width_px = weight.shape[2:]
    stride, padding, dilation, groups = (
        argument(layer, number, default) for number, default in ((3, [1, 1]), (4, [0, 0]), (5, [1, 1]), (6, 1))
    )
    apart = (list(stride), list(padding), list(dilation), groups) == ([height_px, width_px], [0, 0], [1, 1], 1)
    return (height_px, width_px) if apart else None


class _Sampler:
    """What calibration shows of the operands of one product."""

    def __init__(
        self,
        left: QuantSite,
        right: QuantSite,
        patch: tuple[int, int] | None,
        weight: Rows | None,
        generator: torch.Generator,
    ) -> None:
        self.left, self.right, self.patch, self.weight = left, right, patch, weight
        self.generator = generator
        self.windows = torch.empty(0)
        self.lefts: list[Rows] = []
        self.rights: list[Rows] = []

    def see_left(self, x: Tensor) -> Tensor:
        rows = self._rows(x)
        count, heads, _, numbers = rows.shape
        few = max(_NUMBERS_PER_IMAGE // (8 * heads * numbers), 1)
        self.windows = self._some(count, few)
        self.lefts.append(self._sampled(rows))
        return x

    def see_right(self, x: Tensor) -> Tensor:
        self.rights.append(self._sampled(self._rows(x.mT)))
        return x

    def operands(self) -> tuple[_Operand, _Operand]:
        """From all images of the size of the first."""
        lefts, rights = self.lefts, self.rights
        if self.weight is not None:
            return _Operand(self.left, torch.cat(lefts, dim=2)), _Operand(self.right, self.weight)
        alike = [
            number
            for number, (x, y) in enumerate(zip(lefts, rights, strict=True))
            if (x.shape, y.shape) == (lefts[0].shape, rights[0].shape)
        ]
        x, y = (torch.cat([each[number] for number in alike]) for each in (lefts, rights))
        return _Operand(self.left, x), _Operand(self.right, y)

    def _rows(self, x: Tensor) -> Rows:
        """All that the product reads, as it multiplies it."""
        if self.weight is None:
            heads = x.shape[-3] if x.ndim > 3 else 1
            return x.reshape(-1, heads, *x.shape[-2:])
        if self.patch is not None:
            x = F.unfold(x, self.patch, stride=self.patch).mT
        return x.reshape(1, 1, -1, x.shape[-1])

    def _sampled(self, rows: Rows) -> Rows:
        _, heads, _, numbers = rows.shape
        few = max(_NUMBERS_PER_IMAGE // (len(self.windows) * heads * numbers), 1)
        return rows.index_select(2, self._some(rows.shape[2], few)).index_select(0, self.windows)

    def _some(self, count: int, at_most: int) -> Int[Tensor, "some"]:
        return torch.randperm(count, generator=self.generator)[:at_most]


ADALOG = Method("adalog", spec, quantize)
