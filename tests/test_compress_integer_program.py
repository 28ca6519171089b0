"""Whole networks as integers: no float anywhere, the same bits from numpy, torch and the engine, near the model."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from denselab import _vision as _vision

# isort: split
import timm

from compress_models import SIDE_PX, captured, images, small_graph
from denselab.compress.fold_norms import fold_norms
from denselab.compress.graph import Axis, capture
from denselab.compress.integer.arrays import INT32_MOST
from denselab.compress.integer.build import build_program
from denselab.compress.integer.builder import Calibrated, magnitudes
from denselab.compress.integer.program import Code, Conv, IntegerProgram, Linear, Requantize, evaluate
from denselab.compress.integer.program_onnx import ProgramFile, program_to_onnx, write_program
from denselab.compress.integer.shiftmax import Shiftmax
from denselab.compress.methods.i_vit import I_VIT
from denselab.compress.methods.method import Calibration
from denselab.compress.observing import observe
from denselab.errors import InputError

pytestmark = pytest.mark.usefixtures("one_thread")

INTEGER_TYPES = {
    onnx.TensorProto.INT8,
    onnx.TensorProto.INT16,
    onnx.TensorProto.INT32,
    onnx.TensorProto.INT64,
    onnx.TensorProto.UINT32,
    onnx.TensorProto.BOOL,
}


def program_of(model: nn.Module, side_px: int = SIDE_PX) -> IntegerProgram:
    graph = fold_norms(captured(model.eval(), side_px=side_px))
    pixels = images(16, side_px=side_px)
    return I_VIT.quantize(graph, observe(graph, [pixels]), Calibration((pixels,)))


def learned(model: nn.Module) -> nn.Module:
    """Parameters as large as after training, so that every part of a network counts."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim == 1:
                about = 1.0 if name.endswith("weight") or "gamma" in name else 0.0
                value.copy_(about + 0.3 * torch.randn(value.shape, generator=generator))
            else:
                value.copy_(torch.randn(value.shape, generator=generator) / value[0].numel() ** 0.5)
    return model


def tiny_vit(**other: object) -> nn.Module:
    sizes = {"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": SIDE_PX, "patch_size": 4, **other}
    return learned(timm.create_model("vit_tiny_patch16_224", num_classes=5, **sizes))


def tiny_swin() -> nn.Module:
    sizes = {"embed_dim": 16, "depths": (2, 1), "num_heads": (2, 2), "img_size": 32, "window_size": 4}
    return learned(timm.create_model("swin_tiny_patch4_window7_224", num_classes=5, **sizes))


class TinyConvNet(nn.Module):
    """Strides, padding, dilation, groups, pools, a roll, halves of channels, and what is subtracted."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, (3, 1), padding=(2, 0), dilation=(2, 1), groups=4)
        self.head = nn.Linear(8, 5, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        x = F.max_pool2d(self.norm(self.stem(pixels * 2 - 1)).relu(), 3, stride=2, padding=1)
        first, second = (x - F.pad(self.grouped(x), (0, 0)) * 0.5).roll((1, -1), (2, 3)).chunk(2, 1)
        x = torch.cat((F.avg_pool2d(second, 2), F.avg_pool2d(first, 2)), 1)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


NETWORKS = {
    "vit": (tiny_vit, SIDE_PX),
    "vit with means, layer scale, norms of queries, tanh": (
        lambda: tiny_vit(
            depth=1,
            class_token=False,
            global_pool="avg",
            init_values=0.5,
            qk_norm=True,
            act_layer=lambda: nn.GELU("tanh"),
        ),
        SIDE_PX,
    ),
    "swin": (tiny_swin, 32),
    "cnn": (lambda: learned(TinyConvNet()), SIDE_PX),
}


@cache
def programmed(name: str) -> tuple[nn.Module, IntegerProgram]:
    build, side_px = NETWORKS[name]
    model = build()
    return model, program_of(model, side_px)


@pytest.mark.parametrize("name", NETWORKS)
def test_numpy_torch_and_the_engine_give_the_same_integers(name: str, tmp_path: Path) -> None:
    model, program = programmed(name)
    side_px = NETWORKS[name][1]
    pixels = images(5, seed=1, side_px=side_px)
    codes = program.image_code.stored(pixels.numpy())
    assert codes.dtype == (np.int16 if name == "cnn" else np.int8)
    by_torch = dict(program.values(torch.from_numpy(codes)))
    for step, value in program.values(codes):
        assert value.dtype == np.int32, step
        assert by_torch[step].dtype == torch.int32, step
        np.testing.assert_array_equal(by_torch[step].numpy(), value, err_msg=step)
    logits = program.run(codes)
    assert logits.shape == (5, 5)

    write_program(program, tmp_path / "program.onnx")
    file = ProgramFile(tmp_path / "program.onnx", threads=1)
    for some in (codes, codes[:1], np.full_like(codes, program.image_code.most), np.zeros_like(codes)):
        np.testing.assert_array_equal(file.run(some), program.run(some))
    with torch.no_grad():
        wanted, got = model(pixels), program.as_module()(pixels)
    assert got.dtype == torch.float32
    torch.testing.assert_close(file.as_module()(pixels), got, rtol=0, atol=0)
    assert (got - wanted).norm() < 0.06 * wanted.norm()
    assert (got - wanted).norm() < 0.5 * (wanted - wanted.mean(0)).norm()  # much less than what images change


def test_the_file_holds_integers_alone() -> None:
    model = program_to_onnx(programmed("vit")[1])
    onnx.checker.check_model(model, full_check=True)
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    values = [*graph.value_info, *graph.input, *graph.output]
    assert len(values) > 500
    assert {value.type.tensor_type.elem_type for value in values} <= INTEGER_TYPES
    assert {value.data_type for value in graph.initializer} <= INTEGER_TYPES
    operators = [node.op_type for node in graph.node]
    assert operators.count("MatMulInteger") == 2 * 6 + 1
    assert operators.count("ConvInteger") == 1


def test_products_read_8_bits_and_nothing_is_requantized_twice() -> None:
    program = programmed("vit")[1]
    made_by = {step.output: step.operation for step in program.steps}
    kinds = [type(step.operation).__name__ for step in program.steps]
    # query, key, value, map and the outputs of both norms, of GELU and of attention, then GELU's input and the parts
    # that move on in 16 bits: the joint layer of queries, keys and values
    assert kinds.count("Requantize") == 2 * 10 + 3
    assert kinds.count("Shiftmax") == kinds.count("ShiftGELU") == 2
    assert kinds.count("IntegerLayerNorm") == 5
    for step in program.steps:
        before = [made_by.get(name) for name in step.inputs]
        assert not (isinstance(step.operation, Requantize) and isinstance(before[0], Requantize)), step.output
        if isinstance(step.operation, Linear):
            assert np.abs(step.operation.weight.astype(int)).max() == 127
        if isinstance(step.operation, Shiftmax):  # sums of products as they are
            assert "MatMul" in str(before[0])


def test_codes_by_hand() -> None:
    code = Code(0.5, 8)
    assert code.of(np.array([0.25, 0.75, -0.25, -0.75, 64.0, -65.0])).tolist() == [0, 2, 0, -2, 127, -128]
    assert Code(2.0, 16).stored(np.array([-1e9, 3.0])).tolist() == [-32768, 2]
    assert (code.stored(np.zeros(1)).dtype, Code(2.0, 16).stored(np.zeros(1)).dtype) == (np.int8, np.int16)


class Halves(nn.Module):
    """What one layer makes of an image of two numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        with torch.no_grad():
            self.layer.weight.copy_(torch.tensor([[1.0, 0.0], [0.5, -2.0]]))
            self.layer.bias.copy_(torch.tensor([0.0, 1.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_a_layer_by_hand() -> None:
    graph = capture(Halves(), torch.tensor([[1.0, -1.0]]), free=frozenset({Axis.BATCH}))
    key = "layer/linear/input"
    program = build_program(graph, Calibrated({key: 0.01}, magnitudes(graph, [torch.ones(2, 2)])))
    layer = program.steps[0].operation
    assert isinstance(layer, Linear)
    assert layer.weight.tolist() == [[127, 0], [32, -127]]  # of scales 1/127 and 2/127
    assert layer.bias.tolist() == [0, round(1 / (0.01 * 2 / 127))]
    codes = program.image_code.stored(np.array([[1.0, -0.5]]))
    assert codes.tolist() == [[100, -50]]
    assert program.logit_scale == pytest.approx(0.01 * 2 / 127)
    # 127 * 100 at half the scale of the logits; 32 * 100 + 127 * 50 + 6350
    assert program.run(codes).tolist() == [[6350, 15900]]
    assert program.logits(np.array([[1.0, -0.5]]))[0].tolist() == pytest.approx([1.0, 2.5], abs=0.01)


@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "groups"),
    [((1, 1), (0, 0), (1, 1), 1), ((2, 3), (1, 2), (1, 1), 2), ((1, 2), (2, 0), (2, 1), 4)],
)
def test_convolutions_are_those_of_torch(
    stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int], groups: int
) -> None:
    rng = np.random.default_rng(0)
    x, weight = (
        rng.integers(-128, 128, (2, 4, 7, 9), np.int32),
        rng.integers(-127, 128, (8, 4 // groups, 3, 2), np.int8),
    )
    bias = rng.integers(-(2**20), 2**20, 8, np.int32)
    conv = Conv(weight, bias, stride, padding, dilation, groups)
    wanted = F.conv2d(
        *(torch.from_numpy(each).double() for each in (x, weight, bias)), stride, padding, dilation, groups
    )
    np.testing.assert_array_equal(evaluate(conv, [x], x), wanted.numpy())
    found = evaluate(conv, [torch.from_numpy(x)], torch.from_numpy(x))
    assert found.dtype == torch.int32
    np.testing.assert_array_equal(found.numpy(), wanted.numpy())


def test_what_never_changes_and_what_is_tiny() -> None:
    """Weights of zero beside a large bias, a norm and a layer scale without a channel, images of one colour."""
    model = tiny_vit(depth=1, init_values=1.0)
    with torch.no_grad():
        block = model.get_submodule("blocks.0")
        block.get_parameter("mlp.fc1.weight")[0] = 0
        block.get_parameter("mlp.fc1.weight")[1] = 1e-12
        block.get_parameter("mlp.fc1.bias")[:2] = 2
        block.get_parameter("norm1.weight")[:3] = 0
        block.get_parameter("ls1.gamma")[:2] = torch.tensor([0.0, -1.0])
    program = program_of(model)
    for step, value in program.values(np.zeros((2, 3, SIDE_PX, SIDE_PX), np.int8)):
        assert np.abs(value.astype(np.int64)).max() <= INT32_MOST, step
    pixels = images(4, seed=1)
    with torch.no_grad():
        wanted = model(pixels)
    assert (torch.from_numpy(program.logits(pixels.numpy())) - wanted).norm() < 0.06 * wanted.norm()


def test_a_network_of_zeros() -> None:
    model = TinyConvNet()
    with torch.no_grad():
        for value in model.parameters():
            value.zero_()
    program = program_of(model)
    assert not program.run(program.image_code.stored(images(2).numpy())).any()


def test_a_program_of_one_image() -> None:
    class OneImage(nn.Module):
        """Tied to a batch of one."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3 * SIDE_PX, 5)

        def forward(self, pixels: Tensor) -> Tensor:
            return self.layer(pixels.reshape(1, SIDE_PX, -1)).mean(1)

    graph = capture(OneImage(), images(1), free=frozenset())
    pixels = images(16)
    program = I_VIT.quantize(graph, observe(graph, [pixels]), Calibration((pixels,)))
    assert (program.images, program.logit_shape) == (1, (1, 5))
    codes = program.image_code.stored(images(1, seed=1).numpy())
    assert program.run(codes).shape == (1, 5)
    with pytest.raises(InputError, match=r"codes: wanted images \[1, 3, 16, 16\], got \[2, 3, 16, 16\]"):
        program.run(np.repeat(codes, 2, 0))


def test_wrong_images_are_refused(tmp_path: Path) -> None:
    program = programmed("cnn")[1]
    codes = program.image_code.stored(images(2).numpy())
    with pytest.raises(InputError, match=r"codes: wanted images \['B', 3, 16, 16\], got \[2, 3, 16, 8\]; resize them"):
        program.run(codes[..., :8])
    with pytest.raises(InputError, match="codes: wanted int16, got float64"):
        program.run(codes.astype(np.float64))
    path = tmp_path / "program.onnx"
    write_program(program, path)
    with pytest.raises(InputError, match=r"codes: the program does not run on int16 \[2, 3, 16, 8\]"):
        ProgramFile(path).run(codes[..., :8])
    model = onnx.load(path)
    model.metadata_props[0].value = model.metadata_props[0].value.replace("image_bits", "bits")
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(InputError, match=r"other\.onnx: wanted an integer program, but it lacks 'image_bits'"):
        ProgramFile(tmp_path / "other.onnx")
    path.write_bytes(path.read_bytes()[:999])
    with pytest.raises(InputError, match=r"program\.onnx: wanted an integer program, but it is damaged"):
        ProgramFile(path)
    with pytest.raises(InputError, match=r"none\.onnx: cannot be read"):
        ProgramFile(tmp_path / "none.onnx")


class With(nn.Module):
    """A layer, and an operation on what it makes."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.layer, self.part, self.head = nn.Linear(SIDE_PX, 8), part, nn.LazyLinear(5)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.part(self.layer(pixels)))


class Gate(nn.Module):
    """A value times itself."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x


class Causal(nn.Module):
    """Minus infinity beside numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return (x + torch.full((x.shape[-1],) * 2, -torch.inf).triu(1)[-2]).softmax(-1)


REFUSED = {
    "sigmoid": (nn.Sigmoid(), r"I-ViT cannot run aten\.sigmoid\.default in the module 'part' in integers: it has no"),
    "gate": (Gate(), r"aten\.mul\.Tensor in the module 'part' in integers: wanted a constant factor, got two values"),
    "softmax": (nn.Softmax(1), r"aten\.softmax\.int in the module 'part' in integers: wanted a softmax over the last"),
    "norm": (
        nn.LayerNorm((SIDE_PX, 8)),
        r"aten\.layer_norm\.default .*wanted a norm over the last axis, got one over 2",
    ),
    "mask": (Causal(), r"wanted finite numbers, got NaN or infinity from aten\.\w+\.\w+ in the module 'part'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_integer_form_is_refused_by_name(name: str) -> None:
    part, message = REFUSED[name]
    model = With(part).eval()
    model(images(2))
    with pytest.raises(InputError, match=message):
        program_of(model)


def test_other_than_classifiers_are_refused() -> None:
    _, graph = small_graph()
    pixels = images(8)
    stats = observe(graph, [pixels])
    with pytest.raises(InputError, match="wanted one output, the logits of a classifier, got 2"):
        I_VIT.quantize(graph, stats, Calibration((pixels,)))
    with pytest.raises(InputError, match="images: wanted at least one to calibrate with, got none"):
        I_VIT.quantize(graph, stats, Calibration(()))
    other = replace(stats, model=replace(stats.model, architecture="another"))
    with pytest.raises(InputError, match="stats: wanted a file made for this model"):
        I_VIT.quantize(graph, other, Calibration((pixels,)))
