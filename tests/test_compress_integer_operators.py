"""I-ViT's integer operators against the published integers, floating point, values by hand and extreme inputs."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from denselab.compress.integer.layer_norm import (
    IntegerLayerNorm,
    integer_sqrt,
    layer_norm,
    layer_norm_for,
    rounded_mean,
)
from denselab.compress.integer.requantize import dyadic_for, requantize, requantized_sum, rescale
from denselab.compress.integer.shift_exp import ShiftExp, shift_exp, shift_exp_for
from denselab.compress.integer.shiftgelu import shiftgelu, shiftgelu_for
from denselab.compress.integer.shiftmax import shiftmax, shiftmax_for
from denselab.errors import InputError

Ints = np.ndarray


@pytest.fixture(scope="module")
def golden(shared_data: Path) -> dict[str, Ints]:
    path = shared_data.parent / "golden" / "ivit.npz"
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def both(operator: Callable[..., Any], q: Ints, *constants: Any) -> Ints:
    """From numpy, after torch has given the same int32."""
    ours, torch_ours = operator(q, *constants), operator(torch.from_numpy(q), *constants)
    assert (ours.dtype, torch_ours.dtype) == (np.int32, torch.int32)
    np.testing.assert_array_equal(torch_ours.numpy(), ours)
    return ours


def softmax(x: Ints) -> Ints:
    exps = np.exp(x - x.max(-1, keepdims=True))
    return exps / exps.sum(-1, keepdims=True)


def sigmoid_gelu(x: Ints) -> Ints:
    return x / (1 + np.exp(-1.702 * x))


@pytest.mark.parametrize("case", range(6))
def test_published_softmax(case: int, golden: dict[str, Ints]) -> None:
    q, scale, bits = (golden[f"softmax{case}.{name}"] for name in ("q", "scale", "output_bit"))
    published = shiftmax_for(float(scale), int(bits), as_published=True)
    assert published.exp.x0 == golden[f"softmax{case}.x0_f64"]
    assert published.output_scale == golden[f"softmax{case}.out_scale"]
    np.testing.assert_array_equal(both(shiftmax, q, published), golden[f"softmax{case}.out_int_f64"])


@pytest.mark.parametrize("case", [0, 1, 2, 4])
def test_published_gelu(case: int, golden: dict[str, Ints]) -> None:
    q, scale, bits = (golden[f"gelu{case}.{name}"] for name in ("q", "scale", "output_bit"))
    published = shiftgelu_for(float(scale), int(bits), as_published=True)
    assert published.exp.x0 == golden[f"gelu{case}.x0_f64"]
    assert published.output_scale == pytest.approx(golden[f"gelu{case}.out_scale_f64"])
    np.testing.assert_array_equal(both(shiftgelu, q, published), golden[f"gelu{case}.out_int_f64"])


def test_gelu_where_the_published_one_overflows(golden: dict[str, Ints]) -> None:
    q, scale = golden["gelu3.q"], float(golden["gelu3.scale"])
    with pytest.raises(InputError, match=r"scale: 0\.001702 is too fine for exponentials of 23 fraction bits in int32"):
        shiftgelu_for(scale, as_published=True)
    constants, expected = shiftgelu_for(scale), sigmoid_gelu(q * scale)
    published_error = np.abs(golden["gelu3.out_int_f64"] * golden["gelu3.out_scale_f64"] - expected).max()
    assert published_error > 0.2  # a sigmoid above one
    assert np.abs(both(shiftgelu, q, constants) * constants.output_scale - expected).max() < 0.002


@pytest.mark.parametrize("case", [0, 1, 2, 4])
def test_gelu_is_nearer_than_the_published(case: int, golden: dict[str, Ints]) -> None:
    q, scale, bits = golden[f"gelu{case}.q"], float(golden[f"gelu{case}.scale"]), int(golden[f"gelu{case}.output_bit"])
    constants, x = shiftgelu_for(scale, bits), q * scale
    published = golden[f"gelu{case}.out_int_f64"] * golden[f"gelu{case}.out_scale_f64"]
    error = np.abs(both(shiftgelu, q, constants) * constants.output_scale - sigmoid_gelu(x))
    # two codes of the sigmoid of 8 bits, one and a half hundredths for the line in place of the exponential
    assert (error <= np.abs(x) * (2 / 128 + 0.015)).all()
    assert error.max() < np.abs(published - sigmoid_gelu(x)).max() / 2


def test_published_layer_norm(golden: dict[str, Ints]) -> None:
    converged = 0
    for case in range(5):
        item = {name: golden[f"ln{case}.{name}"] for name in ("q", "weight", "bias", "var_int", "std_int")}
        constants = layer_norm_for(item["weight"], item["bias"])
        np.testing.assert_array_equal(constants.bias, golden[f"ln{case}.bias_int_f64"])
        np.testing.assert_allclose(constants.output_scale, golden[f"ln{case}.out_scale_f64"], rtol=1e-15)
        assert not constants.down.any()
        np.testing.assert_array_equal(both(rounded_mean, item["q"])[..., 0], golden[f"ln{case}.mean_int"])
        np.testing.assert_array_equal(integer_sqrt(item["var_int"][..., None], 10)[..., 0], item["std_int"])
        out, expected = both(layer_norm, item["q"], constants), golden[f"ln{case}.out_int_f64"]
        np.testing.assert_array_equal(both(layer_norm, item["q"], replace(constants, steps=10)), expected)
        roots = np.vectorize(math.isqrt)(item["var_int"])
        np.testing.assert_array_equal(integer_sqrt(item["var_int"]), np.maximum(roots, 1))
        np.testing.assert_array_equal(out[roots == item["std_int"]], expected[roots == item["std_int"]])
        converged += int((roots == item["std_int"]).sum())
    assert converged == 10


def test_layer_norm_where_the_published_one_has_not_converged(golden: dict[str, Ints]) -> None:
    # cases 0 and 3: roots 113 and 6, for which 10 steps from 2^16 end at 119 and 64
    for case in (0, 3):
        q, weight, bias = (golden[f"ln{case}.{name}"] for name in ("q", "weight", "bias"))
        centred = q - np.round(q.mean(-1, keepdims=True))
        expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True)) * weight + bias
        constants = layer_norm_for(weight, bias)
        error = np.abs(both(layer_norm, q, constants) * constants.output_scale - expected).max()
        assert error < 0.06  # a root of 6 where it is 6.2
        assert np.abs(golden[f"ln{case}.out_value_f64"] - expected).max() > 3 * error


@pytest.mark.parametrize("case", range(5))
def test_published_requantization(case: int, golden: dict[str, Ints]) -> None:
    item = {name.partition(".")[2]: value for name, value in golden.items() if name.startswith(f"requant{case}.")}
    bits, out_scale = int(item["bits"]), float(item["out_scale"])
    dyadic = dyadic_for(item["in_scale"], out_scale)
    np.testing.assert_array_equal(dyadic.multiplier, item["m"])
    np.testing.assert_array_equal(dyadic.shift, item["e"])
    if "identity_q" not in item:
        np.testing.assert_array_equal(both(requantize, item["q"], dyadic, bits), item["out_int"])
        return
    other = dyadic_for(item["identity_scale"], out_scale)
    np.testing.assert_array_equal(other.multiplier, item["identity_m"])
    ours = requantized_sum(item["q"], dyadic, item["identity_q"], other, bits)
    np.testing.assert_array_equal(ours, item["out_int"])
    tensors = torch.from_numpy(item["q"]), torch.from_numpy(item["identity_q"])
    np.testing.assert_array_equal(requantized_sum(tensors[0], dyadic, tensors[1], other, bits).numpy(), ours)


def test_shift_exp_by_hand() -> None:
    exp = ShiftExp(x0=-8, up=0, shift=4)
    # 0: (0 + 16) << 4 >> 1 = 128, one. -4: -4 - 2 + 1 = -5, k 0: (11 << 4) >> 1 = 88; true 128 e^-0.5 = 77.6
    # -8: -8 - 4 + 1 = -11, k 1, r -3: (13 << 4) >> 2 = 52; -1000 is cut off at -32: k 4, r 0: 256 >> 5 = 8
    assert both(shift_exp, np.array([0, -4, -8, -1000], np.int32), exp).tolist() == [128, 88, 52, 8]
    # the same at a scale of 1 / 2, shifted up by two bits, and of 1 / 32, shifted down
    assert both(shift_exp, np.array([0, -1, -2], np.int32), replace(exp, up=2)).tolist() == [128, 88, 52]
    assert both(shift_exp, np.array([0, -16, -31], np.int32), replace(exp, up=-2)).tolist() == [128, 88, 52]


@pytest.mark.parametrize("scale", [1e-6, 0.003, 1 / 64, 0.3, 1.7, 40.0])
def test_exponential_is_within_its_line(scale: float) -> None:
    exp = shift_exp_for(scale, 15, as_published=False)
    assert 64 <= -exp.x0 <= 128
    q = -np.unique((np.linspace(0, 9, 200) / scale).astype(np.int32))
    codes = both(shift_exp, q, exp) / both(shift_exp, np.zeros(1, np.int32), exp)
    assert np.abs(codes - np.exp(q * scale)).max() < 0.05


def test_softmax_by_hand() -> None:
    # scale 1 as published: x0 -1, e = [2^15, 2^14], S = 49152, F = 43690: 43690 2^15 >> 24 = 85, 2^14: 42
    published = shiftmax_for(1.0, as_published=True)
    assert both(shiftmax, np.array([[7, 6]], np.int8), published).tolist() == [[85, 42]]


def test_softmax_of_equal_inputs_and_of_one() -> None:
    for level in (-(2**30), -128, 0, 2**30):
        assert both(shiftmax, np.full((2, 4), level, np.int32), shiftmax_for(0.1)).tolist() == [[31] * 4] * 2
    assert both(shiftmax, np.array([[-5]], np.int32), shiftmax_for(0.1)).tolist() == [[127]]
    assert both(shiftmax, np.array([-5], np.int32), shiftmax_for(0.1, 16)).tolist() == [32767]
    # x0 -10: e = S = 10 2^15, F = 6553 of 6553.6, e F >> 16 = 32765
    assert both(shiftmax, np.array([-5], np.int32), shiftmax_for(0.1, 16, as_published=True)).tolist() == [32765]


def test_softmax_of_a_long_flat_row_still_sums_to_one() -> None:
    q = np.zeros((1, 200), np.int32)
    sums = [both(shiftmax, q, shiftmax_for(0.008, 16, published)).sum() / 2**15 for published in (False, True)]
    assert 0.99 < sums[0] <= 1
    assert sums[1] < 0.8
    assert both(shiftmax, np.zeros((1, 70000), np.int8), shiftmax_for(0.1)).max() == 0  # the sum is capped


def test_softmax_of_the_most_negative() -> None:
    masked = np.array([[-(2**30), 3, 2**30], [-128, 127, 127]], np.int64)
    assert both(shiftmax, masked, shiftmax_for(0.1)).tolist() == [[0, 0, 127], [0, 63, 63]]
    assert both(shiftmax, np.array([-128, 127], np.int8), shiftmax_for(1.0)).tolist() == [0, 127]


@pytest.mark.parametrize("scale", [0.003, 0.05, 0.3, 1.7])
def test_softmax_is_near_the_real_one(scale: float) -> None:
    q = np.random.default_rng(0).integers(-128, 128, (4, 33))
    constants = shiftmax_for(scale)
    assert np.abs(both(shiftmax, q, constants) * constants.output_scale - softmax(q * scale)).max() < 3 / 128


def test_gelu_by_hand() -> None:
    constants = replace(shiftgelu_for(1.0), exp=ShiftExp(-8, 0, 4))
    # 0: half of 127. 8: 128 and 52, F = 2^31 // 180 = 11930464: 128 F >> 24 = 91; -8: 52 F >> 24 = 36
    assert both(shiftgelu, np.array([0, 8, -8], np.int8), constants).tolist() == [0, 8 * 91, -8 * 36]
    assert both(shiftgelu, np.zeros((2, 1), np.int32), constants).tolist() == [[0], [0]]


def test_gelu_of_extremes() -> None:
    constants = shiftgelu_for(0.2)
    assert both(shiftgelu, np.array([-128, 127], np.int8), constants).tolist() == [0, 127 * 127]
    most = constants.most_input
    assert both(shiftgelu, np.array([-most, most]), constants).tolist() == [0, most * 127]
    # as published, beside 25.4 all that is negative has a sigmoid of one half: 63 codes
    published = shiftgelu_for(0.2, as_published=True)
    assert both(shiftgelu, np.array([-128, 127], np.int8), published).tolist() == [-128 * 63, 127 * 127]
    # a row below zero, for which its formula overflows, counts from zero
    assert both(shiftgelu, np.array([-128, -100], np.int8), published).tolist() == [0, 0]


def test_square_roots() -> None:
    near = [(2**k + j) ** 2 + i for k in range(24) for j in (-1, 0, 1) for i in (-1, 0, 1)]
    squares = np.array([v for v in [*range(3000), *near, 2**48] if v >= 0], np.int64)
    expected = [max(1, math.isqrt(int(v))) for v in squares]
    assert integer_sqrt(squares).tolist() == expected
    assert integer_sqrt(torch.from_numpy(squares)).tolist() == expected


def test_means_are_rounded_half_to_even() -> None:
    rows = np.array([[1, 2], [2, 3], [-1, -2], [-2, -3], [0, -1], [7, 7]], np.int32)
    assert both(rounded_mean, rows)[:, 0].tolist() == [2, 2, -2, -2, 0, 7]
    thirds = np.array([[0, 0, 1], [0, 0, 2], [0, 0, -1], [0, 0, -2]], np.int32)
    assert both(rounded_mean, thirds)[:, 0].tolist() == [0, 1, 0, -1]


def test_layer_norm_by_hand() -> None:
    # mean 0, V = 4, k = 2, F = 2^30 - 1, +-F // 2; s = sqrt(4) / 2^30, bias 1 / 2 / s = 2^28, scale 2 s
    constants = layer_norm_for(np.full(4, 2.0), np.ones(4))
    out = both(layer_norm, np.array([[1, -1, 1, -1]], np.int8), constants)
    assert out.tolist() == [[2**28 + 2**29 - 1, 2**28 - 2**29] * 2]
    np.testing.assert_allclose(out * constants.output_scale, [[3, -1, 3, -1]], atol=1e-7)


def test_layer_norm_of_equal_inputs_of_one_and_of_extremes() -> None:
    weight, bias = np.array([1.0, -0.5, 2.0]), np.array([0.25, 0.5, -1.0])
    constants = layer_norm_for(weight, bias)
    for level in (-(2**15), 0, 127):
        out = both(layer_norm, np.full((1, 3), level, np.int32), constants)
        np.testing.assert_allclose(out * constants.output_scale, [bias], atol=1e-8)
    assert both(layer_norm, np.array([[-128]], np.int8), layer_norm_for(np.ones(1), np.zeros(1))).tolist() == [[0]]
    # one channel of many stands out: normalised, it is the square root of C - 1, the most there can be
    count = 1000
    wide = np.full((1, count), -(2**15), np.int32)
    wide[0, 0] = 2**15 - 1
    constants = layer_norm_for(np.ones(count), np.zeros(count))
    out = both(layer_norm, wide, constants) * constants.output_scale
    np.testing.assert_allclose(out[0, :2], [math.sqrt(count - 1), -1 / math.sqrt(count - 1)], atol=3e-4)


def test_layer_norm_whose_bias_dwarfs_its_weight() -> None:
    weight = np.array([0.0, 0.0, 1e-3, 1e-12, -1e-3, 1.0])
    bias = np.array([0.0, 3.0, 5.0, -7.0, 4.0, 100.0])
    constants = layer_norm_for(weight, bias)
    assert constants.down.tolist() == [29, 29, 11, 29, 11, 6]
    q = np.random.default_rng(0).integers(-128, 128, (5, 6))
    centred = q - np.round(q.mean(-1, keepdims=True))
    normalised = centred / np.sqrt((centred**2).mean(-1, keepdims=True))
    out = both(layer_norm, q, constants) * constants.output_scale
    np.testing.assert_allclose(out, normalised * weight + bias, rtol=1e-6, atol=2e-2 * np.abs(weight).max())
    np.testing.assert_allclose(out[:, :5], (normalised * weight + bias)[:, :5], rtol=1e-5, atol=1e-7)


def test_requantization_by_hand() -> None:
    dyadic = dyadic_for(0.5, 1.0)
    assert (dyadic.multiplier.tolist(), dyadic.shift.tolist()) == (2**30, 31)
    halves = np.array([-5, -3, -2, -1, 0, 1, 2, 3, 5], np.int32)
    assert both(requantize, halves, dyadic).tolist() == [-2, -2, -1, 0, 0, 0, 1, 2, 2]
    assert both(requantize, np.array([-(2**31), -600, 600, 2**31 - 1]), dyadic).tolist() == [-128, -128, 127, 127]
    assert both(requantize, np.array([-600, 600]), dyadic, 16).tolist() == [-300, 300]
    per_channel = dyadic_for([2.0, -0.25], 0.5)
    assert both(requantize, np.array([[3, 3], [-3, -5]], np.int8), per_channel).tolist() == [[12, -2], [-12, 2]]
    residual = requantized_sum(np.array([1, 3, 127]), dyadic, np.array([2, -7, 4]), dyadic_for(1.0, 1.0))
    assert residual.tolist() == [2, -5, 68]


def test_rescaling_is_exact_over_all_ratios() -> None:
    rng = np.random.default_rng(0)
    q = np.concatenate([rng.integers(-(2**31), 2**31, 30), [-(2**31), 2**31 - 1, 0, 1]])
    for exponent in (-45.3, -31.0, -20.7, -1.0, 0.0, 3.5, 29.9):
        dyadic = dyadic_for(2.0**exponent, 1.0)
        product = [int(value) * int(dyadic.multiplier) for value in q]
        whole, rest = zip(*(divmod(value, 1 << int(dyadic.shift)) for value in product), strict=True)
        half = 1 << (int(dyadic.shift) - 1)
        expected = [w + (r > half or (r == half and w % 2 == 1)) for w, r in zip(whole, rest, strict=True)]
        assert rescale(q, dyadic).tolist() == expected
        assert rescale(torch.from_numpy(q), dyadic).tolist() == expected
        assert dyadic.multiplier / 2.0**dyadic.shift == pytest.approx(2.0**exponent, rel=1e-4)


def test_what_integers_cannot_hold() -> None:
    with pytest.raises(
        InputError, match=r"logits: wanted integers from -1073741824 to 1073741824, .* got 0 to 2147483647"
    ):
        shiftmax(np.array([0, 2**31 - 1]), shiftmax_for(0.1))
    with pytest.raises(InputError, match="inputs of GELU: wanted integers from -8388608 to 8388608"):
        shiftgelu(torch.tensor([2**23 + 1]), shiftgelu_for(0.1))
    constants: IntegerLayerNorm = layer_norm_for(np.ones(3), np.zeros(3))
    with pytest.raises(InputError, match=r"inputs of LayerNorm: .* got -32769 to 0; requantize to fewer bits first"):
        layer_norm(np.array([0, 0, -32769]), constants)
    with pytest.raises(InputError, match="wanted 3 channels, got 4"):
        layer_norm(np.zeros((2, 4), np.int8), constants)
    with pytest.raises(InputError, match="accumulators: wanted integers from -2147483648"):
        rescale(np.array([2**31 + 1]), dyadic_for(1, 1))
    for wrong in (np.zeros(3), torch.zeros(3), np.zeros((), np.int32), np.zeros((2, 0), np.int32)):
        with pytest.raises(InputError, match="logits: wanted integers with a last axis of one or more, got"):
            shiftmax(wrong, shiftmax_for(0.1))
    for scale in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(InputError, match="scale: wanted a positive number"):
            shiftmax_for(scale)
    with pytest.raises(InputError, match="too fine for exponentials of 15 fraction bits"):
        shiftmax_for(1e-5, as_published=True)
    with pytest.raises(InputError, match="output_bits: wanted 2 to 16, got 17"):
        shiftmax_for(0.1, 17)
    with pytest.raises(InputError, match=r"scales: wanted finite ones other than 0, got 0\.0 to 1"):
        dyadic_for(0.0, 1)
    with pytest.raises(InputError, match="scales: wanted finite ones other than 0"):
        dyadic_for(1.0, 0)
    with pytest.raises(InputError, match=r"scales: wanted a ratio below 2\^30, got 1\.07374e\+09"):
        dyadic_for(2.0**30, 1)
    with pytest.raises(InputError, match=r"LayerNorm: wanted weight and bias of the same .* got \[2\] and \[3\]"):
        layer_norm_for(np.ones(2), np.ones(3))
    with pytest.raises(InputError, match="LayerNorm: wanted a finite weight"):
        layer_norm_for(np.array([1, math.nan]), np.ones(2))
    assert shiftmax(np.zeros((0, 3), np.int32), shiftmax_for(0.1)).shape == (0, 3)
