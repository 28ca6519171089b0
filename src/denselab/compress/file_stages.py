"""The stages of a compression after the plan: the quantized network, its file, its table of layers, its receipt."""

import json
from collections.abc import Callable
from pathlib import Path

import torch

from denselab.compress.bit_losses import Measured
from denselab.compress.budgets import Budget
from denselab.compress.job import Job
from denselab.compress.layer_table import Layer, layer_table, read_layers, site_errors, sites_in_float, write_layers
from denselab.compress.methods.i_vit import I_VIT
from denselab.compress.methods.method import closest, mean_changes
from denselab.compress.observing import Stats
from denselab.compress.plan import QuantPlan
from denselab.compress.qat import Training, distilled, read_trained, write_trained
from denselab.compress.receipt import Receipt, Score, both_times_ms
from denselab.compress.relevance.scores import SavedRelevance
from denselab.compress.round_sums import round_sums
from denselab.compress.saved_file import reading
from denselab.compress.scoring import Data, same_answers, score
from denselab.compress.simulate import QuantizedGraph
from denselab.compress.small_file import (
    Compared,
    compared,
    compression_in,
    float_session,
    integer_share,
    same_as_simulation,
    small_model,
    write_integers,
    write_small,
)
from denselab.compress.stages import decides
from denselab.export.parity import open_engines
from denselab.files import write_json
from denselab.runtime.session import Session

MODEL = "model.onnx"

_LAYER_PHOTOS = 8
_JUDGING_PHOTOS = 8
_MOST_CHANGE = 1.5
_OF_INTEGERS = ("the operands of all products, with 16 between them",)

Network = Callable[[], QuantizedGraph]
"""Gives the quantized network, which is made where a stage needs it."""


def quantized_network(job: Job, stats: Stats, plan: QuantPlan) -> QuantizedGraph:
    """The network as the plan says, by its method; trained, where that was asked for and answers the photos better."""
    job.say(f"quantizing by {job.method.name}")
    start = job.quantized(job.method, stats, plan)
    if not job.options.train_steps:
        return start

    def trained() -> QuantizedGraph:
        done = distilled(start, job.graph, job.calibration, Training(job.options.train_steps))
        return closest(job.graph, [start, done], job.batches, job.subject.change)

    return job.work.stage(
        "trained.safetensors",
        _of_plan(job),
        trained,
        lambda network, path: write_trained(network, start, path),
        lambda path: read_trained(path, start),
    )


def small_network(job: Job, network: Network) -> Compared | None:
    """The small file, and what it was compared on, if that was now."""

    def make() -> Compared | None:
        quantized = _with_rounded_sums(job, network())
        job.say("writing the small file")
        return write_small(
            job.subject,
            quantized,
            small_model(job.subject, quantized, job.network_hw, job.traces),
            (job.work.folder / "plan.json").read_bytes(),
            job.network_hw,
            job.examples,
            job.work.folder / MODEL,
            job.options.min_agreement,
            job.say,
        )

    return job.work.stage(MODEL, _of_plan(job), make, None, lambda path: None)


def _with_rounded_sums(job: Job, quantized: QuantizedGraph) -> QuantizedGraph:
    """Rounding is for speed: not where it moves answers."""
    rounded = round_sums(quantized, job.batches)
    if rounded is quantized:
        return quantized
    before, after = mean_changes(
        job.graph, [quantized, rounded], job.pixels(_JUDGING_PHOTOS), job.subject.change
    ).tolist()
    if after <= _MOST_CHANGE * before:
        return rounded
    job.say(f"sums stay in float: rounded, answers would be {after / before:.1f} times as far from the float network's")
    return quantized


def integer_program(job: Job, stats: Stats) -> None:
    """The file of I-ViT. It has no plan: its bits are fixed, and its file is the program."""

    def make() -> None:
        job.say("building the program of integers")
        program = I_VIT.quantize(job.graph, stats, job.calibration)
        write_integers(job.subject, program, job.examples, job.work.folder / MODEL, job.say)

    job.work.stage(MODEL, {**job.made_with, "method": job.name}, make, None, lambda path: None)


def layers(
    job: Job,
    plan: QuantPlan,
    scores: SavedRelevance,
    measured: Measured | None,
    budget: Budget | None,
    network: Network,
) -> tuple[Layer, ...]:
    """The table of layers, with how far every one is off."""

    def make() -> tuple[Layer, ...]:
        errors = site_errors(network(), job.pixels(_LAYER_PHOTOS))
        importance = job.importance if budget is None else decides(job, budget)
        return layer_table(job.graph, plan, scores, errors, measured, importance)

    return job.work.stage("layers.json", _of_plan(job), make, write_layers, read_layers)


def receipt(job: Job, plan: QuantPlan | None, known: Compared | None) -> Receipt:
    """What is measured of the small file, beside the float one. plan: None for a program of integers."""
    data = job.data
    made_with = {
        "model": job.work.sha256(MODEL),
        "float": job.work.sha256("float.onnx"),
        "data": None if data is None else [str(data.source), data.split, data.images],
    }

    def read(path: Path) -> Receipt:
        with reading(path, "a receipt", "delete it"):
            return Receipt.from_dict(json.loads(path.read_bytes()))

    return job.work.stage(
        "receipt.json",
        made_with,
        lambda: _receipt(job, plan, known),
        lambda made, path: write_json(path, made.to_dict()),
        read,
    )


def _receipt(job: Job, plan: QuantPlan | None, known: Compared | None) -> Receipt:
    subject, options = job.subject, job.options
    path, float_path = job.work.folder / MODEL, job.work.folder / "float.onnx"
    small = known or compared(path, subject, job.examples)
    eager, first = float_session(subject, job.network_hw), next(iter(small.engines.values()))
    same = same_answers(subject, eager, small.answers, job.examples.images)
    scores = None if job.data is None else _scores(job, eager, first, job.data)
    job.say("timing the engines in turns")
    photo, threads = job.examples.images[0], torch.get_num_threads()
    small_ms, float_ms = both_times_ms(small.engines, open_engines(float_path, threads), eager, photo)
    about = compression_in(subject, path)
    return Receipt(
        method=job.name,
        budget=options.budget or ("as the paper has it" if options.plan is None else "of a plan"),
        mean_weight_bits=about.mean_weight_bits,
        mean_activation_bits=about.mean_activation_bits,
        kept=_OF_INTEGERS if plan is None else tuple(sorted(each.value for each in plan.kept)),
        left_float=() if plan is None else sites_in_float(job.graph, plan),
        integer_share=integer_share(path, photo),
        simulated=about.simulated,
        file_bytes=path.stat().st_size,
        float_bytes=float_path.stat().st_size,
        float_ms=float_ms,
        small_ms=small_ms,
        photo_hw=(photo.shape[0], photo.shape[1]),
        threads=threads,
        same_as_simulation=same_as_simulation(subject, path),
        same_as_float=same,
        photos=len(job.examples.images),
        photos_of=job.examples.source,
        scores=scores,
        train_steps=options.train_steps,
    )


def _scores(job: Job, eager: Session, small: Session, data: Data) -> tuple[Score, ...]:
    before = score(job.subject, eager, data, job.track, f"scoring float on {data.split}")
    after = score(job.subject, small, data, job.track, f"scoring small on {data.split}")
    return tuple(
        Score(b.name, b.higher_is_better, data.split, data.images, small.engine, b.value, a.value)
        for b, a in zip(before, after, strict=True)
    )


def _of_plan(job: Job) -> dict[str, object]:
    """What the network is made with."""
    plan = job.work.sha256("plan.json")
    return {"plan": plan, "seed": job.options.seed, "train_steps": job.options.train_steps or None, **job.made_with}
