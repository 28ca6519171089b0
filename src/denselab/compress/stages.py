"""The stages of a compression up to the plan: what the network is, what it shows, what counts, what bits lose."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from denselab.compress.bit_losses import Importance, Measured
from denselab.compress.budgets import Budget, limits_activations
from denselab.compress.job import Job
from denselab.compress.measure_losses import measure
from denselab.compress.methods.all import measuring
from denselab.compress.names import MethodName
from denselab.compress.observing import Stats, observe
from denselab.compress.options import BY_LRP
from denselab.compress.relevance.scores import SavedRelevance, gradient_times_activation
from denselab.compress.sites import SiteList
from denselab.compress.small_file import float_file
from denselab.compress.within_budget import candidates, only_8
from denselab.files import atomic_path

_PAIRS = 6
_ACTIVATION_BITS = 8
"""Where the budget does not count them."""


def sites(job: Job) -> SiteList:
    """Where the network can be quantized."""
    return job.work.stage("sites.json", {}, job.graph.site_list, SiteList.write, SiteList.read)


def observed(job: Job) -> Stats:
    """What the calibration photos show at every site."""
    return job.work.stage(
        "stats.safetensors",
        {**job.made_with, "seed": job.options.seed},
        lambda: observe(job.graph, job.track(job.batches, len(job.batches), "observing"), seed=job.options.seed),
        Stats.write,
        lambda path: Stats.read(path, job.graph.model),
    )


def relevance(job: Job) -> SavedRelevance:
    """How much every site counts. Relevance propagation runs only for who asks for it: it is patented for some uses."""
    method = "lrp" if job.importance in BY_LRP else "gradient x activation"

    def make() -> SavedRelevance:
        pixels = job.pixels(job.measured_images)
        shown = _Again(lambda: job.track(pixels, len(pixels), f"relevance by {method}"))
        if job.importance in BY_LRP:
            from denselab.compress.relevance.lrp import lrp

            scores = lrp(job.graph, shown, job.subject.start)
        else:
            scores = gradient_times_activation(job.graph, shown, job.subject.start)
        return SavedRelevance(job.graph.model, method, len(pixels), scores)

    return job.work.stage(
        "relevance.json",
        {**job.made_with, "relevance": method, "images": job.measured_images},
        make,
        SavedRelevance.write,
        lambda path: SavedRelevance.read(path, job.graph),
    )


def float_network(job: Job) -> Path:
    """The file of the same network in float32, to compare with."""
    file = job.work.folder / "float.onnx"

    def make() -> None:
        job.say("writing the float network, to compare with")
        model = float_file(job.subject, job.pixels(1)[0], job.network_hw)
        with atomic_path(file) as partial:
            partial.write_bytes(model.SerializeToString())

    job.work.stage("float.onnx", {"network_size": job.network_hw}, make, None, lambda path: None)
    return file


def decides(job: Job, budget: Budget) -> Importance:
    """What decides where bits go. Where there is nothing to choose, errors at 8 bits are enough."""
    return Importance.UNIFORM if only_8(budget) and job.options.importance is None else job.importance


def losses(job: Job, stats: Stats, scores: SavedRelevance, budget: Budget) -> Measured:
    """What bits lose at every site, so far as the budget gives them out."""
    importance, method = decides(job, budget), measuring(job.method)
    pairs = _PAIRS if job.name is MethodName.MIX_QVIT and not only_8(budget) else 0
    limited = limits_activations(budget)
    widths = sorted({width for pair in candidates(budget) for width in (pair if limited else pair[:1])})
    activation_bits = None if limited else _ACTIVATION_BITS
    by_lrp = importance in BY_LRP
    made_with = {
        **job.made_with,
        "activation_bits": activation_bits,
        "importance": importance.value,
        "method": method.name,
        "kept": sorted(each.value for each in job.options.kept),
        "widths": widths,
        "pairs": pairs,
        "images": job.measured_images,
        "relevance": job.work.sha256("relevance.json") if by_lrp else None,
    }
    return job.work.stage(
        "sensitivity.json",
        made_with,
        lambda: measure(
            job.graph,
            stats,
            method,
            job.calibration,
            {importance},
            widths,
            kept=job.options.kept,
            start=job.subject.likelihood if importance is Importance.FISHER else job.subject.start,
            relevance=scores.scores if by_lrp else None,
            most_pairs_of=pairs,
            images=job.measured_images,
            activation_bits=activation_bits,
        ),
        Measured.write,
        lambda path: Measured.read(path, job.graph),
    )


class _Again:
    """Batches whose every loop is shown."""

    def __init__(self, loop: Callable[[], Any]) -> None:
        self._loop = loop

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._loop())
