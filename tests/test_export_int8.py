"""Smaller artifacts: integers really are in the file, the file really is smaller, and engines still agree."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from denselab.errors import InputError
from denselab.export import artifact
from denselab.export.artifact import export_artifact
from denselab.export.examples import PARITY_SPLITS, Examples, from_dataset
from denselab.export.graph import ArtifactGraph, to_onnx
from denselab.export.parity import Receipt
from denselab.export.precision import Precision
from denselab.export.quantize import quantize_int8, store_bf16
from denselab.model import DensePredictor
from denselab.runtime.artifact import read_info
from tiny_models import PHOTOS, TASKS, tiny_info, tiny_model


@pytest.fixture(scope="module")
def model() -> DensePredictor:
    return tiny_model()


@pytest.fixture(scope="module")
def traced(model: DensePredictor) -> ModelProto:
    return to_onnx(ArtifactGraph(model, TASKS))


@pytest.fixture(scope="module")
def exported(
    model: DensePredictor, traced: ModelProto, tmp_path_factory: pytest.TempPathFactory
) -> dict[Precision, tuple[Path, Receipt]]:
    folder = tmp_path_factory.mktemp("exported")
    made: dict[Precision, tuple[Path, Receipt]] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artifact, "to_onnx", lambda graph: traced)
        for precision in Precision:
            path = folder / f"{precision}.onnx"
            made[precision] = path, export_artifact(model, TASKS, tiny_info(precision), path, PHOTOS, PHOTOS)
    return made


def weights_of(path: Path, node: onnx.NodeProto, loaded: ModelProto) -> TensorProto:
    """The initializer behind a convolution's weight, through whatever dequantizes or casts it."""
    initializers = {tensor.name: tensor for tensor in loaded.graph.initializer}
    made_by = {name: n for n in loaded.graph.node for name in n.output}
    name = node.input[1]
    while name not in initializers:
        name = made_by[name].input[0]
    return initializers[name]


@pytest.mark.parametrize(
    ("precision", "stored"), [(Precision.INT8, TensorProto.INT8), (Precision.BF16, TensorProto.BFLOAT16)]
)
def test_weights_are_small_in_the_file(
    exported: dict[Precision, tuple[Path, Receipt]], precision: Precision, stored: int
) -> None:
    path = exported[precision][0]
    loaded = onnx.load(path)
    onnx.checker.check_model(loaded, full_check=True)
    convolutions = [node for node in loaded.graph.node if node.op_type == "Conv"]
    types = [weights_of(path, node, loaded).data_type for node in convolutions]
    if precision is Precision.INT8:  # the first, the classifier and the upsampling stay in float
        assert [types[0], *types[-2:]] == [TensorProto.FLOAT] * 3
        types = types[1:-2]
    assert len(types) > 10
    assert set(types) == {stored}
    large_floats = [
        t.name for t in loaded.graph.initializer if t.data_type == TensorProto.FLOAT and np.prod(t.dims) > 999
    ]
    assert large_floats == []


def test_files_shrink(exported: dict[Precision, tuple[Path, Receipt]]) -> None:
    size = {precision: path.stat().st_size for precision, (path, _) in exported.items()}
    assert size[Precision.FP32] > 3 * size[Precision.INT8]
    assert size[Precision.FP32] > 1.9 * size[Precision.BF16]


@pytest.mark.parametrize("precision", [Precision.BF16, Precision.INT8])
def test_receipts_say_what_was_made(exported: dict[Precision, tuple[Path, Receipt]], precision: Precision) -> None:
    path, receipt = exported[precision]
    info = read_info(path)
    assert info.precision == precision
    assert info.receipt["file_bytes"] == receipt.file_bytes == path.stat().st_size
    assert min(receipt.agreement.values()) >= 0.97


def test_weights_are_quantized_per_channel(exported: dict[Precision, tuple[Path, Receipt]]) -> None:
    loaded = onnx.load(exported[Precision.INT8][0])
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in loaded.graph.initializer}
    seen = 0
    for node in loaded.graph.node:
        if node.op_type == "DequantizeLinear" and tensors.get(node.input[0], np.empty(0)).ndim == 4:
            weight, scale = tensors[node.input[0]], tensors[node.input[1]]
            assert scale.shape == weight.shape[:1]
            # Symmetric, and each channel's largest weight uses the whole range in which no processor saturates.
            assert (np.abs(weight.astype(int)).max(axis=(1, 2, 3)) == 64).all()
            seen += 1
    assert seen > 10


def test_int8_needs_calibration_photos(model: DensePredictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact, "to_onnx", lambda graph: ModelProto())
    with pytest.raises(InputError, match="calibration: int8 needs photos to calibrate with"):
        export_artifact(model, TASKS, tiny_info(Precision.INT8), tmp_path / "a.onnx", PHOTOS)


def test_a_bad_calibration_is_refused(
    model: DensePredictor, traced: ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifact, "to_onnx", lambda graph: traced)
    grey = Examples("grey", (np.full((32, 32, 3), 128, np.uint8),))
    with pytest.raises(InputError, match="other calibration images"):
        export_artifact(model, TASKS, tiny_info(Precision.INT8), tmp_path / "a.onnx", PHOTOS, grey)
    assert list(tmp_path.iterdir()) == []


def test_quantizing_says_nothing_and_keeps_its_input(
    traced: ModelProto, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    before = traced.SerializeToString()
    quantize_int8(traced, PHOTOS.images[:1])
    store_bf16(traced)
    assert traced.SerializeToString() == before
    assert capfd.readouterr() == ("", "")
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == []


def test_bf16_rounds_to_nearest() -> None:
    # bfloat16 keeps 8 significant bits: neighbours of 1 are 1/128 apart above it; a tie goes to the even one.
    weight = np.array([[1.0, 1 + 1 / 128, 1 + 1 / 256, 1 + 3 / 256, -1 - 1 / 200]], np.float32)
    bias = np.array([1 + 1 / 256], np.float32)
    nodes = [helper.make_node("Gemm", ["x", "weight", "bias"], ["y"], transB=1)]
    graph = helper.make_graph(
        nodes, "g", [], [], [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(bias, "bias")]
    )
    stored = store_bf16(helper.make_model(graph))
    rounded, kept = stored.graph.initializer
    assert [node.op_type for node in stored.graph.node] == ["Cast", "Gemm"]
    assert stored.graph.node[0].output[0] == stored.graph.node[1].input[1]
    assert numpy_helper.to_array(rounded).astype(np.float32).tolist() == [
        [1.0, 1 + 1 / 128, 1.0, 1 + 1 / 64, -1 - 1 / 128]
    ]
    assert numpy_helper.to_array(kept).tolist() == bias.tolist()


def test_examples_are_spread_over_the_preferred_split(camvid: Path) -> None:
    from denselab.data.descriptor import open_dataset

    dataset = open_dataset(camvid)
    examples = from_dataset(dataset, ["semantic"], PARITY_SPLITS, 2)
    assert examples.source == "camvid test"
    assert [image.shape for image in examples.images] == [(360, 480, 3)] * 2
    assert examples.truths is not None
    assert [truth.hw for truth in examples.truths] == [(360, 480)] * 2
    assert len(from_dataset(dataset, ["semantic"], ("val",), 10_000).images) == len(dataset.split("val"))
