"""What calibration images show at every site: extremes, and a sample of the values, in one pass.

Extremes are exact, per tensor and per channel or head (`plan.finest`). Searches over ranges (`ranges`) need the values
too; of those a site keeps a sample that is as small for large images and many of them as for few: rows, which are all
channels at one place of one image, drawn evenly from all rows of all images (a reservoir: every row gets a random
number, and the rows with the largest are kept). A sample has `SAMPLED` numbers, but at least `FEWEST_ROWS` rows: 1 MiB
per site of at most 512 channels, 6 MiB at 3072.

A tensor that several operations read is observed once.
"""

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from denselab.compress.edit import float_dtype
from denselab.compress.graph import Axis, Graph
from denselab.compress.plan import finest, kept_axes
from denselab.compress.sites import ModelHash, QuantSite
from denselab.compress.tensor_file import read_tensors, write_tensors
from denselab.errors import InputError

STATS_FORMAT = 1
SAMPLED = 2**18
FEWEST_ROWS = 512
FEWEST_IMAGES = 8

_TENSORS = ("low", "high", "rows")


@dataclass(frozen=True, eq=False)
class SiteStats:
    """What was seen at a site.

    axis: the dimension of its tensor that keeps statistics of its own (channels, heads), None if there is none.
    dimensions: of its tensor. low, high: extremes, [K] or []. rows: the sample, [rows, K] or [rows]. seen: rows in all.
    """

    axis: int | None
    dimensions: int
    low: Float[Tensor, "*K"]
    high: Float[Tensor, "*K"]
    rows: Float[Tensor, "rows *K"]
    seen: int

    def extremes(self, keep: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """Least and greatest number, shaped as those of `ranges.extremes` are for the whole tensor."""
        if not keep:
            return self.low.amin(), self.high.amax()
        assert tuple(keep) == (self.axis,)
        shape = [-1 if dim == self.axis else 1 for dim in range(self.dimensions)]
        return self.low.view(shape), self.high.view(shape)

    def values(self) -> Tensor:
        """The sample with the dimensions of the site's tensor, for searches that keep its axis."""
        if self.axis is None:
            return self.rows
        across = 0 if self.axis else 1
        shape = [1] * self.dimensions
        shape[across], shape[self.axis] = self.rows.shape
        return (self.rows if across < self.axis else self.rows.t()).reshape(shape)


@dataclass(frozen=True)
class Stats:
    """What was seen at every site that is computed from the image, by its key. model: of which. images: how many."""

    model: ModelHash
    images: int
    sites: Mapping[str, SiteStats]

    def write(self, path: Path) -> None:
        """As safetensors, atomically; what sites share is stored once."""
        tensors: dict[str, Tensor] = {}
        entries: dict[str, dict[str, int | str | None]] = {}
        stored: dict[int, str] = {}
        for key, stats in self.sites.items():
            first = stored.setdefault(id(stats), key)
            if first != key:
                entries[key] = {"same_as": first}
                continue
            entries[key] = {"axis": stats.axis, "dimensions": stats.dimensions, "seen": stats.seen}
            tensors.update({f"{key}:{name}": getattr(stats, name) for name in _TENSORS})
        write_tensors(path, tensors, {"images": self.images, "sites": entries}, self.model, STATS_FORMAT)

    @classmethod
    def read(cls, path: Path, model: ModelHash) -> "Stats":
        """The statistics of a model. Raises InputError, naming the file: missing, damaged, newer, of another model."""

        def built(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Stats:
            sites: dict[str, SiteStats] = {}
            for key, entry in about["sites"].items():
                if "same_as" in entry:
                    sites[key] = sites[entry["same_as"]]
                else:
                    sites[key] = SiteStats(
                        entry["axis"],
                        entry["dimensions"],
                        *(tensors[f"{key}:{name}"] for name in _TENSORS),
                        seen=entry["seen"],
                    )
            return Stats(model, about["images"], sites)

        return read_tensors(path, model, STATS_FORMAT, built, "statistics of a model")


def observe(
    graph: Graph,
    batches: Iterable[Float[Tensor, "B 3 H W"]],
    fewest_images: int = FEWEST_IMAGES,
    sampled: int = SAMPLED,
    seed: int = 0,
) -> Stats:
    """Statistics of every site from one pass over calibration images, as the captured model takes them.

    fewest_images: how many are asked for. sampled: numbers that are kept per site. seed: of the sample.
    Raises InputError: no images or too few, a size that the graph is not free for, NaN or infinity (site and batch
    named), and a site of which not all images have the same number of channels.
    """
    watched: dict[tuple[str, int | None], _Watched] = {}
    seen_by: dict[str, _Watched] = {}
    for site in graph.sites:
        if not site.is_weight:
            axis = next(iter(kept_axes(site, finest(site))), None)
            seen_by[site.key] = watched.setdefault((site.tensor, axis), _Watched(site, axis, sampled, seed))
    at_once = None if Axis.BATCH in graph.free else graph.example_shapes[0][0]
    images = 0
    with torch.no_grad():
        for number, batch in enumerate(batches):
            for part in batch.split(at_once or max(len(batch), 1)):
                graph.run(part, hooks={each.key: partial(each.see, number) for each in watched.values()})
            images += len(batch)
    if images < max(fewest_images, 1):
        got = images or "none"
        raise InputError(f"images: wanted at least {max(fewest_images, 1)} to calibrate with, got {got}; add images")
    found = {each.key: each.compute() for each in watched.values()}
    return Stats(graph.model, images, {key: found[each.key] for key, each in seen_by.items()})


def weights(graph: Graph) -> dict[str, Tensor]:
    """The tensors of the weight sites by key, as their operations read them.

    Raises InputError for NaN and infinity, naming the site.
    """
    found: dict[str, Tensor] = {}

    def keep(key: str, x: Tensor) -> Tensor:
        if not x.isfinite().all():
            raise InputError(f"{key}: wanted finite weights, got NaN or infinity; take an earlier checkpoint")
        found[key] = x
        return x

    hooks = {site.key: partial(keep, site.key) for site in graph.sites if site.is_weight}
    with torch.no_grad():
        graph.run(*(torch.zeros(shape, dtype=float_dtype(graph)) for shape in graph.example_shapes), hooks=hooks)
    return found


class _Watched:
    """Running statistics of one site."""

    def __init__(self, site: QuantSite, axis: int | None, sampled: int, seed: int) -> None:
        self.key = site.key
        self.axis = axis
        self.dimensions = len(site.shape)
        self.sampled = sampled
        self.generator = torch.Generator().manual_seed(zlib.crc32(site.key.encode(), seed))
        self.extremes: tuple[Tensor, Tensor] | None = None
        self.numbers = torch.empty(0)
        self.rows: Tensor | None = None
        self.seen = 0

    def see(self, batch: int, x: Tensor) -> Tensor:
        if not x.isfinite().all():
            raise InputError(
                f"{self.key}: wanted finite numbers, got NaN or infinity for the calibration images of batch {batch} "
                "(counted from 0); are the images finite?"
            )
        rows = x.flatten() if self.axis is None else x.movedim(self.axis, -1)
        self._see_extremes(rows if self.axis is not None else rows.unsqueeze(-1))
        self._sample(rows)
        return x

    def compute(self) -> SiteStats:
        assert self.extremes is not None
        assert self.rows is not None
        low, high = (each if self.axis is not None else each.squeeze(0) for each in self.extremes)
        return SiteStats(self.axis, self.dimensions, low.cpu(), high.cpu(), self.rows.cpu(), self.seen)

    def _see_extremes(self, rows: Float[Tensor, "... K"]) -> None:
        dims = tuple(range(rows.ndim - 1))
        low, high = rows.amin(dims), rows.amax(dims)
        if self.extremes is not None:
            if low.shape != self.extremes[0].shape:
                raise InputError(
                    f"{self.key}: wanted {len(self.extremes[0])} channels for every image, got {len(low)}; calibrate "
                    "with images of one size"
                )
            low, high = torch.minimum(low, self.extremes[0]), torch.maximum(high, self.extremes[1])
        self.extremes = low, high

    def _sample(self, rows: Float[Tensor, "... K"] | Float[Tensor, "rows"]) -> None:
        places = rows.shape if self.axis is None else rows.shape[:-1]
        width = 1 if self.axis is None else rows.shape[-1]
        most = max(self.sampled // width, FEWEST_ROWS)
        numbers = torch.rand(math.prod(places), generator=self.generator)
        new = numbers.topk(min(most, len(numbers)), sorted=False).indices
        drawn = rows[torch.unravel_index(new.to(rows.device), places)]
        numbers = torch.cat([self.numbers, numbers[new]])
        drawn = drawn.clone() if self.rows is None else torch.cat([self.rows, drawn])
        best = numbers.topk(min(most, len(numbers)), sorted=False).indices
        self.numbers, self.rows = numbers[best], drawn[best.to(drawn.device)]
        self.seen += math.prod(places)
