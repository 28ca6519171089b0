"""Saved stages, budgets of whole files, receipts, reports; and a dense model from photos to a file."""

import itertools
import json
import math
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from compress_models import captured, images, segmenter, small_graph
from denselab.checkpoint import LoadedModel, ModelCard
from denselab.compress import file_stages, pipeline
from denselab.compress.bit_losses import Importance, Measured
from denselab.compress.budgets import Bops, Bytes, FloatShare, MeanBits, Milliseconds, limits_activations
from denselab.compress.choose_bits import EXACT_CANDIDATES, ChosenBits, bits_within
from denselab.compress.graph import Axis, Graph, capture
from denselab.compress.layer_table import Layer, layer_cells, site_errors, sites_in_float
from denselab.compress.measure_losses import measure
from denselab.compress.methods.all import METHODS, PERCENTILES, method_named
from denselab.compress.methods.method import Calibration
from denselab.compress.methods.min_max import MIN_MAX
from denselab.compress.names import MethodName
from denselab.compress.observing import observe
from denselab.compress.pipeline import Options, Outcome, compress
from denselab.compress.plan import QuantPlan, equal_bits, exact_everywhere
from denselab.compress.qat import Training, distilled
from denselab.compress.quantizers import quantized
from denselab.compress.receipt import Receipt, Score
from denselab.compress.report import to_html
from denselab.compress.sites import ModelHash, Operand
from denselab.compress.small_file import check_same, decided_photos
from denselab.compress.subject import Subject, dense_subject, open_classifier
from denselab.compress.to_onnx import quantized_to_onnx
from denselab.compress.traces import Traces
from denselab.compress.within_budget import (
    CurvePoint,
    bits_for,
    check_met,
    curve,
    float_products,
    only_8,
    plan_point,
)
from denselab.compress.work_folder import WorkFolder
from denselab.errors import InputError
from denselab.runtime.artifact import read_info
from denselab.runtime.session import OnnxRuntimeSession, OpenVinoSession
from tiny_classifier import save, trained, write_photos
from tiny_models import CLASSES, PHOTOS

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL = ModelHash("a" * 64, "b" * 64)


class Notes:
    """A stage that counts how often it is made."""

    def __init__(self) -> None:
        self.made = 0

    def make(self) -> str:
        self.made += 1
        return f"made {self.made}"

    def run(self, folder: Path, made_with: dict[str, Any], model: ModelHash = MODEL, **more: bool) -> tuple[str, str]:
        said: list[str] = []
        work = WorkFolder(folder, model, said.append)
        held = work.stage("stage.txt", made_with, self.make, _write, Path.read_text, **more)
        return held, "\n".join(said)


def _write(text: str, path: Path) -> None:
    path.write_text(text)


def test_stages_are_kept_for_the_same_and_made_again_for_others(tmp_path: Path) -> None:
    notes, folder = Notes(), tmp_path / "new" / "work"
    assert notes.run(folder, {"images": 1}) == ("made 1", "")
    assert notes.run(folder, {"images": 1}) == ("made 1", f"{folder}/stage.txt: kept")
    assert notes.run(folder, {"images": 2}) == ("made 2", f"{folder}/stage.txt: made again, for images changed")
    (folder / "stage.txt").unlink()
    assert notes.run(folder, {"images": 2}) == ("made 3", "")
    _write("by hand", folder / "stage.txt")
    assert notes.run(folder, {"images": 2}) == ("made 4", f"{folder}/stage.txt: made again, for the file changed")


def test_an_edited_file_is_used_where_that_is_welcome_and_never_lost(tmp_path: Path) -> None:
    notes = Notes()
    notes.run(tmp_path, {"budget": 1}, may_be_edited=True)
    _write("by hand", tmp_path / "stage.txt")
    assert notes.run(tmp_path, {"budget": 1}, may_be_edited=True) == (
        "by hand",
        f"{tmp_path}/stage.txt: edited by hand, used as it is",
    )
    with pytest.raises(InputError, match=r"was edited by hand, and would be lost as budget changed; give --plan"):
        notes.run(tmp_path, {"budget": 2}, may_be_edited=True)


def test_a_work_folder_of_another_model_is_refused(tmp_path: Path) -> None:
    notes = Notes()
    notes.run(tmp_path, {})
    with pytest.raises(InputError, match="wanted a work folder of this model, got one of another model"):
        notes.run(tmp_path, {}, ModelHash("c" * 64, "b" * 64))
    with pytest.raises(InputError, match="got one of other weights; give another --work or delete"):
        notes.run(tmp_path, {}, ModelHash("a" * 64, "c" * 64))
    (tmp_path / "stages.json").write_text("{")
    with pytest.raises(InputError, match=r"stages.json: wanted notes of saved stages, but it is damaged"):
        notes.run(tmp_path, {})
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made"):
        notes.run(tmp_path / "file", {})


def test_names_of_the_command_line_are_those_of_the_methods() -> None:
    assert {each.name for each in METHODS} == set(MethodName) - {MethodName.I_VIT}
    assert method_named("minmax") is MIN_MAX
    with pytest.raises(InputError, match=r"method: wanted one of auto, .*minmax, got 'best'"):
        method_named("best")


@pytest.fixture(scope="module")
def measured() -> Measured:
    graph = small_graph()[1]
    calibration = Calibration([images(8)])
    stats = observe(graph, [images(8)])
    widths = {width for pair in EXACT_CANDIDATES for width in pair}
    return measure(graph, stats, PERCENTILES, calibration, {Importance.SENSITIVITY}, widths, sensitivity_widths=1)


def within(measured: Measured, budget: Any, overhead: Callable[[int], int]) -> tuple[ChosenBits, list[int]]:
    sizes: list[int] = []

    def draft_bytes(chosen: ChosenBits) -> int:
        sizes.append(overhead(chosen.allocation.totals.weight_bytes))
        return sizes[-1]

    return bits_for(small_graph()[1], measured, budget, Importance.SENSITIVITY, 0, draft_bytes), sizes


def test_a_budget_of_bytes_is_one_of_the_whole_file(measured: Measured) -> None:
    all_8, _ = within(measured, MeanBits(8, 8), lambda size: size)
    needed = all_8.allocation.totals.weight_bytes
    assert set(all_8.bits.values()) == {7, 8}
    same, sizes = within(measured, Bytes(needed + 4096), lambda size: size)
    assert same.bits == all_8.bits
    assert sizes == [needed]
    # 500 bytes of graph: the first draft is too large, the next leaves room for them
    less, sizes = within(measured, Bytes(needed + 4096), lambda size: size + 500)
    assert len(sizes) == 2
    assert sizes[0] > needed
    assert sizes[1] <= needed
    share, _ = within(measured, FloatShare(0.5, 2 * (needed + 4096)), lambda size: size + 500)
    assert share.bits == less.bits
    fewest = bits_within(small_graph()[1], measured, Bytes(10**9), candidates=[(2, 8)])
    least = fewest.allocation.totals.weight_bytes
    for budget_bytes, graph_bytes in ((4200, 5000), (300, 0)):
        nearest = least + graph_bytes + 4096
        said = (
            rf"--budget {budget_bytes}B: at most {budget_bytes} bytes cannot be met; the nearest that can is {nearest}B"
        )
        with pytest.raises(InputError, match=said):
            within(measured, Bytes(budget_bytes), partial(operator.add, graph_bytes))
        met, _ = within(measured, Bytes(nearest), partial(operator.add, graph_bytes))
        assert met.allocation.totals.weight_bytes == least


def test_milliseconds_are_met_at_8_bits_or_not(measured: Measured) -> None:
    chosen, sizes = within(measured, Milliseconds(3), lambda size: size)
    assert set(chosen.bits.values()) == {7, 8}
    assert not sizes
    assert only_8(Milliseconds(3))
    assert only_8(MeanBits(8, None))
    assert not only_8(MeanBits(8, 7.5))
    check_met(Milliseconds(3), receipt())
    with pytest.raises(InputError, match=r"--budget 1.5ms: cannot be met; the nearest is 2.00ms \(openvino, all in in"):
        check_met(Milliseconds(1.5), receipt())
    check_met(Bytes(1000), receipt())
    with pytest.raises(InputError, match=r"--budget 900B: wanted at most 900 bytes, got a file of 1000 by minmax; ask"):
        check_met(Bytes(900), receipt())


def test_the_curve_falls_and_the_plan_lies_on_it(measured: Measured) -> None:
    graph = small_graph()[1]
    points = curve(graph, measured, Importance.SENSITIVITY, 0)
    assert [each.budget for each in points][-1] == "8bits"
    assert all(a.bytes <= b.bytes and a.loss >= b.loss for a, b in itertools.pairwise(points))
    bits = exact_everywhere(graph, equal_bits(graph, 8, 8))
    plan = QuantPlan.make(graph, MIN_MAX.name, MIN_MAX.spec, bits)
    point = plan_point(graph, measured, Importance.SENSITIVITY, plan)
    assert point is not None
    assert point.loss == pytest.approx(points[-1].loss)
    assert point.bytes == pytest.approx(points[-1].bytes, abs=20)
    odd = QuantPlan.make(graph, MIN_MAX.name, MIN_MAX.spec, equal_bits(graph, 5, 5))
    assert plan_point(graph, measured, Importance.SENSITIVITY, odd) is None


def test_products_of_activations_stay_in_float_where_no_budget_counts_them(measured: Measured) -> None:
    assert [limits_activations(each) for each in (MeanBits(8, 8), MeanBits(8, None), Bops(1e9))] == [True, False, True]
    assert not any(map(limits_activations, (Bytes(1), FloatShare(0.5, 10), Milliseconds(1))))
    graph = small_graph()[1]
    attention = float_products(graph)
    operands = {graph.found.by_key[key].operand for key in attention}
    assert operands == {Operand.QUERY, Operand.KEY, Operand.ATTENTION, Operand.VALUE}
    bits = equal_bits(graph, 4, 4)
    whole, less = (
        QuantPlan.make(graph, MIN_MAX.name, MIN_MAX.spec, {key: bits[key] for key in bits if key not in left})
        for left in (frozenset[str](), attention)
    )
    assert sites_in_float(graph, whole) == ()
    assert sites_in_float(graph, less) == (
        *("1 x query of matmul", "1 x key of matmul", "1 x attention of matmul", "1 x value of matmul"),
    )
    points = [plan_point(graph, measured, Importance.SENSITIVITY, plan) for plan in (whole, less)]
    assert points[0] is not None
    assert points[1] is not None
    assert points[1].loss < points[0].loss
    assert points[1].bytes == points[0].bytes


def test_photos_near_a_tie_decide_nothing() -> None:
    simulated = np.array([[3.0, 1.0], [1.0, 1.3], [0.0, 2.0], [5.0, 1.0]])
    assert decided_photos(simulated, simulated).all()
    moved = simulated + np.array([[0.2, 0.0], [0.0, -0.2], [0.2, 0.0], [0.0, 0.2]])  # 0.14 in the mean square
    assert decided_photos(simulated, moved).tolist() == [True, False, True, True]
    assert decided_photos(simulated, simulated + 100 * simulated).sum() >= 2  # at least half
    alike = {"openvino": np.arange(200) >= 6, "onnxruntime": np.arange(200) >= 2}
    check_same(alike, 0.99, 0.97)
    with pytest.raises(InputError, match=r"in onnxruntime: wanted the classes .* on 99 % of 200 photos, got 97 %"):
        check_same({"onnxruntime": alike["openvino"]}, 0.99, 0.97)
    check_same({"onnxruntime": np.arange(16) >= 1}, 0.99, 0.97)  # one of few
    with pytest.raises(InputError, match=r"on 90.62 % of 16 photos, got 87.5 %.*Take more bits, another --method"):
        check_same({"onnxruntime": np.arange(16) >= 2}, 0.99, 0.97)


def test_networks_that_differ_in_numbers_are_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    graph = captured(nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5)))
    calibration = Calibration([images(8)])
    stats = observe(graph, calibration.batches)
    first, second = (
        MIN_MAX.quantize(
            graph, stats, QuantPlan.make(graph, "minmax", MIN_MAX.spec, equal_bits(graph, bits, 8)), calibration
        )
        for bits in (8, 4)
    )
    learned = distilled(second, graph, calibration, Training(2, weight_rate=0.01))
    wanted = quantized_to_onnx(learned)
    counted, traces = Counted(monkeypatch, (torch.onnx, "export")), Traces()
    drafts = [quantized_to_onnx(each, traces=traces).ByteSize() for each in (first, second)]
    assert drafts[1] != drafts[0]
    assert quantized_to_onnx(learned, traces=traces) == wanted
    assert counted.calls["torch.onnx.export"] == 1


def test_errors_of_sites_are_those_of_their_tensors() -> None:
    model, graph = small_graph()
    plan = QuantPlan.make(graph, MIN_MAX.name, MIN_MAX.spec, equal_bits(graph, 4, 4))
    quantized_graph = MIN_MAX.quantize(graph, observe(graph, [images(8)]), plan, Calibration(()))
    errors = site_errors(quantized_graph, [images(2)])
    assert errors.keys() == plan.specs.keys()
    weight = model.head.weight.detach()
    rounded = quantized(quantized_graph.quantizers["head/linear/weight"], weight)
    wanted = ((rounded - weight).square().sum() / weight.square().sum()).item()
    assert errors["head/linear/weight"] == pytest.approx(wanted, rel=1e-5)


def receipt() -> Receipt:
    return Receipt(
        method="minmax",
        budget="8bits",
        mean_weight_bits=8.0,
        mean_activation_bits=None,
        kept=("head",),
        left_float=("2 x query of matmul",),
        simulated=2,
        file_bytes=1000,
        float_bytes=4000,
        float_ms={"openvino": 6.0, "onnxruntime": 2.0, "torch eager": 20.0},
        small_ms={"openvino": 2.0, "onnxruntime": 4.0},
        photo_hw=(48, 64),
        threads=2,
        integer_share={"openvino": 0.75},
        same_as_simulation={"openvino": 0.999},
        same_as_float=0.98,
        photos=16,
        photos_of="street test",
        scores=(Score("mIoU", True, "test", 5, "openvino", 0.63, 0.62),),
    )


def test_a_receipt_says_what_was_measured_and_what_is_worse() -> None:
    found = dict(receipt().rows())
    assert found["file"] == "1000 bytes, 0.250 of 4000 in float32"
    assert found["mIoU"] == "0.6300 in float (torch), 0.6200 small (openvino): -0.0100 on 5 photos (test)"
    assert found["mean bits of activations"] == "float"
    assert found["stays in float"] == "2 x query of matmul"
    assert found["same as float"] == "98.00 % of answers, on 16 photos (street test)"
    assert found["openvino"] == "2.00 ms small, 6.00 ms float: 3.00 times as fast"
    assert found["onnxruntime"] == "4.00 ms small, 2.00 ms float: 2.00 times SLOWER"
    assert found["torch eager"] == "20.00 ms float; small in openvino: 10.00 times as fast"
    assert found["in integers, openvino"] == "75.0 % of all multiplications"
    assert found["computed in float"].startswith("2 quantizers")
    assert receipt().warnings() == ["the small file is slower than float in onnxruntime: 4.00 ms against 2.00 ms"]
    larger = replace(receipt(), file_bytes=4000, scores=None, small_ms={})
    assert larger.warnings() == ["the small file is not smaller: 4000 bytes against 4000 bytes"]
    assert dict(replace(larger, left_float=()).rows())["stays in float"] == "no operand of a product"
    assert dict(larger.rows())["score"] == "not measured; give --data"
    assert Receipt.from_dict(json.loads(json.dumps(receipt().to_dict()))) == receipt()


def test_rows_of_layers() -> None:
    layer = Layer("blocks.0.attn", "matmul", "query", "key", 4, None, 0.125, None, 0.01, False)
    assert layer_cells(layer) == ("blocks.0.attn", "matmul", "query 4, key float", "12.5 %", "-", "1.000 %")
    kept = replace(layer, first="weight", second="input", second_bits=8, loss=0.5, kept=True)
    assert layer_cells(kept)[2:] == ("weight 4, input 8 (kept)", "12.5 %", "5.00e-01", "1.000 %")


def test_what_is_asked_for_is_checked_before_anything_is_opened(tmp_path: Path) -> None:
    options = Options(tmp_path, tmp_path / "small.onnx")
    with pytest.raises(InputError, match=r"--budget: wanted one such as 4.0bits"):
        options.check()
    with pytest.raises(InputError, match="--budget, --plan: wanted one of them, got both"):
        replace(options, budget="4bits", plan=tmp_path / "plan.json").check()
    with pytest.raises(InputError, match=r"--plan: wanted a file, got .*plan.json, which does not exist"):
        replace(options, plan=tmp_path / "plan.json").check()
    with pytest.raises(InputError, match="budget: wanted a number and a unit"):
        replace(options, budget="small").check()
    with pytest.raises(InputError, match="i-vit: wanted neither --budget nor --plan"):
        replace(options, budget="8bits", method=MethodName.I_VIT).check()
    with pytest.raises(InputError, match="i-vit: its integers cannot be trained; drop --train-steps"):
        replace(options, method=MethodName.I_VIT, train_steps=5).check()
    with pytest.raises(InputError, match="--train-steps: wanted a whole number from 0 up, got -1"):
        replace(options, budget="4bits", train_steps=-1).check()
    replace(options, method=MethodName.I_VIT).check()
    with pytest.raises(InputError, match="--quantize-attention: wanted with a budget, for a plan is used as it is"):
        replace(options, plan=tmp_path / "plan.json", quantize_attention=True).check()
    (tmp_path / "small.onnx").write_text("")
    with pytest.raises(InputError, match="exists already"):
        replace(options, budget="4bits").check()


def tracked(items: Iterable[Any], total: int, label: str) -> Iterable[Any]:
    return items


def dense_network() -> Subject:
    torch.manual_seed(0)
    card = ModelCard(("semantic",), "small", {}, CLASSES, (97, 129), None, "CC-BY-4.0")
    return dense_subject(LoadedModel(segmenter(len(CLASSES), width=64).eval(), card), "tiny")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """A tiny network of three classes, compressed to 8 bits."""
    folder = tmp_path_factory.mktemp("dense")
    (folder / "photos").mkdir()
    for number in range(8):
        Image.fromarray(PHOTOS.images[number % 3]).save(folder / "photos" / f"{number}.png")
    options = Options(folder / "photos", folder / "small.onnx", "8bits", MethodName.MINMAX, 8)
    return folder, compress(dense_network(), options, lambda _: None, tracked)


def test_a_dense_model_becomes_a_small_artifact(dense: tuple[Path, Outcome]) -> None:
    folder, outcome = dense
    info = read_info(folder / "small.onnx")
    assert info.tasks == ("semantic",)
    assert info.compression is not None
    assert (info.compression.method, info.compression.mean_weight_bits) == ("minmax", 7.0)
    found = outcome.receipt
    assert found.file_bytes == (folder / "small.onnx").stat().st_size
    assert found.file_bytes < 0.5 * found.float_bytes
    assert found.same_as_float > 0.9
    assert {"openvino", "onnxruntime"} <= found.small_ms.keys() <= found.float_ms.keys()
    assert {path.name for path in (folder / "small.work").iterdir()} == {
        *("float.onnx", "layers.json", "model.onnx", "plan.json", "receipt.json", "relevance.json"),
        *("sensitivity.json", "sites.json", "stages.json", "stats.safetensors"),
    }
    assert [layer.name for layer in outcome.layers][-1] == "head.classify"
    assert sum(layer.relevance for layer in outcome.layers) == pytest.approx(1)


def test_a_network_without_sites_is_refused(dense: tuple[Path, Outcome], tmp_path: Path) -> None:
    empty = replace(dense_network(), name="rectified", network=nn.ReLU())
    with pytest.raises(
        InputError, match=r"rectified: wanted a network with linear layers, .* nothing to quantize, take"
    ):
        compress(empty, Options(dense[0] / "photos", tmp_path / "small.onnx", "8bits"), print, tracked)


@pytest.fixture(scope="module")
def traced_once() -> Iterator[None]:
    """Tracing is most of a run that keeps its stages."""
    known: list[Graph] = []

    def capture_once(network: nn.Module, *example: Tensor, free: frozenset[Axis]) -> Graph:
        known.extend([] if known else [capture(network, *example, free=free)])
        return known[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "capture", capture_once)
        yield


class Counted:
    """Calls of some functions, by name."""

    def __init__(self, patch: pytest.MonkeyPatch, *functions: tuple[Any, str]) -> None:
        self.calls: Counter[str] = Counter()
        for owner, name in functions:
            patch.setattr(owner, name, self._counted(f"{owner.__name__}.{name}", getattr(owner, name)))

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            self.calls[name] += 1
            return function(*arguments, **options)

        return counted


def test_a_budget_of_bytes_wastes_nothing_and_training_is_kept(
    traced_once: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save(trained(), tmp_path / "colours")
    subject = open_classifier(f"timm:{source}")
    options = Options(
        *(write_photos(tmp_path / "photos"), tmp_path / "small.onnx", "0.215x", MethodName.MINMAX),
        images=16,
        train_steps=4,
    )
    said: list[str] = []
    counted = Counted(
        monkeypatch, (torch.onnx, "export"), (OpenVinoSession, "__init__"), (OnnxRuntimeSession, "__init__")
    )
    monkeypatch.setattr(file_stages, "_MOST_CHANGE", math.inf)  # sums are rounded, as in the draft
    outcome = compress(subject, options, said.append, tracked)
    # The float network and the small one, each traced once, although there was a draft; open in three engines each.
    assert "looking at the size of a draft" in said
    assert counted.calls == {"torch.onnx.export": 2, "OpenVinoSession.__init__": 4, "OnnxRuntimeSession.__init__": 2}
    assert outcome.receipt.file_bytes <= 0.215 * outcome.receipt.float_bytes
    measured = json.loads((outcome.work / "sensitivity.json").read_text())
    assert any(side["errors"] for side in measured["weights"].values())
    assert not any(side["errors"] for side in measured["activations"].values())
    assert [point.budget for point in outcome.curve][-1] == "8bits of weights"
    assert ("trained", "4 steps, to answer as the float network does") in outcome.receipt.rows()
    # What training changed is read, not learned again, by the stages that come after it.
    (outcome.work / "layers.json").unlink()
    again = compress(subject, replace(options, overwrite=True), said.append, tracked)
    assert f"{outcome.work / 'trained.safetensors'}: kept" in said
    assert again.layers == outcome.layers
    assert counted.calls["torch.onnx.export"] == 2


def outcome_of(layers: int, loss: float | None) -> Outcome:
    rows = tuple(
        Layer(f"blocks.{number}.<mlp>", "linear", "weight", "input", 4, 8, 1 / layers, loss, 0.001 * number, False)
        for number in range(layers)
    )
    products = Layer("blocks.0.attn", "matmul", "attention", "value", 3, None, 0.0, None, 0.01, False)
    points = tuple(CurvePoint(f"{bits}bits", 1000 * bits, 2.0**-bits) for bits in (3, 4, 6))
    return Outcome(
        *("model & <co>", receipt(), (*rows, products), "gradient x activation", "sensitivity"),
        () if loss is None else points,
        None if loss is None else CurvePoint("this plan", 3500, 0.1),
        *(Path("small.work"), Path("small.onnx")),
    )


def test_the_report_is_one_page_with_its_plots() -> None:
    page = to_html(outcome_of(12, 0.01))
    assert page == to_html(outcome_of(12, 0.01))
    assert page.count("<svg") == page.count("</svg>") == 4
    assert "model &amp; &lt;co&gt;, compressed" in page
    assert "blocks.3.&lt;mlp&gt;" in page
    assert "slower than float in onnxruntime" in page
    assert "The file takes 1000 bytes, 0.250 of the same network in float32. 98.00 % of its answers" in page
    assert "openvino is the fastest engine: 2.00 ms for one photo of 64x48 px, where" in page
    assert "mIoU 0.6300 at 4000 bytes in float, 0.6200 at 1000 bytes" in page
    assert not re.search(r"(src|href)=.https?:|<script|@import", page)
    plain = to_html(outcome_of(80, None))
    assert plain.count("<svg") == 2
    assert "Sensitivity was not measured" in plain
    assert "Size against loss" not in plain
