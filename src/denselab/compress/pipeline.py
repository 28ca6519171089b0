"""The way of `denselab compress`: from a network and photos to a small file that was measured, in saved stages.

    sites.json           where the network can be quantized
    stats.safetensors    what the calibration photos show there
    relevance.json       how much every site counts
    float.onnx           the same network in float32, to compare with
    sensitivity.json     what bits lose at every site, so far as the budget gives them out
    plan.json            bits and grids; made to be read, edited and compared
    trained.safetensors  what training changed, where it was asked for
    model.onnx           the small file
    layers.json          how far every layer is off
    receipt.json         what was measured of the small file

A stage that was made with the same is not made again (see `work_folder`).
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from denselab.compress import file_stages, stages
from denselab.compress.bit_losses import Measured
from denselab.compress.budgets import Budget, parse_budget
from denselab.compress.fold_norms import fold_norms
from denselab.compress.graph import Axis, Graph, capture
from denselab.compress.job import Job
from denselab.compress.layer_table import Layer
from denselab.compress.methods.all import method_named
from denselab.compress.names import MethodName
from denselab.compress.observing import FEWEST_IMAGES
from denselab.compress.options import Options
from denselab.compress.photos import read_some
from denselab.compress.plan import QuantPlan
from denselab.compress.plan_stage import chosen_plan, given_plan
from denselab.compress.receipt import Receipt
from denselab.compress.scoring import Track, open_data
from denselab.compress.subject import Classifier, Dense, Subject
from denselab.compress.within_budget import CurvePoint, check_met, curve, only_8, plan_point
from denselab.compress.work_folder import WorkFolder
from denselab.errors import InputError
from denselab.files import atomic_path


@dataclass(frozen=True)
class Outcome:
    """All that a report shows. chosen: where the plan lies on the curve, by bytes of parameters."""

    subject: str
    receipt: Receipt
    layers: tuple[Layer, ...]
    relevance_method: str
    importance: str
    curve: tuple[CurvePoint, ...]
    chosen: CurvePoint | None
    work: Path
    out: Path


def compress(subject: Subject, options: Options, say: Callable[[str], None], track: Track) -> Outcome:
    """Make `options.out`, and everything on the way to it in the work folder.

    say: is told what happens. track: shows how far a loop is.
    Raises InputError: a target that exists, no photos, a model that cannot be captured or has nothing to quantize, a
    budget that cannot be met (naming the nearest that can), a plan or a work folder of another model, engines that
    disagree with the simulation.
    """
    job = _opened(subject, options, say, track)
    stages.sites(job)
    stats = stages.observed(job)
    scores = stages.relevance(job)
    float_path = stages.float_network(job)
    budget = None if options.budget is None else parse_budget(options.budget, float_path.stat().st_size)
    plan = measured = known = None
    layers: tuple[Layer, ...] = ()
    if job.name is MethodName.I_VIT:
        file_stages.integer_program(job, stats)
    else:
        if budget is None:
            plan = given_plan(job)
        else:
            measured = stages.losses(job, stats, scores, budget)
            plan = chosen_plan(job, stats, measured, budget)
        network = cache(partial(file_stages.quantized_network, job, stats, plan))
        known = file_stages.small_network(job, network)
        layers = file_stages.layers(job, plan, scores, measured, budget, network)
    receipt = file_stages.receipt(job, plan, known)
    if budget is not None:
        check_met(budget, receipt)
    with atomic_path(options.out) as unfinished:
        shutil.copyfile(job.work.folder / file_stages.MODEL, unfinished)
    points, chosen, importance = _expected(job, budget, measured, plan)
    of = job.work.folder
    return Outcome(subject.name, receipt, layers, scores.method, importance, points, chosen, of, options.out)


def _opened(subject: Subject, options: Options, say: Callable[[str], None], track: Track) -> Job:
    """Everything that a compression starts from, captured and checked."""
    options.check()
    if options.method is MethodName.I_VIT and not isinstance(subject.kind, Classifier):
        raise InputError("--method i-vit: wanted a classifier, got a dense model; choose another method")
    data = None if options.data is None else open_data(subject, options.data)
    photos = read_some(
        options.calibrate, options.images, say, lambda found: track(found, options.images, "reading photos")
    )
    if len(photos) < FEWEST_IMAGES:
        raise InputError(f"--calibrate: wanted at least {FEWEST_IMAGES} photos, got {len(photos)}; add some")
    seen = tuple(subject.seen(photo) for photo in photos)
    del photos
    say("tracing the model")
    graph = fold_norms(capture(subject.network, subject.pixels(seen[0][None]), free=subject.free))
    if not graph.sites:
        raise InputError(
            f"{subject.name}: wanted a network with linear layers, convolutions or products of matrices, got one "
            "without; there is nothing to quantize, take another"
        )
    network_hw = _fixed_size(subject, graph)
    seen = tuple(_resized(photo, network_hw) for photo in seen)
    given = None if options.plan is None else QuantPlan.read(options.plan, graph.site_list())
    name = options.method or MethodName.AUTO
    if given is not None:
        name = MethodName(method_named(given.method).name)
    if given is not None and options.method not in (None, given.method):
        raise InputError(
            f"--method: wanted {given.method}, which {options.plan} was made for, got {options.method}; "
            "drop --method or mend the plan"
        )
    work = WorkFolder(options.work_folder, graph.model, say)
    return Job(subject, options, graph, network_hw, seen, data, work, say, track, name, given)


def _fixed_size(subject: Subject, graph: Graph) -> tuple[int, int] | None:
    """The size that the file runs at inside, None for any, or where photos come in one size."""
    if not isinstance(subject.kind, Dense):
        return None
    if {Axis.HEIGHT, Axis.WIDTH} <= graph.free and subject.kind.loaded.network_hw is None:
        return None
    height, width = graph.example_shapes[0][2:]
    return height, width


def _resized(photo: Tensor, hw: tuple[int, int] | None) -> Tensor:
    if hw is None or tuple(photo.shape[1:]) == hw:
        return photo
    return F.interpolate(photo[None].float(), size=hw, mode="bilinear", antialias=True)[0].round().byte()


def _expected(
    job: Job, budget: Budget | None, measured: Measured | None, plan: QuantPlan | None
) -> tuple[tuple[CurvePoint, ...], CurvePoint | None, str]:
    """What budgets would be expected to lose, where the plan lies among them, and by what that was decided."""
    if budget is None or measured is None or plan is None:
        return (), None, "what was given"
    importance = stages.decides(job, budget)
    points = () if only_8(budget) else curve(job.graph, measured, importance, job.options.seed)
    return points, plan_point(job.graph, measured, importance, plan), importance.value
