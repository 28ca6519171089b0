"""Relevance of sites from gradients: what all methods share, and those that need nothing but a backward pass.

Gradient times activation: sum over a site of x * df/dx, the first-order change of f if the site were set to zero
(Molchanov et al.: Pruning Convolutional Neural Networks, ICLR 2017). Fisher: sum over a site of the mean over
images of (df/dx)^2, the diagonal of the empirical Fisher matrix, which stands for that of the Hessian (Theis et al.:
Faster gaze prediction with dense networks and Fisher pruning, 2018; BRECQ, Li et al., ICLR 2021).
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from denselab.compress.graph import Axis, Graph, Hook
from denselab.compress.saved_file import check_version, reading
from denselab.compress.sites import ModelHash
from denselab.errors import InputError
from denselab.files import write_json

Batches = Iterable[Float[Tensor, "B 3 H W"]]
"""Calibration images, as the captured model takes them; every loop over them starts anew."""

Start = Callable[[Any], Float[Tensor, "..."]]
"""From what a model returns to the number that is asked about: of every image [B], or of all [] (see `start`)."""


@dataclass(frozen=True)
class Score:
    """What a site counts for one image, in the mean over images.

    magnitude: sum over its elements without signs. signed: with them. variance: of the magnitude across images.
    """

    magnitude: float
    signed: float
    variance: float


Relevance = Callable[[Graph, Batches, Start], dict[str, Score]]
"""A method: the score of every site by its key. Raises InputError for no images, and naming the site of a NaN."""


@dataclass(frozen=True, eq=False)
class SiteGradient:
    """The tensor of a site, and the gradient of the start with respect to it as its operation reads it."""

    value: Tensor
    gradient: Tensor


def gradient_times_activation(graph: Graph, batches: Batches, start: Start) -> dict[str, Score]:
    """x * df/dx, summed over each site. A `Relevance`; it takes one pass forward and back per image."""
    return _summed(graph, batches, start, lambda site: site.value * site.gradient)


def fisher(graph: Graph, batches: Batches, start: Start) -> dict[str, Score]:
    """(df/dx)^2, summed over each site. A `Relevance` whose start is a loss, such as `start.log_likelihood`."""
    return _summed(graph, batches, start, lambda site: site.gradient.square())


def fisher_diagonal(graph: Graph, batches: Batches, start: Start, keys: Sequence[str]) -> dict[str, Tensor]:
    """The mean over images of (df/dx)^2 for every element of some sites, in the shape of one image's site.

    For errors that are weighted by a Hessian (`ranges.squared_errors`). Raises InputError as a `Relevance`, and for
    unknown keys.
    """
    means = RunningMeans()
    for pixels in single_images(graph, batches):
        means.add({key: site.gradient.square() for key, site in site_gradients(graph, pixels, start, keys).items()})
    return means.compute()


def pixel_relevance(
    run: Callable[[Tensor], Any], pixels: Float[Tensor, "B 3 H W"], start: Start, blank: Tensor | float = 0.0
) -> Float[Tensor, "B H W"]:
    """(x - blank) * df/dx of the image itself, summed over its channels: which pixels made the model say so.

    run: a model, or `Graph.run`; of a graph with the rules of relevance propagation (`lrp.lrp_graph`) it is their heat
    map. blank: the colour that
    says nothing, broadcast to the image: the mean of a model that normalises images itself (`Trunk.mean`), which then
    sees zeros there; 0 for one that takes normalised images.
    Raises InputError where it is NaN or infinite.
    """
    with torch.enable_grad():
        image = pixels.detach().requires_grad_()
        begin = _begun(start, run(image))
        (gradient,) = torch.autograd.grad(begin, [image], allow_unused=True, materialize_grads=True)
    relevance = ((pixels - blank) * gradient).sum(dim=1)
    if not relevance.isfinite().all():
        raise InputError("relevance: wanted finite numbers, got NaN or infinity at the pixels; is the image finite?")
    return relevance


def single_images(graph: Graph, batches: Batches) -> Iterator[Tensor]:
    """The images one by one, or as many at once as a graph that is tied to a number of them was captured with.

    Raises InputError if there are none.
    """
    at_once = 1 if Axis.BATCH in graph.free else graph.example_shapes[0][0]
    found = False
    for batch in batches:
        for pixels in batch.split(at_once):
            found = True
            yield pixels
    if not found:
        raise InputError("images: wanted at least one to measure relevance with, got none")


def site_gradients(
    graph: Graph, pixels: Float[Tensor, "B 3 H W"], start: Start, keys: Sequence[str]
) -> dict[str, SiteGradient]:
    """Values and gradients at some sites. A site that does not reach the start has gradient zero.

    Raises InputError for unknown keys, a start that no gradient reaches, and NaN or infinity, naming the site where it
    came up: the first of the values, the last of the gradients.
    """
    seen: dict[str, Tensor] = {}

    def watching(key: str) -> Hook:
        def hook(x: Tensor) -> Tensor:
            _check_finite(key, "value", x)
            # A view of its own: the same tensor may be read by others too.
            seen[key] = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
            return seen[key]

        return hook

    with torch.enable_grad():
        output = graph.run(pixels.detach().requires_grad_(), hooks={key: watching(key) for key in keys})
        begin = _begun(start, output)
        gradients = torch.autograd.grad(begin, list(seen.values()), allow_unused=True, materialize_grads=True)
    found = dict(zip(seen, gradients, strict=True))
    for key, gradient in reversed(found.items()):
        _check_finite(key, "gradient", gradient)
    return {key: SiteGradient(seen[key].detach(), found[key]) for key in keys}


class RunningMeans:
    """The mean over images of tensors by key, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Count one image."""
        self.count += 1
        for key, value in values.items():
            self.sums[key] = self.sums[key] + value.double() if key in self.sums else value.double()

    def compute(self) -> dict[str, Tensor]:
        """The means of everything counted so far, float32."""
        return {key: (total / self.count).float() for key, total in self.sums.items()}


def scores_of(magnitudes: Mapping[str, Sequence[float]], signed: Mapping[str, Sequence[float]]) -> dict[str, Score]:
    """Means and variance over images, of which each gave one number per site. Raises InputError for NaN, infinity."""
    scores: dict[str, Score] = {}
    for key, values in magnitudes.items():
        mean = math.fsum(values) / len(values)
        variance = math.fsum((value - mean) ** 2 for value in values) / len(values)
        if not math.isfinite(variance):
            raise InputError(f"relevance: wanted finite numbers, got NaN or infinity at the site {key!r}")
        scores[key] = Score(mean, math.fsum(signed[key]) / len(values), variance)
    return scores


def _summed(
    graph: Graph, batches: Batches, start: Start, measure: Callable[[SiteGradient], Tensor]
) -> dict[str, Score]:
    keys = [site.key for site in graph.sites]
    magnitudes, signed = ({key: list[float]() for key in keys} for _ in range(2))
    for pixels in single_images(graph, batches):
        for key, site in site_gradients(graph, pixels, start, keys).items():
            measured = measure(site).double() / len(pixels)
            magnitudes[key].append(measured.abs().sum().item())
            signed[key].append(measured.sum().item())
    return scores_of(magnitudes, signed)


def _begun(start: Start, output: Any) -> Float[Tensor, ""]:
    begin = start(output).sum()
    if not begin.requires_grad:
        raise InputError("start: wanted a number that depends on the output of the model, got a constant")
    return begin


def _check_finite(key: str, what: str, x: Tensor) -> None:
    if not x.detach().isfinite().all():
        bad = int((~x.detach().isfinite()).sum())
        raise InputError(
            f"relevance: wanted finite numbers, got NaN or infinity in {bad} of {x.numel()} of the {what} at the site "
            f"{key!r}; are the images finite?"
        )


RELEVANCE_FORMAT = 1


@dataclass(frozen=True)
class SavedRelevance:
    """`relevance.json`: scores by site, the method that found them and the number of images it took."""

    model: ModelHash
    method: str
    images: int
    scores: Mapping[str, Score]

    def write(self, path: Path) -> None:
        """As readable JSON, atomically."""
        data = {
            "format_version": RELEVANCE_FORMAT,
            "model": vars(self.model),
            "method": self.method,
            "images": self.images,
            "scores": {key: vars(score) for key, score in self.scores.items()},
        }
        write_json(path, data)

    @classmethod
    def read(cls, path: Path, graph: Graph) -> "SavedRelevance":
        """Raises InputError, naming the file: missing, damaged, a newer format, made for another model."""
        with reading(path, "relevance by site", "measure it again"):
            data = json.loads(path.read_bytes())
            check_version(path, data["format_version"], RELEVANCE_FORMAT)
            scores = {key: _score(entry) for key, entry in data["scores"].items()}
            saved = cls(ModelHash(**data["model"]), str(data["method"]), int(data["images"]), scores)
        graph.model.check_same(saved.model, path)
        if set(scores) - set(graph.found.by_key):
            unknown = min(set(scores) - set(graph.found.by_key))
            raise InputError(f"{path}: wanted sites of this model, got {unknown!r}; measure it again")
        return saved


def _score(entry: Mapping[str, Any]) -> Score:
    score = Score(**{name: float(value) for name, value in entry.items()})
    if not all(map(math.isfinite, vars(score).values())):
        raise ValueError("a score is not finite")
    return score
