"""The integer operators as ONNX: the engine gives the integers of numpy and torch, to the last bit."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from denselab.compress.integer.layer_norm import layer_norm, layer_norm_for
from denselab.compress.integer.onnx_graph import (
    IntegerGraph,
    add_layer_norm,
    add_requantize,
    add_requantized_sum,
    add_shiftgelu,
    add_shiftmax,
)
from denselab.compress.integer.requantize import dyadic_for, requantize, requantized_sum
from denselab.compress.integer.shiftgelu import shiftgelu, shiftgelu_for
from denselab.compress.integer.shiftmax import shiftmax, shiftmax_for

INTEGER_TYPES = {onnx.TensorProto.INT32, onnx.TensorProto.INT64, onnx.TensorProto.UINT32, onnx.TensorProto.BOOL}


def engine(add: Callable[[IntegerGraph], str], **dimensions: int) -> Callable[..., np.ndarray]:
    """What the engine makes of integers with so many dimensions, of any size."""
    graph = IntegerGraph()
    output = add(graph)
    shapes = {name: [None] * count for name, count in dimensions.items()}
    model = graph.to_model(shapes, {output: next(iter(shapes.values()))})
    onnx.checker.check_model(model, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    values = [*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output]
    assert {value.type.tensor_type.elem_type for value in values} <= INTEGER_TYPES
    assert {value.data_type for value in model.graph.initializer} <= INTEGER_TYPES
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])

    def compute(**inputs: np.ndarray) -> np.ndarray:
        (answer,) = session.run(None, {name: value.astype(np.int32) for name, value in inputs.items()})
        assert answer.dtype == np.int32
        return answer

    return compute


def run(add: Callable[[IntegerGraph], str], **inputs: np.ndarray) -> np.ndarray:
    return engine(add, **{name: value.ndim for name, value in inputs.items()})(**inputs)


def rows(seed: int, most: int, length: int = 19) -> np.ndarray:
    """Random integers, and rows of extremes: all equal, most negative, alternating, around zero."""
    rng = np.random.default_rng(seed)
    row = np.arange(length)
    extremes = [
        np.full(length, -most),
        np.full(length, most),
        np.zeros(length),
        np.where(row % 2, most, -most),
        np.where(row == 0, most, -most),
        np.where(row == 0, -most, most),
        row - length // 2,
        -row - 1,
    ]
    random = [rng.integers(-most, most + 1, (6, length)), rng.integers(-9, 10, (6, length))]
    return np.concatenate([*random, np.array(extremes)]).astype(np.int32)


@pytest.mark.parametrize("as_published", [False, True])
@pytest.mark.parametrize("scale", [0.0007, 0.05, 0.3, 1.7])
@pytest.mark.parametrize("bits", [8, 16])
def test_softmax(scale: float, bits: int, as_published: bool) -> None:
    constants = shiftmax_for(scale, bits, as_published)
    compute = engine(lambda graph: add_shiftmax(graph, "q", constants), q=3)
    for seed, (most, length) in enumerate([(128, 19), (2**15, 64), (2**30, 19), (128, 1)]):
        q = rows(seed, most, length).reshape(2, -1, length)
        answer = compute(q=q)
        np.testing.assert_array_equal(answer, shiftmax(q, constants))
        np.testing.assert_array_equal(answer, shiftmax(torch.from_numpy(q), constants).numpy())


@pytest.mark.parametrize("as_published", [False, True])
@pytest.mark.parametrize("scale", [0.008, 0.05, 0.2, 1.7])
@pytest.mark.parametrize("bits", [8, 16])
def test_gelu(scale: float, bits: int, as_published: bool) -> None:
    constants = shiftgelu_for(scale, bits, as_published)
    compute = engine(lambda graph: add_shiftgelu(graph, "q", constants), q=2)
    for seed, most in enumerate([128, constants.most_input]):
        q = rows(seed, most)
        answer = compute(q=q)
        np.testing.assert_array_equal(answer, shiftgelu(q, constants))
        np.testing.assert_array_equal(answer, shiftgelu(torch.from_numpy(q), constants).numpy())


@pytest.mark.parametrize(("most", "length"), [(128, 19), (2**15, 19), (2**15, 4000), (128, 1)])
def test_layer_norm(most: int, length: int) -> None:
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(0, 1, length), rng.normal(0, 3, length)
    weight[::7], bias[::5] = 0, 0
    constants = layer_norm_for(weight, bias)
    q = rows(1, most, length)
    for own in (constants, replace(constants, steps=10)):
        answer = run(lambda graph, own=own: add_layer_norm(graph, "q", own), q=q)
        np.testing.assert_array_equal(answer, layer_norm(q, own))
        np.testing.assert_array_equal(answer, layer_norm(torch.from_numpy(q), own).numpy())


@pytest.mark.parametrize("ratio", [3e-12, 1e-9, 0.00391, 0.5, 1.0, 900.0, -0.03, 5e8])
def test_requantization(ratio: float) -> None:
    q = rows(2, 2**31 - 1)
    per_channel = dyadic_for(ratio * np.geomspace(0.1, 2, 19), 1.0)
    for dyadic in (dyadic_for(ratio, 1.0), per_channel):
        for bits in (4, 8, 16):
            answer = run(lambda graph, dyadic=dyadic, bits=bits: add_requantize(graph, "q", dyadic, bits), q=q)
            np.testing.assert_array_equal(answer, requantize(q, dyadic, bits))
            np.testing.assert_array_equal(answer, requantize(torch.from_numpy(q), dyadic, bits).numpy())


def test_residual_sum() -> None:
    q, other = rows(3, 60000), rows(4, 30000)
    dyadic, other_dyadic = dyadic_for(0.003, 0.5), dyadic_for(0.01, 0.5)
    answer = run(lambda graph: add_requantized_sum(graph, "q", dyadic, "other", other_dyadic, 8), q=q, other=other)
    np.testing.assert_array_equal(answer, requantized_sum(q, dyadic, other, other_dyadic, 8))


def test_operators_in_one_graph() -> None:
    """As in a block: LayerNorm, requantize, GELU, requantize, softmax, one prefix, constants shared."""
    rng = np.random.default_rng(0)
    norm = layer_norm_for(rng.normal(1, 0.1, 19), rng.normal(0, 0.1, 19))
    to_bits, gelu = dyadic_for(norm.output_scale, 0.03), shiftgelu_for(0.03)
    again, attention = dyadic_for(gelu.output_scale, 0.04), shiftmax_for(0.04)

    def add(graph: IntegerGraph) -> str:
        q = add_requantize(graph, add_layer_norm(graph, "q", norm), to_bits)
        q = add_requantize(graph, add_shiftgelu(graph, q, gelu), again)
        return add_shiftmax(graph, q, attention)

    q = rows(5, 128)
    hidden = requantize(shiftgelu(requantize(layer_norm(q, norm), to_bits), gelu), again)
    np.testing.assert_array_equal(run(add, q=q), shiftmax(hidden, attention))
