"""What a method is: how it treats each kind of site, and how it fits a plan to a network."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from denselab.compress.graph import Graph
from denselab.compress.observing import Stats, weights
from denselab.compress.plan import QuantPlan, QuantSpec, kept_axes
from denselab.compress.quantizers import Quantizer
from denselab.compress.ranges import extremes
from denselab.compress.relevance.scores import Batches
from denselab.compress.relevance.sensitivity import Change, squared_change
from denselab.compress.simulate import QuantizedGraph
from denselab.compress.sites import QuantSite
from denselab.errors import InputError


def _silent(text: str) -> None:
    pass


@dataclass(frozen=True)
class Calibration:
    """What a method may look at beside the statistics.

    batches: the images that were observed, as the captured model takes them; every loop over them starts anew.
    change: how far an answer is from the float model's, and what a method that optimises makes small. seed: of all that
    is drawn at random. say: is told how far the work is.
    """

    batches: Batches
    change: Change = squared_change
    seed: int = 0
    say: Callable[[str], None] = _silent


@dataclass(frozen=True, eq=False)
class Seen:
    """What a quantizer is fitted to: a weight, or what was observed of an activation.

    values: the weight, or a sample, with the dimensions of the site. low, high: extremes of all. keep: the dimensions
    that keep parameters of their own (see `ranges`).
    """

    values: Float[Tensor, "..."]
    low: Float[Tensor, "..."]
    high: Float[Tensor, "..."]
    keep: tuple[int, ...]


Fit = Callable[[QuantSite, QuantSpec, Seen], Quantizer]
"""The quantizer of a site from what was seen there."""


@dataclass(frozen=True)
class Method:
    """A published way to quantize a trained network.

    name: as in plans and on the command line. spec: what it does with a site at so many bits. quantize: folds and fits
    what a plan says.
    """

    name: str
    spec: Callable[[QuantSite, int], QuantSpec]
    quantize: Callable[[Graph, Stats, QuantPlan, Calibration], QuantizedGraph]


def fitted(graph: Graph, stats: Stats, plan: QuantPlan, fit: Fit) -> dict[str, Quantizer]:
    """A quantizer for every site of a plan, each fitted by itself.

    Raises InputError for a plan or statistics of another model, NaN in weights, and what `fit` raises, naming the site.
    """
    plan.check(graph.site_list())
    graph.model.check_same(stats.model, "stats")
    sites, stored = graph.found.by_key, weights(graph)
    found: dict[str, Quantizer] = {}
    for key, spec in plan.specs.items():
        site = sites[key]
        keep = kept_axes(site, spec.granularity)
        try:
            found[key] = fit(site, spec, _seen(site, keep, stats, stored))
        except InputError as error:
            raise InputError(f"{key}: {error}") from error
    return found


def closest(graph: Graph, candidates: Sequence[QuantizedGraph], images: Batches, change: Change) -> QuantizedGraph:
    """The one whose answers to images are nearest those of a float graph; the first of equals."""
    if len(candidates) == 1:
        return candidates[0]
    means = mean_changes(graph, candidates, images, change)
    return candidates[int(means.nan_to_num(nan=torch.inf).argmin())]


def mean_changes(
    graph: Graph, candidates: Sequence[QuantizedGraph], images: Batches, change: Change
) -> Float[Tensor, "candidates"]:
    """How far the answers of each to images are from those of a float graph."""
    changes: list[list[Tensor]] = [[] for _ in candidates]
    with torch.no_grad():
        for pixels in images:
            wanted = graph.run(pixels)
            for found, each in zip(changes, candidates, strict=True):
                found.append(change(each.run(pixels), wanted))
    return torch.stack([torch.cat(found).mean() for found in changes])


def unfit(method: str, spec: QuantSpec) -> InputError:
    """What a method raises for a grid that it has no way to fit."""
    return InputError(
        f"grid: {method} cannot fit {spec.grid.value}; wanted another grid in the plan, or another method"
    )


def _seen(site: QuantSite, keep: tuple[int, ...], stats: Stats, stored: Mapping[str, Tensor]) -> Seen:
    if site.is_weight:
        weight = stored[site.key].detach()
        return Seen(weight, *extremes(weight, keep), keep)
    observed = stats.sites[site.key]
    return Seen(observed.values(), *observed.extremes(keep), keep)
