"""Packed weights: bytes by hand, the way back at every width, and what both engines unpack."""

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from denselab.export.integers import ActivationGrid, Site, StoredWeight, TableWeight, lowered
from denselab.export.packed_weights import byte_table, pack, packed_bytes, parts_of, unpack
from engines import run_everywhere

INPUTS, OUTPUTS = 24, 7
GRID = ActivationGrid(0.02, 120, 255)


def codes_of(bits: int, shape: tuple[int, ...] = (OUTPUTS, INPUTS)) -> np.ndarray:
    codes = np.random.default_rng(bits).integers(0, 2**bits, shape)
    codes.flat[:2] = 0, 2**bits - 1
    return codes


def linear(site: Site, shape: tuple[int, ...], read: Site | None = GRID) -> ModelProto:
    """x times the transposed weight, both marked, as a traced linear layer is."""
    nodes = [helper.make_node("Mark", ["w"], ["w_marked"], domain="denselab", key="w")]
    if read is not None:
        nodes.append(helper.make_node("Mark", ["x"], ["x_marked"], domain="denselab", key="x"))
    nodes.append(helper.make_node("Transpose", ["w_marked"], ["wt"], perm=[1, 0]))
    nodes.append(helper.make_node("MatMul", ["x" if read is None else "x_marked", "wt"], ["y"]))
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", shape[1]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", shape[0]])],
        [numpy_helper.from_array(np.zeros(shape, np.float32), "w")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("denselab", 1)]
    model = lowered(helper.make_model(graph, opset_imports=opsets, ir_version=10), {"w": site, "x": read or GRID})
    onnx.checker.check_model(model, full_check=True)
    return model


def as_read(x: np.ndarray, grid: ActivationGrid = GRID) -> np.ndarray:
    """By hand: what the codes of numbers stand for."""
    codes = np.clip(np.rint(x / np.float32(grid.scale)) + grid.zero_point, 0, grid.highest)
    return ((codes - grid.zero_point) * grid.scale).astype(np.float32)


def test_bytes_by_hand() -> None:
    # 3 bits: the upper two of 4 codes in a byte, the first lowest; then the lowest ones of 8 codes.
    codes = np.array([0b101, 0b110, 0b000, 0b011, 0b111])
    assert [each.tolist() for each in pack(codes, 3)] == [[0b01_00_11_10, 0b11], [0b11001]]
    assert [each.tolist() for each in pack(np.array([1, 15, 7]), 4)] == [[0xF1, 0x07]]
    assert [each.tolist() for each in pack(np.array([3, 0, 2, 1]), 2)] == [[0b01_10_00_11]]
    assert [parts_of(bits) for bits in (2, 3, 5, 6)] == [(2,), (2, 1), (4, 1), (4, 2)]
    assert byte_table(2)[0b01_10_00_11].tolist() == [3, 0, 2, 1]
    assert byte_table(1, 2)[0b11001].tolist() == [4, 0, 0, 4, 4, 0, 0, 0]


@pytest.mark.parametrize("bits", range(1, 7))
def test_codes_come_back_and_take_their_bits(bits: int) -> None:
    for count in (0, 1, 5, 8, 8 * 31):
        codes = np.random.default_rng(count).integers(0, 2**bits, count)
        packed = pack(codes, bits)
        assert unpack(packed, bits, count).tolist() == codes.tolist()
        assert sum(len(each) for each in packed) == packed_bytes(count, bits)
        if count % 8 == 0:
            assert packed_bytes(count, bits) == count * bits // 8
    assert packed_bytes(9, 7) == packed_bytes(9, 8) == 9


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("integer", [True, False])
def test_engines_unpack_every_width(bits: int, integer: bool) -> None:
    """Zero points apart, so that some of 7 and 8 bits leave a remainder, and a count that fills no byte.

    The codes of 8 bits are such that no processor saturates: it is what is written that is tested.
    """
    codes, rng = codes_of(bits), np.random.default_rng(1)
    scale = rng.uniform(0.01, 0.02, OUTPUTS).astype(np.float32)
    zero = rng.integers(0, 2**bits, OUTPUTS).astype(np.int32)
    weight = (codes - zero[:, None]) * scale[:, None]
    x = rng.standard_normal((3, INPUTS)).astype(np.float32)
    model = linear(StoredWeight(codes, bits, scale, zero, 0, integer), codes.shape, GRID if integer else None)
    wanted = (as_read(x) if integer else x) @ weight.T
    for engine, (got,) in run_everywhere(model, {"x": x}).items():
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4, err_msg=engine)


@pytest.mark.parametrize("channels", [1, OUTPUTS])
def test_engines_look_numbers_up(channels: int) -> None:
    """17 levels take 5 bits."""
    table = np.random.default_rng(0).standard_normal((channels, 17)).astype(np.float32)
    codes = np.random.default_rng(1).integers(0, 17, (OUTPUTS, INPUTS))
    weight = table[np.arange(OUTPUTS)[:, None] % channels, codes]
    x = np.random.default_rng(2).standard_normal((3, INPUTS)).astype(np.float32)
    model = linear(TableWeight(codes, 5, table, 0), codes.shape)
    for engine, (got,) in run_everywhere(model, {"x": x}).items():
        np.testing.assert_allclose(got, as_read(x) @ weight.T, rtol=1e-4, atol=1e-4, err_msg=engine)


@pytest.mark.parametrize("bits", [2, 3, 4, 7, 8])
def test_bytes_in_the_file(bits: int) -> None:
    """Measured from the file: it grows by the packed codes, nothing else."""

    def size(outputs: int) -> int:
        codes = codes_of(bits, (outputs, 256))
        ones, zero = np.ones(1, np.float32), np.full(1, 2 ** (bits - 1), np.int32)
        return len(linear(StoredWeight(codes, bits, ones, zero, 0, True), codes.shape).SerializeToString())

    assert size(256) - size(128) == pytest.approx(packed_bytes(128 * 256, bits), abs=32)
