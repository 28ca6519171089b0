"""Compressed networks as ONNX: engines say what the simulation says, and really compute in integers."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

from denselab import _vision as _vision

# isort: split
import timm

from compress_models import captured, images, small_graph
from denselab.compress.fold_norms import fold_norms
from denselab.compress.graph import Graph, capture
from denselab.compress.methods.method import Calibration
from denselab.compress.methods.min_max import MIN_MAX
from denselab.compress.observing import observe
from denselab.compress.plan import Granularity, Grid, QuantPlan, QuantSpec, equal_bits, exact_everywhere
from denselab.compress.quantizers import (
    AdaLog,
    Log2,
    LogSqrt2,
    Quantizer,
    Sulq,
    TanQ,
    Ternary,
    Uniform,
)
from denselab.compress.round_sums import round_sums
from denselab.compress.simulate import QuantizedGraph, grid_of
from denselab.compress.to_onnx import (
    compressed_artifact_model,
    compression_of,
    quantized_to_onnx,
    simulated_sites,
    with_network,
)
from denselab.errors import InputError
from denselab.export.artifact import export_artifact
from denselab.export.executed import executed_integers
from denselab.export.graph import ArtifactGraph
from denselab.export.integers import ActivationGrid, Site, StoredWeight, lowered
from denselab.export.parity import Receipt, agreement
from denselab.export.precision import MIXED
from denselab.export.torch_session import TorchSession
from denselab.model import DensePredictor
from denselab.runtime.artifact import ArtifactInfo, Compression, read_info
from denselab.runtime.session import OnnxRuntimeSession, OpenVinoSession
from engines import run_everywhere
from test_export_packed_weights import as_read
from tiny_models import PHOTOS, TASKS, photo, tiny_info, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

GRID = ActivationGrid(0.02, 120, 255)
SWIN = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (2,), "num_heads": (2,)}


def quantize(graph: Graph, pixels: torch.Tensor, weights: int, activations: int) -> QuantizedGraph:
    bits = exact_everywhere(graph, equal_bits(graph, weights, activations))
    plan = QuantPlan.make(graph, MIN_MAX.name, MIN_MAX.spec, bits)
    return MIN_MAX.quantize(graph, observe(graph, [pixels]), plan, Calibration([pixels]))


# Lowering, on graphs written by hand


def marked(op: str, weight: StoredWeight, bias: np.ndarray, x_shape: list[int | str], **settings: object) -> ModelProto:
    """One operation on two marked operands and a bias."""
    nodes = [
        helper.make_node("Mark", [name], [f"{name}_marked"], domain="denselab", key=f"site of {name}") for name in "xw"
    ]
    nodes.append(helper.make_node(op, ["x_marked", "w_marked", "bias"], ["y"], **settings))
    graph = helper.make_graph(
        nodes,
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x_shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * len(x_shape))],
        [
            numpy_helper.from_array(np.zeros(weight.codes.shape, np.float32), "w"),
            numpy_helper.from_array(bias, "bias"),
        ],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("denselab", 1)]
    sites: dict[str, Site] = {"site of x": GRID, "site of w": weight}
    return lowered(helper.make_model(graph, opset_imports=opsets, ir_version=10), sites)


def random_weight(shape: tuple[int, ...], zero: int | None = None, seed: int = 0) -> StoredWeight:
    """7 bits; zero None: zero points so far apart that codes are out of range."""
    rng = np.random.default_rng(seed)
    channels = shape[0]
    zeros = rng.integers(0, 128, channels) if zero is None else np.full(channels, zero)
    scale = rng.uniform(0.002, 0.004, channels).astype(np.float32)
    return StoredWeight(rng.integers(0, 128, shape), 7, scale, zeros.astype(np.int32), 0, True)


def numbers_of(weight: StoredWeight) -> np.ndarray:
    beside = (-1, *(1 for _ in weight.codes.shape[1:]))
    return ((weight.codes - weight.zero_point.reshape(beside)) * weight.scale.reshape(beside)).astype(np.float32)


@pytest.mark.parametrize("zero", [64, None])
def test_a_linear_layer_and_a_convolution(zero: int | None) -> None:
    rng = np.random.default_rng(1)
    bias = rng.standard_normal(6).astype(np.float32)
    rows, weight = rng.standard_normal((5, 12)).astype(np.float32), random_weight((6, 12), zero)
    model = marked("Gemm", weight, bias, ["rows", 12], transB=1)
    for engine, (got,) in run_everywhere(model, {"x": rows}).items():
        np.testing.assert_allclose(got, as_read(rows) @ numbers_of(weight).T + bias, atol=1e-3, err_msg=engine)
    maps, weight = rng.standard_normal((2, 4, 9, 7)).astype(np.float32), random_weight((6, 4, 3, 3), zero)
    model = marked("Conv", weight, bias, ["batch", 4, "h", "w"], pads=[1, 1, 1, 1], strides=[2, 1])
    wanted = torch.nn.functional.conv2d(
        torch.tensor(as_read(maps)), torch.tensor(numbers_of(weight)), torch.tensor(bias), (2, 1), 1
    )
    for engine, (got,) in run_everywhere(model, {"x": maps}).items():
        np.testing.assert_allclose(got, wanted.numpy(), atol=1e-3, err_msg=engine)
    kinds = {each.data_type for each in model.graph.initializer if len(each.dims) == 4}
    assert kinds == {TensorProto.INT8}


def test_a_bias_that_no_int32_holds_is_added_in_float() -> None:
    weight = replace(random_weight((2, 4), 64), scale=np.array([1e-3, 1e-12], np.float32))
    bias = np.array([0.5, 3.0], np.float32)
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    for got in run_everywhere(marked("Gemm", weight, bias, ["rows", 4], transB=1), {"x": x}).values():
        np.testing.assert_allclose(got[0], as_read(x) @ numbers_of(weight).T + bias, atol=1e-4)


def test_multiplications_are_counted_where_they_run() -> None:
    """Known by hand: 10 x 64 x 32 in integers; twice as many beside them in float."""
    model = marked("Gemm", random_weight((64, 32), 64), np.ones(64, np.float32), ["rows", 32], transB=1)
    inputs = {"x": np.ones((10, 32), np.float32)}
    assert executed_integers(model, inputs) == {"openvino": 1.0, "onnxruntime": 1.0}
    model.graph.initializer.append(numpy_helper.from_array(np.ones((64, 64), np.float32), "more"))
    model.graph.node.append(helper.make_node("Gemm", ["y", "more"], ["z"], "more"))
    model.graph.output[0].name = "z"
    assert executed_integers(model, inputs) == {"openvino": 0.3333, "onnxruntime": 0.3333}


# Networks


def test_every_quantizer_is_written() -> None:
    """A network with two outputs, attention and a batch norm, each site on another grid and at other bits."""
    graph = fold_norms(small_graph()[1])
    base = quantize(graph, images(16), 4, 6)
    one, half = torch.tensor(1.0), torch.tensor(0.5)
    spread = torch.logspace(-0.2, 0.2, 8)
    others: dict[str, Quantizer] = {
        "project/linear/input": Sulq(torch.tensor(2.0), torch.tensor(-3.0), torch.tensor(3.0), 6),
        "query/linear/input": Uniform(spread.view(1, 1, -1) / 10, torch.full((1, 1, 8), 120), 8),  # per channel
        "key/linear/input": Uniform(torch.tensor(0.05), None, 8),
        "value/linear/input": Uniform(torch.tensor(0.02), torch.tensor(-300), 8),  # no code is the number 0
        "query/linear/weight": Uniform(torch.tensor(0.1), None, 2),
        "key/linear/weight": Uniform(spread.view(-1, 1) / 5, torch.arange(1, 9).view(-1, 1), 3),
        "value/linear/weight": Ternary(one, half),
        "project/linear/weight": Log2(spread.view(-1, 1), 4),
        "widen/linear/weight": TanQ(one, half, 5),
        "head/linear/input": Log2(torch.tensor(4.0), 4),
    }
    attention = [site.key for site in graph.sites if site.key.startswith("/matmul/")]
    for key, each in zip(attention, (AdaLog(one, torch.tensor(20), 5, half), TanQ(one, half, 6)), strict=False):
        others[key] = each
    others[next(key for key in attention if key.endswith("attention"))] = LogSqrt2(one, 4)
    specs = dict(base.plan.specs)
    for key, each in others.items():
        grained = (
            Granularity.PER_CHANNEL if "scale" in vars(each) and each.scale.numel() > 1 else Granularity.PER_TENSOR
        )
        specs[key] = QuantSpec(each.bits, grid_of(each), grained, symmetric=grid_of(each) is Grid.TERNARY)
    quantized = QuantizedGraph(graph, replace(base.plan, specs=specs), {**base.quantizers, **others})
    model = quantized_to_onnx(quantized, ("scores", "tap"))
    onnx.checker.check_model(model, full_check=True)
    pixels = images(64, seed=1)
    wanted = [each.detach().numpy() for each in quantized.run(pixels)]
    for engine, got in run_everywhere(model, {"pixels": pixels.numpy()}).items():
        for ours, theirs in zip(wanted, got, strict=True):
            assert (np.abs(theirs - ours) > 0.02 * np.abs(ours).max()).mean() < 0.01, engine
        assert (got[0].argmax(1) == wanted[0].argmax(1)).mean() >= 0.98, engine
    simulated = set(simulated_sites(quantized))
    assert {"project/linear/input", "query/linear/input", "value/linear/input", "head/linear/input"} <= simulated
    assert "key/linear/input" not in simulated


def test_windows_run_in_integers() -> None:
    """A Swin: window attention, at any batch; weights of 3 bits take 3 bits."""
    torch.manual_seed(0)
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=10, **SWIN)
    graph = fold_norms(captured(model, side_px=32))
    quantized = quantize(graph, images(16, side_px=32), 3, 8)
    exported = quantized_to_onnx(quantized)
    pixels = images(3, seed=1, side_px=32)
    wanted = quantized.run(pixels).detach().numpy()
    for engine, (got,) in run_everywhere(exported, {"pixels": pixels.numpy()}).items():
        assert np.abs(got - wanted).max() < 0.05 * np.abs(wanted).max(), engine
        assert (got.argmax(1) == wanted.argmax(1)).all(), engine
    shares = executed_integers(exported, {"pixels": pixels.numpy()[:1]})
    assert shares["onnxruntime"] > 0.9
    assert shares["openvino"] > 0.7  # attention runs in float there
    stored = sum(len(each.raw_data) for each in exported.graph.initializer if each.data_type == TensorProto.UINT8)
    at_3_bits = sum(
        site.elements for site in graph.sites if site.is_weight and quantized.plan.specs[site.key].bits == 3
    )
    assert stored == pytest.approx(3 * at_3_bits / 8, rel=0.02)


class Stacked(nn.Module):
    """A matrix of its own for every column, as in attention along axes with positions."""

    def __init__(self) -> None:
        super().__init__()
        self.matrices = nn.Parameter(torch.randn(6, 3, 5, generator=torch.Generator().manual_seed(0)))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.mean(2).permute(2, 0, 1) @ self.matrices


def test_a_stack_of_matrices() -> None:
    quantized = quantize(captured(Stacked(), side_px=6), images(16, side_px=6), 8, 8)
    pixels = images(2, seed=1, side_px=6)
    wanted = quantized.run(pixels).detach().numpy()
    for engine, (got,) in run_everywhere(quantized_to_onnx(quantized), {"pixels": pixels.numpy()}).items():
        np.testing.assert_allclose(got, wanted, atol=1e-4, err_msg=engine)


class NormedProduct(nn.Module):
    """Masks that gather features, and a norm of the channels, which are rows: what updates the queries of kMaX."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.masks = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 6, 1)
        self.norm, self.update = nn.BatchNorm1d(8), nn.Conv1d(8, 4, 1)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        masks = self.masks(pixels).flatten(2).softmax(1)
        return self.update(self.norm(self.features(pixels).flatten(2) @ masks.transpose(1, 2)).relu())


def test_a_norm_of_the_rows_of_a_product() -> None:
    torch.manual_seed(0)
    model = NormedProduct()
    nn.init.uniform_(model.norm.running_var, 0.5, 2)
    quantized = quantize(captured(model, side_px=6), images(16, side_px=6), 8, 8)
    assert simulated_sites(quantized) == ("update/conv/input",)
    pixels = images(2, seed=1, side_px=6)
    wanted = quantized.run(pixels).detach().numpy()
    for engine, (got,) in run_everywhere(quantized_to_onnx(quantized), {"pixels": pixels.numpy()}).items():
        np.testing.assert_allclose(got, wanted, atol=0.02 * np.abs(wanted).max(), err_msg=engine)


class Residual(nn.Module):
    """A sum that is read in float and as codes, of a convolution without a bias: the fusion of DPT."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.unit = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        projected = self.project(pixels)
        return self.head(projected + self.unit(projected.relu()))


def test_sums_without_a_bias_are_read_in_float_and_as_codes() -> None:
    torch.manual_seed(0)
    quantized = quantize(captured(Residual(), side_px=8), images(16, side_px=8), 8, 8)
    pixels = images(2, seed=1, side_px=8)
    wanted = quantized.run(pixels).detach().numpy()
    for engine, (got,) in run_everywhere(quantized_to_onnx(quantized), {"pixels": pixels.numpy()}).items():
        np.testing.assert_allclose(got, wanted, atol=0.02 * np.abs(wanted).max(), err_msg=engine)


def test_doubles_are_refused() -> None:
    graph = small_graph(torch.float64)[1]
    empty = QuantizedGraph(graph, QuantPlan(graph.model, "none", frozenset(), {}), {})
    with pytest.raises(InputError, match=r"wanted a network captured in float32 to export, got torch.float64"):
        quantized_to_onnx(empty)


# Artifacts


def learn_greatest_channel(model: DensePredictor, pixels: Tensor) -> None:
    """A few steps, after which few pixels are undecided: one code rounded the other way turns those that are."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model.train()
    for _ in range(20):
        logits = model(pixels).mask_logits
        assert logits is not None
        F.cross_entropy(F.interpolate(logits, pixels.shape[-2:], mode="bilinear"), pixels.argmax(1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.fixture(scope="module")
def dense() -> tuple[DensePredictor, QuantizedGraph]:
    """A convolutional network with batch norms, free in height and width, that has learned to name pixels."""
    model = tiny_model()
    pixels = torch.stack([torch.tensor(image).permute(2, 0, 1) / 255 for image in PHOTOS.images])
    learn_greatest_channel(model, pixels)
    graph = fold_norms(capture(model, pixels[:2]))
    bits = exact_everywhere(graph, equal_bits(graph, 8, 8))
    plan = QuantPlan.make(graph, MIN_MAX.name, MIN_MAX.spec, bits)
    stats = observe(graph, [pixels], fewest_images=1)
    return model, MIN_MAX.quantize(graph, stats, plan, Calibration([pixels]))


@pytest.fixture(scope="module")
def compressed(dense: tuple[DensePredictor, QuantizedGraph]) -> ModelProto:
    return compressed_artifact_model(dense[0], TASKS, dense[1])


@pytest.fixture(scope="module")
def exported(
    dense: tuple[DensePredictor, QuantizedGraph], compressed: ModelProto, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Receipt]:
    folder = tmp_path_factory.mktemp("compressed")
    model, quantized = dense
    in_float = folder / "float.onnx"
    in_float.write_bytes(compressed.SerializeToString())  # stands for the float artifact: it is timed, no more
    info = replace(tiny_info(), compression=compression_of(quantized, b"{}"))
    simulation = with_network(model, quantized.as_module())
    path = folder / "compressed.onnx"
    return path, export_artifact(simulation, TASKS, info, path, PHOTOS, ready=compressed, float_artifact=in_float)


@pytest.mark.parametrize("size_hw", [(33, 50), (101, 67)], ids=str)
def test_a_dense_model_at_any_size(
    dense: tuple[DensePredictor, QuantizedGraph], exported: tuple[Path, Receipt], size_hw: tuple[int, int]
) -> None:
    image = photo(*size_hw)
    model, quantized = dense
    wanted = TorchSession(ArtifactGraph(with_network(model, quantized.as_module()), TASKS)).run(image)
    for session in (OnnxRuntimeSession(exported[0]), OpenVinoSession(exported[0], precision="f32")):
        got = session.run(image)
        assert got["class_ids"].shape == size_hw
        assert agreement("semantic", wanted, got) >= 0.99, session.engine


def test_the_receipt_says_what_ran(
    exported: tuple[Path, Receipt], dense: tuple[DensePredictor, QuantizedGraph]
) -> None:
    path, receipt = exported
    assert receipt.integer_share is not None
    assert receipt.integer_share["openvino"] > 0.9
    assert receipt.integer_share["onnxruntime"] > 0.4  # convolutions that are added run in float
    assert receipt.float_latency_ms is not None
    assert receipt.float_latency_ms.keys() == receipt.integer_share.keys() | {"openvino in fp32"}
    text = receipt.to_text()
    assert "of multiplications run in integers" in text
    assert text.count("the float artifact (") == 3
    slower = replace(
        receipt, float_latency_ms={name: ms / 2 for name, ms in receipt.latency_ms.items() if name != "torch"}
    )
    assert slower.to_text().count("SLOWER, 0.50 times the speed of the float artifact") == 3
    info = read_info(path)
    assert info.precision == MIXED
    assert dict(info.receipt) == json.loads(json.dumps(receipt.to_dict()))
    assert info.compression is not None
    assert info.compression.method == "minmax"
    assert (info.compression.mean_weight_bits, info.compression.mean_activation_bits) == (7, 8)
    assert len(info.compression.plan_sha256) == 64
    assert info.compression.simulated == 0


def test_a_dense_model_stores_integers(exported: tuple[Path, Receipt]) -> None:
    kinds: Counter[int] = Counter()
    for each in onnx.load(exported[0]).graph.initializer:
        kinds[each.data_type] += int(np.prod(each.dims))
    assert kinds[TensorProto.INT8] > 20 * kinds[TensorProto.FLOAT]


def test_zeros_are_put_around_the_codes_of_a_photo(compressed: ModelProto) -> None:
    made_by = {name: node for node in compressed.graph.node for name in node.output}
    photo_pad = next(node for node in compressed.graph.node if node.op_type == "Pad")
    assert made_by[photo_pad.input[0]].op_type == "QuantizeLinear"
    zero = {each.name: numpy_helper.to_array(each) for each in compressed.graph.initializer}[photo_pad.input[2]]
    assert 0 < zero < 255


def test_sums_of_8_bits_let_every_convolution_run_in_integers(
    dense: tuple[DensePredictor, QuantizedGraph], tmp_path: Path
) -> None:
    model, quantized = dense
    pixels = torch.stack([torch.tensor(image).permute(2, 0, 1) / 255 for image in PHOTOS.images])
    rounded = round_sums(quantized, [pixels])
    made = compressed_artifact_model(model, TASKS, rounded)
    image = PHOTOS.images[0]
    assert min(executed_integers(made, {"image": image[None]}).values()) > 0.9
    path = tmp_path / "sums.onnx"
    path.write_bytes(made.SerializeToString())
    simulated = TorchSession(ArtifactGraph(with_network(model, rounded.as_module()), TASKS)).run(image)
    for session in (OnnxRuntimeSession(path), OpenVinoSession(path, precision="f32")):
        assert agreement("semantic", simulated, session.run(image)) >= 0.98, session.engine


def test_rounding_sums_moves_answers_a_little(dense: tuple[DensePredictor, QuantizedGraph]) -> None:
    quantized = dense[1]
    pixels = torch.stack([torch.tensor(image).permute(2, 0, 1) / 255 for image in PHOTOS.images])
    rounded = round_sums(quantized, [pixels])
    rounding = torch.ops.aten.fake_quantize_per_tensor_affine.default
    nodes = rounded.graph.module.graph.find_nodes(op="call_function", target=rounding)
    assert nodes
    before, after = (tuple(each.graph.run(pixels).mask_logits.flatten()[:9].tolist()) for each in (quantized, rounded))
    assert before != after
    assert before == pytest.approx(after, rel=0.1, abs=0.05)


def test_a_plan_of_other_answers_is_refused(
    dense: tuple[DensePredictor, QuantizedGraph], compressed: ModelProto, tmp_path: Path
) -> None:
    model, quantized = dense
    key = next(site.key for site in quantized.graph.sites if not site.is_weight)
    grid = quantized.quantizers[key]
    assert isinstance(grid, Uniform)
    coarse = replace(grid, scale=grid.scale * 40)
    other = QuantizedGraph(quantized.graph, quantized.plan, {**quantized.quantizers, key: coarse})
    simulation = with_network(model, other.as_module())
    with pytest.raises(InputError, match=r"wanted the answers of torch on 97 % of pixels, got .* nothing was written"):
        export_artifact(simulation, TASKS, tiny_info(), tmp_path / "a.onnx", PHOTOS, ready=compressed)
    assert list(tmp_path.iterdir()) == []


def test_what_is_said_of_compression_is_read_back() -> None:
    info = replace(tiny_info(), compression=Compression("minmax", "ab", 4.5, None, 3))
    assert ArtifactInfo.from_dict(info.to_dict()) == info
    older = {name: value for name, value in info.to_dict().items() if name != "compression"}
    assert ArtifactInfo.from_dict(older).compression is None
    with pytest.raises(InputError, match=r"lacks 'plan_sha256'"):
        ArtifactInfo.from_dict(
            {**info.to_dict(), "compression": {"method": "x", "mean_weight_bits": 1, "mean_activation_bits": 1}}
        )
