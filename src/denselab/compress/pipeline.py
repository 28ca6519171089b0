"""The way of `denselab compress`: from a network and photos to a small file that was measured, in saved stages.

    sites.json         where the network can be quantized
    stats.safetensors  what the calibration photos show there
    relevance.json     how much every site counts
    float.onnx         the same network in float32, to compare with
    sensitivity.json   what bits lose at every site
    plan.json          bits and grids; made to be read, edited and compared
    model.onnx         the small file
    layers.json        how far every layer is off
    receipt.json       what was measured of the small file

A stage that was made with the same is not made again (see `work_folder`).
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from denselab.compress.allocate import Budget, budget_text, parse_budget
from denselab.compress.bit_losses import Importance, Measured
from denselab.compress.choose_bits import ChosenBits
from denselab.compress.fold_norms import fold_norms
from denselab.compress.graph import Axis, Graph, capture
from denselab.compress.layer_table import Layer, layer_table, read_layers, site_errors, sites_in_float, write_layers
from denselab.compress.measure_losses import WIDTHS, measure
from denselab.compress.methods.all import measuring, method_named
from denselab.compress.methods.i_vit import I_VIT
from denselab.compress.methods.method import Calibration, Method
from denselab.compress.names import ImportanceName, MethodName
from denselab.compress.observing import FEWEST_IMAGES, Stats, observe
from denselab.compress.photos import read_some
from denselab.compress.plan import KEPT, Kept, QuantPlan
from denselab.compress.receipt import Receipt, Score, both_times_ms
from denselab.compress.relevance.scores import SavedRelevance, gradient_times_activation
from denselab.compress.saved_file import reading
from denselab.compress.simulate import QuantizedGraph
from denselab.compress.sites import SiteList
from denselab.compress.small_file import (
    Data,
    Track,
    compression_in,
    float_file,
    float_session,
    integer_share,
    open_data,
    photos_to_compare,
    same_answers,
    same_as_simulation,
    score,
    small_engines,
    small_model,
    write_integers,
    write_small,
)
from denselab.compress.subject import Classifier, Dense, Photos, Subject
from denselab.compress.within_budget import (
    CurvePoint,
    bits_for,
    check_met,
    curve,
    float_products,
    limits_activations,
    only_8,
    plan_point,
)
from denselab.compress.work_folder import WorkFolder, file_sha256
from denselab.errors import InputError
from denselab.export.artifact import check_target
from denselab.export.parity import open_engines
from denselab.files import atomic_path, write_json
from denselab.runtime.session import Session

MEASURED_PHOTOS, MEASURED_DENSE_PHOTOS = 16, 4
"""What bits lose is measured with so many. A dense photo asks about thousands of pixels: a few of them tell."""

_LAYER_PHOTOS = 8
_PAIRS = 6
_OF_INTEGERS = ("the operands of all products, with 16 between them",)


@dataclass(frozen=True)
class Options:
    """What a user asks for.

    calibrate: folder or .zip of photos, of which so many `images` are taken. budget: see `allocate.parse_budget`; None
    with a plan alone. method, importance: None: `auto`, and the method's own. kept: stays at 8 bits.
    quantize_attention: products of two activations too, where the budget does not ask for it (see
    `within_budget.float_products`). plan: used as it is. data: to score on. work: folder of the stages; None: beside
    `out`. seed: of all that is drawn at random. min_agreement: see `small_file.EXACT_CLASSES`.
    """

    calibrate: Path
    out: Path
    budget: str | None = None
    method: MethodName | None = None
    quantize_attention: bool = False
    images: int = 128
    importance: ImportanceName | None = None
    kept: frozenset[Kept] = KEPT
    plan: Path | None = None
    data: Path | None = None
    work: Path | None = None
    overwrite: bool = False
    seed: int = 0
    min_agreement: float | None = None

    def check(self) -> None:
        """Raise InputError for what can be refused before anything is opened."""
        check_target(self.out, self.overwrite)
        if self.method is MethodName.I_VIT:
            if self.budget is not None or self.plan is not None:
                raise InputError("--method i-vit: wanted neither --budget nor --plan, for its bits are fixed; drop it")
            return
        if self.quantize_attention and self.plan is not None:
            raise InputError("--quantize-attention: wanted with a budget, for a plan is used as it is; edit the plan")
        if self.budget is None and self.plan is None:
            raise InputError("--budget: wanted one such as 4.0bits, 2.5MB, 0.25x or 8ms, or --plan FILE; got neither")
        if self.budget is not None and self.plan is not None:
            raise InputError("--budget, --plan: wanted one of them, got both; a plan is used as it is, drop --budget")
        if self.budget is not None:
            parse_budget(self.budget, 1)
        if self.plan is not None and not self.plan.is_file():
            what = "a folder" if self.plan.is_dir() else "which does not exist"
            raise InputError(f"--plan: wanted a file, got {self.plan}, {what}; check the path")


@dataclass(frozen=True)
class Outcome:
    """All that a report shows. chosen_bytes: of weights, of the plan, on the scale of the curve."""

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
    Raises InputError: a target that exists, no photos, a model that cannot be captured, a budget that cannot be met
    (naming the nearest that can), a plan or a work folder of another model, engines that disagree with the simulation.
    """
    options.check()
    if options.method is MethodName.I_VIT and not isinstance(subject.kind, Classifier):
        raise InputError("--method i-vit: wanted a classifier, got a dense model; choose another method")
    data = None if options.data is None else open_data(subject, options.data)
    photos = read_some(
        options.calibrate, options.images, say, lambda found: track(found, options.images, "reading photos")
    )
    if len(photos) < FEWEST_IMAGES:
        raise InputError(f"--calibrate: wanted at least {FEWEST_IMAGES} photos, got {len(photos)}; add some")
    seen = [subject.seen(photo) for photo in photos]
    del photos
    say("tracing the model")
    graph = fold_norms(capture(subject.network, subject.pixels(seen[0][None]), free=subject.free))
    network_hw, seen = _fixed_size(subject, graph, seen)
    batches = Photos(subject, tuple(seen))
    folder = options.out.with_suffix(".work") if options.work is None else options.work
    work = WorkFolder(folder, graph.model, say)
    run = _Run(subject, options, graph, network_hw, seen, batches, data, work, say, track)
    return run.outcome()


class _Run:
    """One compression: every method is a stage."""

    def __init__(
        self,
        subject: Subject,
        options: Options,
        graph: Graph,
        network_hw: tuple[int, int] | None,
        seen: Sequence[Tensor],
        batches: Photos,
        data: Data | None,
        work: WorkFolder,
        say: Callable[[str], None],
        track: Track,
    ) -> None:
        self.subject, self.options, self.graph, self.network_hw = subject, options, graph, network_hw
        self.seen, self.batches, self.data, self.work, self.say, self.track = seen, batches, data, work, say, track
        digest = hashlib.sha256()
        for each in seen:
            digest.update(f"{tuple(each.shape)}".encode() + each.contiguous().numpy().tobytes())
        self.images = {"calibration_photos": digest.hexdigest()}
        self.given = None
        if options.plan is not None:
            self.given = QuantPlan.read(options.plan, graph.site_list())
            if options.method is not None and options.method != self.given.method:
                raise InputError(
                    f"--method: wanted {self.given.method}, which {options.plan} was made for, got {options.method}; "
                    "drop --method or mend the plan"
                )
        self.name = options.method or MethodName.AUTO
        if self.given is not None:
            self.name = MethodName(method_named(self.given.method).name)
        self.importance = _importance(options.importance, self.name)
        self.calibration = Calibration(batches, subject.change, options.seed, say)
        most = MEASURED_PHOTOS if isinstance(subject.kind, Classifier) else MEASURED_DENSE_PHOTOS
        self.measured_images = min(most, len(seen))
        self.measured: Measured | None = None
        self.plan: QuantPlan | None = None

    def outcome(self) -> Outcome:
        """All stages in turn."""
        work, graph = self.work, self.graph
        work.stage("sites.json", {}, graph.site_list, SiteList.write, SiteList.read)
        self.stats = work.stage(
            "stats.safetensors",
            {**self.images, "seed": self.options.seed},
            lambda: observe(graph, self.track(self.batches, len(self.batches), "observing"), seed=self.options.seed),
            Stats.write,
            lambda path: Stats.read(path, graph.model),
        )
        self.relevance = work.stage(
            "relevance.json",
            {**self.images, "relevance": self._relevance_method(), "images": self.measured_images},
            self._relevance,
            SavedRelevance.write,
            lambda path: SavedRelevance.read(path, graph),
        )
        work.stage("float.onnx", {"network_size": self.network_hw}, self._write_float, _nothing_written, _nothing)
        self.float_path = work.folder / "float.onnx"
        if self.name is MethodName.I_VIT:
            return self._integer_outcome()
        self.method = method_named(self.name)
        budget = None if self.options.budget is None else self._budget(self.options.budget)
        if budget is not None:
            self.measured = self._measured(budget)
        self.plan = self._plan(budget)
        small = {"plan": work.sha256("plan.json"), "seed": self.options.seed, **self.images}
        work.stage("model.onnx", small, self._write_small, _nothing_written, _nothing)
        layers = work.stage("layers.json", small, self._layers, write_layers, read_layers)
        points = ()
        if budget is not None and self.measured is not None and not only_8(budget):
            points = curve(graph, self.measured, self.importance, self.options.seed)
        chosen = None if self.measured is None else plan_point(graph, self.measured, self.importance, self.plan)
        return self._finished(layers, chosen, points)

    def _integer_outcome(self) -> Outcome:
        """I-ViT has no plan: its bits are fixed, and its file is the program."""
        made_with = {**self.images, "method": self.name}
        self.work.stage("model.onnx", made_with, self._write_program, _nothing_written, _nothing)
        return self._finished((), None, ())

    def _write_program(self) -> None:
        self.say("building the program of integers")
        program = I_VIT.quantize(self.graph, self.stats, self.calibration)
        examples = photos_to_compare(self.subject, self.data, self.seen)
        write_integers(self.subject, program, examples, self.work.folder / "model.onnx", self.say)

    def _finished(self, layers: tuple[Layer, ...], chosen: CurvePoint | None, curve: tuple[CurvePoint, ...]) -> Outcome:
        """The receipt, the file in its place, and all that a report shows."""
        work = self.work
        asked = {
            "model": work.sha256("model.onnx"),
            "float": work.sha256("float.onnx"),
            "data": None if self.data is None else [str(self.data.source), self.data.split, self.data.images],
        }
        receipt = work.stage("receipt.json", asked, self._receipt, _write_receipt, _read_receipt)
        if self.options.budget is not None:
            check_met(self._budget(self.options.budget), receipt)
        with atomic_path(self.options.out) as partial:
            shutil.copyfile(work.folder / "model.onnx", partial)
        importance = self.importance.value if self.measured else "what was given"
        return Outcome(
            self.subject.name,
            receipt,
            layers,
            self.relevance.method,
            importance,
            curve,
            chosen,
            work.folder,
            self.options.out,
        )

    def _relevance_method(self) -> str:
        return "lrp" if self.importance in _BY_LRP else "gradient x activation"

    def _relevance(self) -> SavedRelevance:
        """Of the first photos. Relevance propagation runs only for who asks for it: it is patented for some uses."""
        pixels = [self.subject.pixels(each[None]) for each in self.seen[: self.measured_images]]
        shown = _Again(lambda: self.track(pixels, len(pixels), f"relevance by {self._relevance_method()}"))
        if self.importance in _BY_LRP:
            from denselab.compress.relevance.lrp import lrp

            scores = lrp(self.graph, shown, self.subject.start)
        else:
            scores = gradient_times_activation(self.graph, shown, self.subject.start)
        return SavedRelevance(self.graph.model, self._relevance_method(), len(pixels), scores)

    def _write_float(self) -> None:
        self.say("writing the float network, to compare with")
        model = float_file(self.subject, self.subject.pixels(self.seen[0][None]), self.network_hw)
        with atomic_path(self.work.folder / "float.onnx") as partial:
            partial.write_bytes(model.SerializeToString())

    def _budget(self, text: str) -> Budget:
        return parse_budget(text, self.float_path.stat().st_size)

    def _measured(self, budget: Budget) -> Measured:
        """What bits lose. Where there is nothing to choose, errors at 8 bits are enough."""
        nothing_to_choose = only_8(budget)
        importance = Importance.UNIFORM if nothing_to_choose and self.options.importance is None else self.importance
        self.importance = importance
        pairs = _PAIRS if self.name is MethodName.MIX_QVIT and not nothing_to_choose else 0
        widths = (8,) if nothing_to_choose else WIDTHS
        method = measuring(self.method)
        asked = {
            **self.images,
            "importance": importance.value,
            "method": method.name,
            "kept": sorted(each.value for each in self.options.kept),
            "widths": list(widths),
            "pairs": pairs,
            "images": self.measured_images,
            "relevance": self.work.sha256("relevance.json") if importance in _BY_LRP else None,
        }
        return self.work.stage(
            "sensitivity.json",
            asked,
            lambda: measure(
                self.graph,
                self.stats,
                method,
                self.calibration,
                {importance},
                widths,
                kept=self.options.kept,
                start=self.subject.likelihood if importance is Importance.FISHER else self.subject.start,
                relevance=self.relevance.scores if importance in _BY_LRP else None,
                most_pairs_of=pairs,
                images=self.measured_images,
            ),
            Measured.write,
            lambda path: Measured.read(path, self.graph),
        )

    def _plan(self, budget: Budget | None) -> QuantPlan:
        """The plan that was given, or the one of least loss within the budget."""
        path = self.work.folder / "plan.json"

        def write(plan: QuantPlan, to: Path) -> None:
            plan.write(to)

        def read(file: Path) -> QuantPlan:
            return QuantPlan.read(file, self.graph.site_list())

        if budget is None:
            assert self.given is not None
            assert self.options.plan is not None
            if path.exists() and self.options.plan.resolve() == path.resolve():
                return self.given
            asked_plan, plan = {"given": file_sha256(self.options.plan)}, self.given
            return self.work.stage("plan.json", asked_plan, lambda: plan, write, read, may_be_edited=True)

        asked_for = self.options.quantize_attention or limits_activations(budget)
        left_float = frozenset[str]() if asked_for else float_products(self.graph)

        def draft_bytes(chosen: ChosenBits) -> int:
            return self._draft_bytes(chosen, left_float)

        def make() -> QuantPlan:
            assert self.measured is not None
            chosen = bits_for(self.graph, self.measured, budget, self.importance, self.options.seed, draft_bytes)
            return self._plan_of(self.method, chosen.bits, left_float)

        asked = {
            "budget": budget_text(budget),
            "method": self.method.name,
            "importance": self.importance.value,
            "kept": sorted(each.value for each in self.options.kept),
            "left_float": sorted(left_float),
            "seed": self.options.seed,
            "sensitivity": self.work.sha256("sensitivity.json"),
            "float_network": self.work.sha256("float.onnx"),
        }
        plan = self.work.stage("plan.json", asked, make, write, read, may_be_edited=True)
        if plan.method != self.method.name:
            raise InputError(
                f"{path}: was edited to the method {plan.method}, but --method is {self.method.name}; give "
                f"--plan {path}"
            )
        return plan

    def _plan_of(self, method: Method, bits: Mapping[str, int], left_float: Set[str]) -> QuantPlan:
        planned = {key: width for key, width in bits.items() if key not in left_float}
        return QuantPlan.make(self.graph, method.name, method.spec, planned, self.options.kept)

    def _draft_bytes(self, chosen: ChosenBits, left_float: Set[str]) -> int:
        """Of the file that a choice makes, by quantizers that are fitted in seconds."""
        self.say("looking at the size of a draft")
        method = measuring(self.method)
        plan = self._plan_of(method, chosen.bits, left_float)
        quantized = method.quantize(self.graph, self.stats, plan, self.calibration)
        return small_model(self.subject, quantized, self.network_hw).ByteSize()

    @cached_property
    def _quantized(self) -> QuantizedGraph:
        self.say(f"quantizing by {self.method.name}")
        assert self.plan is not None
        return self.method.quantize(self.graph, self.stats, self.plan, self.calibration)

    def _write_small(self) -> None:
        examples = photos_to_compare(self.subject, self.data, self.seen)
        path = self.work.folder / "model.onnx"
        plan_json = (self.work.folder / "plan.json").read_bytes()
        quantized = self._quantized
        self.say("writing the small file")
        write_small(
            self.subject,
            quantized,
            plan_json,
            self.network_hw,
            examples,
            path,
            self.options.min_agreement,
            self.say,
        )

    def _layers(self) -> tuple[Layer, ...]:
        quantized = self._quantized
        assert self.plan is not None
        errors = site_errors(quantized, [self.subject.pixels(each[None]) for each in self.seen[:_LAYER_PHOTOS]])
        return layer_table(self.graph, self.plan, self.relevance, errors, self.measured, self.importance)

    def _receipt(self) -> Receipt:
        path = self.work.folder / "model.onnx"
        examples = photos_to_compare(self.subject, self.data, self.seen)
        eager = float_session(self.subject, self.network_hw)
        threads = torch.get_num_threads()
        small = small_engines(path, self.subject)
        first = next(iter(small.values()))
        same = same_answers(self.subject, eager, first, examples.images)
        scores = None if self.data is None else self._scores(eager, first, self.data)
        self.say("timing the engines in turns")
        photo = examples.images[0]
        small_ms, float_ms = both_times_ms(small, open_engines(self.float_path, threads), eager, photo)
        about = compression_in(self.subject, path)
        return Receipt(
            method=self.name,
            budget=self.options.budget or ("as the paper has it" if self.options.plan is None else "of a plan"),
            mean_weight_bits=about.mean_weight_bits,
            mean_activation_bits=about.mean_activation_bits,
            kept=_OF_INTEGERS if self.plan is None else tuple(sorted(each.value for each in self.plan.kept)),
            left_float=() if self.plan is None else sites_in_float(self.graph, self.plan),
            integer_share=integer_share(path, photo),
            simulated=about.simulated,
            file_bytes=path.stat().st_size,
            float_bytes=self.float_path.stat().st_size,
            float_ms=float_ms,
            small_ms=small_ms,
            photo_hw=(photo.shape[0], photo.shape[1]),
            threads=threads,
            same_as_simulation=same_as_simulation(self.subject, path),
            same_as_float=same,
            photos=len(examples.images),
            photos_of=examples.source,
            scores=scores,
        )

    def _scores(self, eager: Session, small: Session, data: Data) -> tuple[Score, ...]:
        before = score(self.subject, eager, data, self.track, f"scoring float on {data.split}")
        after = score(self.subject, small, data, self.track, f"scoring small on {data.split}")
        return tuple(
            Score(b.name, b.higher_is_better, data.split, data.images, small.engine, b.value, a.value)
            for b, a in zip(before, after, strict=True)
        )


_BY_LRP = (Importance.LRP, Importance.LRP_TIMES_SENSITIVITY)

_IMPORTANCES = {
    ImportanceName.SENSITIVITY: Importance.SENSITIVITY,
    ImportanceName.LRP: Importance.LRP,
    ImportanceName.LRP_TIMES_SENSITIVITY: Importance.LRP_TIMES_SENSITIVITY,
    ImportanceName.FISHER: Importance.FISHER,
    ImportanceName.GRADIENT: Importance.GRADIENT_TIMES_ACTIVATION,
    ImportanceName.UNIFORM: Importance.UNIFORM,
    ImportanceName.RANDOM: Importance.RANDOM,
}
_OWN_IMPORTANCE = {
    MethodName.LRP_QVIT: Importance.LRP,
    MethodName.MIX_QVIT: Importance.LRP_TIMES_SENSITIVITY,
}


def _importance(asked: ImportanceName | None, method: MethodName) -> Importance:
    """What was asked for, or what the method's paper has."""
    if asked is not None:
        return _IMPORTANCES[asked]
    return _OWN_IMPORTANCE.get(method, Importance.SENSITIVITY)


def _fixed_size(subject: Subject, graph: Graph, seen: list[Tensor]) -> tuple[tuple[int, int] | None, list[Tensor]]:
    """The size that the file runs at inside, None for any; the photos resized to it where they must be."""
    if not isinstance(subject.kind, Dense):
        return None, seen
    height, width = graph.example_shapes[0][2:]
    if {Axis.HEIGHT, Axis.WIDTH} <= graph.free and subject.kind.loaded.network_hw is None:
        return None, seen
    resized = [
        each
        if tuple(each.shape[1:]) == (height, width)
        else F.interpolate(each[None].float(), size=(height, width), mode="bilinear", antialias=True)[0].round().byte()
        for each in seen
    ]
    return (height, width), resized


class _Again:
    """Batches whose every loop is shown."""

    def __init__(self, loop: Callable[[], Any]) -> None:
        self._loop = loop

    def __iter__(self) -> Any:
        return iter(self._loop())


def _nothing(path: Path) -> None:
    """For stages whose file is read by others."""


def _nothing_written(held: None, path: Path) -> None:
    """For stages that write their file themselves."""


def _write_receipt(receipt: Receipt, path: Path) -> None:
    write_json(path, receipt.to_dict())


def _read_receipt(path: Path) -> Receipt:
    with reading(path, "a receipt", "delete it"):
        return Receipt.from_dict(json.loads(path.read_bytes()))
