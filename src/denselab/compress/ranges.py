"""How a quantizer's parameters are found from data: ranges, candidates, their errors, and the choice among them.

Three steps, each a pure function, so that data may come in batches: ranges from statistics of the data (`extremes`,
`percentile_ranges`) become candidate quantizers (`affine`, `symmetric`, `grid`, ...); `squared_errors` of the
candidates add up over batches; `chosen` takes the least. `least_error` does the last two for data at hand, `least`
chooses by any error the caller can compute, such as that of attention times values, and `fpcs` searches two
parameters from coarse to fine.

keep: the dimensions of the data that keep parameters of their own, the others share them: () per tensor, (0,) per
output channel of a weight, (1,) per head of an attention map. Statistics keep their dimensions (size 1 where shared)
so that they broadcast to the data; per tensor they have none.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from denselab.compress.quantizers import (
    AdaLog,
    Quantizer,
    Sulq,
    Ternary,
    Uniform,
    ZeroCode,
    check_finite,
    parameter_shape,
    quantized,
)
from denselab.errors import InputError

Range = tuple[Float[Tensor, "..."], Float[Tensor, "..."]]
Chosen = TypeVar("Chosen", bound=Quantizer)

# Shares of the data inside the range that are tried: RepQ-ViT@a160561 and, of weights, IaS-ViT@9300cea, quantizer.py.
PERCENTILES = (0.999, 0.9999, 0.99999)
WEIGHT_PERCENTILES = (0.97, 0.98, 0.99, 0.995, 0.9995, 0.9997, 0.9999, 0.99995, 0.99999)
# Shifts and bases that are tried: IaS-ViT@9300cea quantizer.py; AdaLog@75a57d2 with eq_n = 128.
SULQ_ETAS = (0.001, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.1, 0.2, 0.5, 1.0)
ADALOG_BASES = range(10, 138)
SHRINKAGES = tuple(1 - step / 50 for step in range(41))

_LEAST_SCALE_PER_MAGNITUDE = 2.0**-16
_PHOTO_BITS = 8


def extremes(x: Float[Tensor, "..."], keep: Sequence[int] = ()) -> Range:
    """Least and greatest number. Raises InputError for NaN, infinity and no data."""
    rows, shape = _rows(x, keep)
    return rows.amin(-1).view(shape), rows.amax(-1).view(shape)


def percentile_ranges(
    x: Float[Tensor, "..."], shares: Sequence[float] = PERCENTILES, keep: Sequence[int] = ()
) -> tuple[Range, ...]:
    """Per share p, the quantiles 1 - p and p, linear between neighbours. Raises InputError as `extremes`."""
    rows, shape = _rows(x, keep)
    lows, highs = (_quantiles(rows, shares, of_largest) for of_largest in (False, True))
    return tuple((low.view(shape), high.view(shape)) for low, high in zip(lows, highs, strict=True))


def percentile_scales(
    x: Float[Tensor, "..."], shares: Sequence[float] = PERCENTILES, keep: Sequence[int] = ()
) -> tuple[Float[Tensor, "..."], ...]:
    """Candidate scales of quantizers for 0..scale (log2, log-sqrt2, AdaLog, TanQ): per share p the quantile p.

    1 where that is not above 0. Raises InputError as `extremes`.
    """
    rows, shape = _rows(x, keep)
    return tuple(_or_one(scale).view(shape) for scale in _quantiles(rows, shares, of_largest=True))


def affine(low: Float[Tensor, "..."], high: Float[Tensor, "..."], bits: int, with_zero: bool = True) -> Uniform:
    """The affine quantizer of a range: scale (high - low) / (2^bits - 1), zero point round(-low / scale).

    with_zero: the range is widened to hold 0, as engines and zero padding need it; False: as RepQ-ViT calibrates what
    is folded afterwards. A range of zeros gets scale 1. No scale is below 2^-16 of the largest number, so that codes
    stay exact in float32; a constant is then kept exactly. Raises InputError for NaN, infinity, and high below low.

    With 8 bits, a range that is as wide on both sides of 0 gets one step fewer: its zero point would lie between two
    codes, and with it every pixel of a photo that was normalised by mean 0.5.
    """
    check_finite("low", low)
    check_finite("high", high)
    if (high < low).any():
        raise InputError("high: wanted at least low, got less")
    # In float64, where neither the width nor the ratio of two float32 numbers overflows.
    least, most = low.double(), high.double()
    if with_zero:
        least, most = least.clamp(max=0), most.clamp(min=0)
    magnitude = torch.maximum(least.abs(), most.abs())
    steps = torch.full_like(most, 2**bits - 1)
    if with_zero and bits == _PHOTO_BITS:
        steps -= torch.isclose(most, -least, rtol=1e-6, atol=0).to(steps)
    scale = torch.maximum((most - least) / steps, magnitude * _LEAST_SCALE_PER_MAGNITUDE)
    scale = _positive(scale, low.dtype)
    return Uniform(scale, (-least / scale.double()).round().to(torch.int32), bits)


def symmetric(low: Float[Tensor, "..."], high: Float[Tensor, "..."], bits: int) -> Uniform:
    """The symmetric quantizer of a range: scale max(-low, high) / (2^(bits - 1) - 1); 1 for a range of zeros.

    Raises InputError for NaN and infinity.
    """
    check_finite("low", low)
    check_finite("high", high)
    magnitude = torch.maximum(low.abs(), high.abs()).double()
    return Uniform(_positive(magnitude / (2 ** (bits - 1) - 1), low.dtype), None, bits)


def grid(base: Uniform, shrinkages: Sequence[float] = SHRINKAGES, zero_point_steps: int = 0) -> tuple[Uniform, ...]:
    """Candidates around a quantizer: its scale times each shrinkage, its zero point up to so many steps off.

    Zero points stay among the codes if the base's is; a symmetric quantizer has no steps.
    """
    scales = [base.scale * shrinkage for shrinkage in shrinkages]
    zero_point = base.zero_point
    if zero_point is None:
        return tuple(Uniform(scale, None, base.bits) for scale in scales)
    least = zero_point.clamp(max=base.lowest)
    most = zero_point.clamp(min=base.highest)
    steps = sorted(range(-zero_point_steps, zero_point_steps + 1), key=abs)
    return tuple(
        Uniform(scale, (zero_point + step).clamp(least, most), base.bits) for scale in scales for step in steps
    )


def adalog_bases(
    scale: Float[Tensor, "..."],
    bits: int,
    shift: Float[Tensor, "..."] | None = None,
    bases: Iterable[int] = ADALOG_BASES,
    zero: ZeroCode = ZeroCode.LAST,
) -> tuple[AdaLog, ...]:
    """Candidates that differ in the base; AdaLog takes that of least error of attention times values (`least`)."""
    shift = torch.zeros_like(scale) if shift is None else shift
    return tuple(AdaLog(scale, torch.tensor(q, device=scale.device), bits, shift, zero) for q in bases)


def sulq(low: Float[Tensor, "..."], high: Float[Tensor, "..."], eta: float, bits: int) -> Sulq:
    """SULQ of numbers from low (at least 0) to high, lifted by eta. Raises InputError for NaN, infinity, eta <= 0."""
    shift = torch.full_like(low, eta)
    return Sulq(shift, (low.clamp(min=0) + shift).log2(), (high.clamp(min=0) + shift).log2(), bits)


def ternary(x: Float[Tensor, "..."], keep: Sequence[int] = ()) -> Ternary:
    """Threshold 0.7 mean |x|, scale the mean |x| above it (Li et al. 2016); zeros get scale 1.

    Raises InputError as `extremes`.
    """
    rows, shape = _rows(x, keep)
    sizes = rows.double().abs()
    threshold = 0.7 * sizes.mean(-1, keepdim=True)
    above = sizes > threshold
    scale = (sizes * above).sum(-1) / above.sum(-1).clamp(min=1)
    return Ternary(_positive(scale, x.dtype).view(shape), threshold.to(x.dtype).view(shape))


def lsq_start(x: Float[Tensor, "..."], bits: int, keep: Sequence[int] = ()) -> Uniform:
    """Where learned step size quantization starts: symmetric, scale 2 mean |x| / sqrt(2^(bits - 1) - 1).

    Esser et al. 2020. Zeros get scale 1. Raises InputError as `extremes`.
    """
    rows, shape = _rows(x, keep)
    scale = 2 * rows.double().abs().mean(-1) / (2 ** (bits - 1) - 1) ** 0.5
    return Uniform(_positive(scale, x.dtype).view(shape), None, bits)


def median_scale(scales: Float[Tensor, "..."]) -> Float[Tensor, ""]:
    """The scale among those of the channels with the least mean absolute distance to all: the (lower) median.

    MOSF-style: DopQ-ViT (Yang et al., arXiv:2408.03291) replaces RepQ-ViT's mean by an optimum under mean absolute
    deviation; its formula was not at hand, the median is our own completion. A target of `channel_fold`.
    """
    return scales.flatten().median()


def squared_errors(
    x: Float[Tensor, "..."], candidates: Sequence[Quantizer], weights: Float[Tensor, "..."] | None = None
) -> Float[Tensor, "N ..."]:
    """Sum of (x - x^)^2 per candidate and per element of its parameters, float64 [N, *parameter shape].

    weights: broadcast to x and multiply the squares, such as the diagonal of a Hessian. Sums of batches may be added.
    Raises InputError for NaN, infinity, no data and no candidates.
    """
    _check_data(x)
    _check_candidates(candidates)
    if weights is not None:
        check_finite("weights", weights)
    return torch.stack([_squared_error(x, each, weights) for each in candidates])


def chosen(candidates: Sequence[Chosen], errors: Float[Tensor, "N ..."]) -> Chosen:
    """Per element of the parameters, the candidate of least error; the first of equals.

    Raises InputError for errors that are NaN or infinite, and for candidates of different kinds or widths.
    """
    _check_candidates(candidates)
    check_finite("errors", errors)
    best, least_so_far = candidates[0], errors[0]
    for candidate, error in zip(candidates[1:], errors[1:], strict=True):
        better = error < least_so_far
        best = _where(better, candidate, best)
        least_so_far = torch.where(better, error, least_so_far)
    return best


def least_error(
    x: Float[Tensor, "..."], candidates: Sequence[Chosen], weights: Float[Tensor, "..."] | None = None
) -> Chosen:
    """The candidate of least (weighted) squared error per element of the parameters: `chosen` by `squared_errors`."""
    return chosen(candidates, squared_errors(x, candidates, weights))


def least(candidates: Sequence[Chosen], error: Callable[[Chosen], float]) -> Chosen:
    """The candidate of least error, the first of equals; kinds and widths may differ.

    Raises InputError if there is none or if no error is a number.
    """
    _check_candidates(candidates)
    errors = torch.tensor([error(each) for each in candidates], dtype=torch.float64)
    check_finite("error", errors)
    return candidates[errors.tolist().index(errors.min().item())]


def fpcs(
    scales: Float[Tensor, "n ..."],
    others: Tensor,
    score: Callable[[Float[Tensor, "N ..."], Tensor], Float[Tensor, "N ..."]],
    steps: int = 6,
    beam: int = 16,
    budget: int = 128,
) -> tuple[Float[Tensor, "..."], Tensor]:
    """Fine-grained progressive combining search: the best pair of a scale and another parameter, coarse to fine.

    scales: n at least 2, evenly spaced, [n, *parameter shape]; others: [m, *parameter shape] or [m], such as zero
    points or AdaLog bases. score: errors [N, *parameter shape] of N pairs, per element of the parameters. First all
    n m pairs are scored; in each of the `steps` - 1 rounds that follow, the best `beam` get budget // beam (at least
    2) new scales each, over one spacing around theirs, with the other parameter kept, and the spacing shrinks by
    1 / (budget // beam - 0.5).

    Wu et al., AdaLog, ECCV 2024; GoatWu/AdaLog@75a57d2 quant_layers/linear.py. Deviation: the survivors
    of a round stay candidates with the error they had, so that no round loses the best pair found.
    Raises InputError for fewer than two scales, settings below these, and errors that are NaN or infinite.
    """
    finer = budget // max(beam, 1)
    if len(scales) < 2 or not len(others) or steps < 1 or beam < 1 or finer < 2:
        raise InputError(
            "fpcs: wanted at least 2 scales, 1 other, 1 step, and a budget of at least twice a beam of at least 1, got "
            f"{len(scales)} scales, {len(others)} others, {steps} steps, budget {budget}, beam {beam}"
        )
    shape = scales.shape[1:]
    others = others.view(-1, *(shape if others.ndim > 1 else (1,) * len(shape))).expand(-1, *shape)
    spacing, floor = scales[1] - scales[0], scales.amin(0) / 2
    pair_scales, pair_others = scales.repeat(len(others), *(1,) * len(shape)), others.repeat_interleave(len(scales), 0)
    errors = _scores(score, pair_scales, pair_others)
    for _ in range(steps - 1):
        best = errors.argsort(stable=True, dim=0)[:beam]
        pair_scales, pair_others, errors = (each.gather(0, best) for each in (pair_scales, pair_others, errors))
        moves = torch.linspace(-0.5, 0.5, finer, dtype=scales.dtype, device=scales.device)
        new_scales = pair_scales.unsqueeze(1) + moves.view(-1, *(1,) * len(shape)) * spacing
        new_scales = new_scales.flatten(0, 1).maximum(floor)
        new_others = pair_others.repeat_interleave(finer, 0)
        errors = torch.cat([errors, _scores(score, new_scales, new_others)])
        pair_scales, pair_others = torch.cat([pair_scales, new_scales]), torch.cat([pair_others, new_others])
        spacing = spacing / (finer - 0.5)
    best = errors.argsort(stable=True, dim=0)[:1]
    return pair_scales.gather(0, best)[0], pair_others.gather(0, best)[0]


def _scores(score: Callable[[Tensor, Tensor], Tensor], scales: Tensor, others: Tensor) -> Float[Tensor, "N ..."]:
    errors = score(scales, others)
    check_finite("errors", errors)
    if errors.shape != scales.shape:
        raise InputError(f"score: wanted errors {list(scales.shape)}, as the scales, got {list(errors.shape)}")
    return errors


def _check_data(x: Tensor) -> None:
    if not x.numel():
        raise InputError(f"x: wanted at least one number, got an empty tensor {list(x.shape)}")
    check_finite("x", x)


def _check_candidates(candidates: Sequence[Quantizer]) -> None:
    if not candidates:
        raise InputError("candidates: wanted at least one quantizer, got none")


def _rows(x: Tensor, keep: Sequence[int]) -> tuple[Float[Tensor, "*kept shared"], tuple[int, ...]]:
    """The data with shared dimensions as the last one, and the shape of parameters; data checked."""
    _check_data(x)
    kept = sorted(dim % x.ndim for dim in keep)
    shared = [dim for dim in range(x.ndim) if dim not in kept]
    rows = x.detach().permute(*kept, *shared).reshape(*(x.shape[dim] for dim in kept), -1)
    shape = tuple(x.shape[dim] if dim in kept else 1 for dim in range(x.ndim)) if kept else ()
    return rows, shape


def _quantiles(
    rows: Float[Tensor, "*kept shared"], shares: Sequence[float], of_largest: bool
) -> list[Float[Tensor, "*kept"]]:
    """Quantiles at each share, or at one minus it. torch.quantile sorts everything, and refuses over 2^24 numbers."""
    if not shares or min(shares) < 0 or max(shares) > 1:
        raise InputError(f"shares: wanted shares of the data from 0 to 1, got {list(shares)}")
    last = rows.shape[-1] - 1
    tail = rows.topk(last - int(min(shares) * last) + 1, largest=of_largest).values.double()
    found: list[Tensor] = []
    for share in shares:
        position = share * last
        inner = last - int(position)
        value = torch.lerp(tail[..., inner], tail[..., max(inner - 1, 0)], position - int(position))
        found.append(value.to(rows.dtype))
    return found


def _positive(scale: Float[Tensor, "..."], dtype: torch.dtype) -> Float[Tensor, "..."]:
    """Scales in a dtype, kept above 0: 1 where they are 0, normal numbers elsewhere."""
    return _or_one(scale).to(dtype).clamp(min=torch.finfo(dtype).tiny)


def _or_one(scale: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    return torch.where(scale > 0, scale, 1)


def _squared_error(x: Tensor, candidate: Quantizer, weights: Tensor | None) -> Tensor:
    # In float64: the square of a large outlier overflows float32.
    error = (quantized(candidate, x) - x).double().square_()
    if weights is not None:
        error = error * weights
    return error.sum_to_size(parameter_shape(candidate))


def _where(better: Tensor, candidate: Chosen, other: Chosen) -> Chosen:
    """The candidate's parameters where it is better, the other's elsewhere."""
    changed: dict[str, Tensor] = {}
    for each in fields(candidate):
        new, old = getattr(candidate, each.name), getattr(other, each.name, None)
        if isinstance(new, Tensor) and isinstance(old, Tensor):
            changed[each.name] = torch.where(better, new, old)
        elif new != old or type(candidate) is not type(other):
            raise InputError(
                f"candidates: must be of one kind and width, got {type(candidate).__name__} and "
                f"{type(other).__name__} with {each.name} {new} and {old}; choose with `least`"
            )
    return replace(other, **changed)
