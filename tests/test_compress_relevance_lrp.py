"""Relevance propagation: the public AttnLRP numbers, every rule by hand, and what adds up to what."""

import ast
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from denselab import _vision as _vision

# isort: split
from timm.models.vision_transformer import VisionTransformer

import denselab
from denselab.compress.graph import Axis, Graph, capture
from denselab.compress.relevance.lrp import Attention, LrpRules, lrp, lrp_graph
from denselab.compress.relevance.scores import gradient_times_activation, pixel_relevance
from denselab.compress.relevance.start import logit
from denselab.errors import InputError

pytestmark = pytest.mark.usefixtures("one_thread")

aten = torch.ops.aten
Function = Callable[[Tensor], Tensor]
ONE_SIZE: frozenset[Axis] = frozenset()
BATCHES = frozenset({Axis.BATCH})
ATTN, CP = LrpRules(), LrpRules(Attention.CP_LRP)


class Tape(fx.Interpreter):
    """One run that keeps the gradient of every tensor."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.tensors: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and value.requires_grad:
            value.retain_grad()
            self.tensors[n] = value
        return value

    def relevance(self, target: Any) -> list[Tensor]:
        """Value times gradient of all results of an operation that have one, in order."""
        found = [value for node, value in self.tensors.items() if node.target is target]
        return [(value * value.grad).detach() for value in found if value.grad is not None]


def golden_rules(kind: str) -> LrpRules:
    method, *gammas = kind.split("_")
    conv, linear = (float(each.lstrip("convli")) for each in gammas[1:]) if gammas else (None, None)
    return LrpRules(Attention.CP_LRP if method == "cp" else Attention.ATTN_LRP, conv, linear)


@pytest.fixture(scope="module")
def golden(shared_data: Path) -> dict[str, np.ndarray]:
    path = shared_data.parent / "golden" / "lrp.npz"
    if not path.is_file():
        pytest.skip(f"no golden fixture at {path}")
    return dict(np.load(path, allow_pickle=False))


@pytest.fixture(scope="module")
def golden_graph(golden: dict[str, np.ndarray]) -> Graph:
    cfg = json.loads(str(golden["cfg"]))
    sizes = {"img_size": cfg["img"], "patch_size": cfg["patch"], "embed_dim": cfg["dim"], "num_heads": cfg["heads"]}
    model = VisionTransformer(**sizes, depth=2, num_classes=10)
    model.load_state_dict({key[3:]: torch.tensor(golden[key]).float() for key in golden if key.startswith("sd.")})
    return capture(model, torch.tensor(golden["x"]), free=BATCHES)


GAMMAS = ("", "_gamma_conv0.25_lin0.05", "_gamma_conv100.0_lin0.0")


@pytest.mark.parametrize("kind", [method + gamma for gamma in GAMMAS for method in ("attnlrp", "cp")])
def test_public_relevance_is_reproduced(golden: dict[str, np.ndarray], golden_graph: Graph, kind: str) -> None:
    target = torch.tensor(golden["target"])[:, None]

    def start(logits: Tensor) -> Tensor:
        return logits.gather(1, target)[:, 0]

    graph = lrp_graph(golden_graph, golden_rules(kind))
    tape, x = Tape(graph.module), torch.tensor(golden["x"]).requires_grad_()
    logits = tape.run(x)
    np.testing.assert_allclose(logits.detach(), golden["logits"], atol=1e-5)
    start(logits).sum().backward()
    embed, _, block0, _, block1 = tape.relevance(aten.add.Tensor)
    found = {"input": x * x.grad, "patch_embed": tape.relevance(aten.transpose.int)[0]}
    found |= {"embed": embed, "block0": block0, "block1": block1}
    for part, relevance in found.items():
        wanted = golden[f"{kind}.R_{part}"]
        np.testing.assert_allclose(relevance.detach(), wanted, atol=1e-4 if "100" in kind else 1e-5, rtol=0)
    pixels = pixel_relevance(graph.run, torch.tensor(golden["x"]), start)
    torch.testing.assert_close(pixels, found["input"].sum(1).detach())
    if f"{kind}.patch_relevance" in golden:
        patches = F.avg_pool2d(pixels[:, None], 8)[:, 0] * 64
        np.testing.assert_allclose(patches, golden[f"{kind}.patch_relevance"], atol=1e-5, rtol=0)


def test_sites_add_up_to_what_the_public_relevance_adds_up_to(
    golden: dict[str, np.ndarray], golden_graph: Graph
) -> None:
    target = torch.tensor(golden["target"])
    batches = torch.tensor(golden["x"]).split(1)
    of_each = [lrp(golden_graph, [x], lambda out, t=t: out[:, t]) for x, t in zip(batches, target, strict=True)]
    signed = golden["attnlrp.R_input"].sum((1, 2, 3))
    for scores, total in zip(of_each, signed, strict=True):
        assert scores["patch_embed.proj/conv/input"].signed == pytest.approx(total, abs=1e-4)
    fc2 = of_each[0]["blocks.1.mlp.fc2/linear/input"], of_each[0]["blocks.1.mlp.fc2/linear/weight"]
    assert fc2[0].signed == pytest.approx(fc2[1].signed, abs=1e-5)  # the same messages, summed the other way
    parts = {part: of_each[0][f"blocks.1.attn/matmul/{part}"].signed for part in ("query", "key", "attention", "value")}
    assert parts["query"] == pytest.approx(parts["key"], abs=1e-5)
    assert parts["attention"] == pytest.approx(parts["value"], abs=1e-5)


class Of(nn.Module):
    """Functions as a model that returns the results of all."""

    def __init__(self, *functions: Function) -> None:
        super().__init__()
        self.functions = functions

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(function(x) for function in self.functions)


def input_relevances(
    functions: Sequence[Function], x: Tensor, rules: LrpRules = ATTN, weights: Tensor | float = 1.0
) -> list[tuple[Tensor, float]]:
    """Of every function the relevance of its input, and where it starts: f = sum(weights * function(x))."""
    model = Of(*functions)
    graph = lrp_graph(capture(model, x, free=ONE_SIZE), rules)
    leaf = x.clone().requires_grad_()
    found: list[tuple[Tensor, float]] = []
    for out, wanted in zip(graph.run(leaf), model(x), strict=True):
        torch.testing.assert_close(out, wanted)
        start = (out * weights).sum()
        (gradient,) = torch.autograd.grad(start, [leaf], retain_graph=True)
        found.append((x * gradient, start.item()))
    return found


X = torch.tensor([[1.0, -2.0, 0.5, 0.0]])


def test_functions_worked_by_hand() -> None:
    probs, ranks = X.softmax(1), torch.arange(4)
    worked: list[tuple[Function, Tensor]] = [
        (torch.relu, torch.relu(X)),
        (F.gelu, F.gelu(X)),
        (F.silu, F.silu(X)),
        (lambda x: F.gelu(x, approximate="tanh"), F.gelu(X, approximate="tanh")),
        (lambda x: x.pow(2), X**2),
        (torch.sigmoid, X.sigmoid() - 0.5),
        (torch.exp, X.exp() - 1),
        (lambda x: x.clamp(-1, 0.75), torch.tensor([[0.75, -1, 0.5, 0]])),
        (lambda x: 3 * x + 7, 3 * X),
        (lambda x: (2 * x) * (3 * x), 6 * X**2),
        (lambda x: x + 5.0 / (1 + x.square()), X),
        # f = sum_i i p_i has df/dx_i = p_i (i - f)
        (lambda x: x.softmax(1) * ranks, X * probs * (ranks - (probs * ranks).sum())),
        # x (0.5 + (s - 0.5)): all of the first to x, half of the second to x and half to the gate
        (lambda x: x * torch.sigmoid(2 * x), X * torch.sigmoid(2 * X)),
    ]
    found = input_relevances([function for function, _ in worked], X)
    for (_, wanted), (relevance, _) in zip(worked, found, strict=True):
        torch.testing.assert_close(relevance, wanted, atol=1e-6, rtol=1e-4)


def test_a_slope_stays_bounded_around_zero() -> None:
    near = torch.tensor([[1e-12, -1e-7, 1e-5, -1e-30]])
    for (relevance, _), slope in zip(
        input_relevances([torch.sigmoid, torch.exp, F.gelu], near), (0.25, 1.0, 0.5), strict=True
    ):
        torch.testing.assert_close(relevance / near, torch.full((1, 4), slope), atol=2e-3, rtol=0)


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.data = nn.Linear(4, 4), nn.Linear(4, 4)
        self.last = nn.Linear(4, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.gate(x).sigmoid() * self.data(x))


def test_a_gate_and_its_data_share_by_hand() -> None:
    torch.manual_seed(0)
    model = Gate()
    scores = lrp(capture(model, X, free=ONE_SIZE), [X], lambda out: out)
    with torch.no_grad():
        gate, data, last = model.gate(X), model.data(X), model.last.weight
        through = last * gate.sigmoid() * data
        always, gated = last * 0.5 * data, last * (gate.sigmoid() - 0.5) * data / 2
        of_data = (always + gated) * (1 - model.data.bias / data)  # the bias absorbs its share
        of_gate = gated * (1 - model.gate.bias / gate)
    for layer, wanted in (("last", through), ("data", of_data), ("gate", of_gate)):
        assert scores[f"{layer}/linear/input"].signed == pytest.approx(wanted.sum().item(), abs=1e-5)


RANDOM = torch.Generator().manual_seed(0)
MAPS, WEIGHTS = torch.randn(2, 1, 4, 3, 3, generator=RANDOM)
SCALE = torch.tensor([0.5, 2.0, -1.0, 1.5])
CONSERVING: list[Function] = [
    lambda x: F.layer_norm(x, (3, 3)),
    lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (4,), SCALE).permute(0, 3, 1, 2),
    lambda x: F.rms_norm(x, (3,)),
    lambda x: F.group_norm(x, 2, SCALE),
    lambda x: F.instance_norm(x, weight=SCALE, eps=1e-3),
    lambda x: F.batch_norm(x, torch.zeros(4), torch.full((4,), 2.0), SCALE),
    lambda x: F.normalize(x, dim=1),
    lambda x: x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6),
    lambda x: x * x.mean((2, 3), keepdim=True).relu(),
    lambda x: x * x.mean((2, 3), keepdim=True).sigmoid(),
    lambda x: x @ x.transpose(-2, -1),
    lambda x: F.grid_sample(x, x[:, :2].permute(0, 2, 3, 1).tanh(), align_corners=False),
    lambda x: F.interpolate(F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 2, 1), size=(3, 3), mode="bilinear"),
    lambda x: torch.maximum(x, 2 * x.flip(1)),
    lambda x: torch.where(x > 0.5, x, -x) + x.roll(1, 2),
    lambda x: F.conv2d(x, torch.ones(4, 4, 3, 3), padding=1).relu(),
]


def test_relevance_is_conserved_by_rule() -> None:
    for index, (relevance, start) in enumerate(input_relevances(CONSERVING, MAPS, weights=WEIGHTS)):
        assert relevance.sum().item() == pytest.approx(start, abs=1e-4), index


def test_a_norm_worked_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0, 6.0]])  # mean 3, centred -2 -1 3, variance 14 / 3
    last = torch.tensor([[0.0, 0.0, 1.0]])
    ((relevance, _),) = input_relevances([lambda x: F.layer_norm(x, (3,), eps=0.0)], x, weights=last)
    torch.testing.assert_close(relevance, torch.tensor([[-1.0, -2.0, 12.0]]) / 3 / (14 / 3) ** 0.5)


def test_gamma_worked_by_hand() -> None:
    x = torch.tensor([[2.0, -1.0]])
    worked = [
        ([1.0, 1.0], [4 / 3, -1 / 3]),  # z = 1: 2 (1 + 1) and -1 (1 + 0) of 3
        ([-1.0, 1.0], [-2.0, -1.0]),  # z = -3: 2 (-1 - 1) and -1 (1 + 1) of -6
        ([1.0, 2.0], [0.0, 0.0]),  # z = 0
    ]
    matrices = [torch.tensor([weight]) for weight, _ in worked]
    linear: list[Function] = [lambda x, w=w: F.linear(x, w) for w in matrices]
    convolutions: list[Function] = [lambda x, w=w: F.conv2d(x, w.view(1, 2, 1, 1)) for w in matrices]
    of_linear = input_relevances(linear, x, LrpRules(linear_gamma=1.0))
    of_convolutions = input_relevances(convolutions, x.view(1, 2, 1, 1), LrpRules(conv_gamma=1.0))
    for (_, wanted), (first, _), (second, _) in zip(worked, of_linear, of_convolutions, strict=True):
        torch.testing.assert_close(first.flatten(), torch.tensor(wanted), atol=1e-5, rtol=0)
        torch.testing.assert_close(second.flatten(), torch.tensor(wanted), atol=1e-5, rtol=0)


def test_gamma_with_a_bias_that_absorbs() -> None:
    x, matrix, bias = torch.tensor([[2.0, -1.0]]), torch.tensor([[1.0, 1.0]]), torch.tensor([0.5])
    ((got, start),) = input_relevances([lambda x: F.linear(x, matrix, bias)], x, LrpRules(linear_gamma=1.0))
    torch.testing.assert_close(got, start * torch.tensor([[4.0, -1.0]]) / (4 - 1 + 2 * 0.5), atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def plain() -> Graph:
    """A transformer without biases, class token and positions."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    model = VisionTransformer(**sizes, num_classes=4, class_token=False, global_pool="avg", pos_embed="none")
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
    return capture(model, torch.rand(2, 3, 16, 16), free=BATCHES)


PIXELS = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_conservation_through_a_transformer_without_constants(plain: Graph) -> None:
    """All of it with the attention map held constant; a softmax takes and adds some."""
    with torch.no_grad():
        start = logit(plain.run(PIXELS)).item()
    for rules, apart in ((CP, 1e-4), (LrpRules(Attention.CP_LRP, 0.25, 0.05), 1e-3), (ATTN, 0.05)):
        assert pixel_relevance(lrp_graph(plain, rules).run, PIXELS, logit).sum().item() == pytest.approx(
            start, rel=apart
        )


def test_constants_absorb_all_that_is_missing_in_a_transformer(
    golden: dict[str, np.ndarray], golden_graph: Graph
) -> None:
    graph, x = lrp_graph(golden_graph, CP), torch.tensor(golden["x"][:1]).requires_grad_()
    start = logit(graph.run(x)).sum()
    constants = [each for name, each in graph.module.named_parameters() if name.endswith(("bias", "token", "embed"))]
    of_input, *of_constants = torch.autograd.grad(start, [x, *constants], allow_unused=True, materialize_grads=True)
    absorbed = sum((value * g).sum().item() for value, g in zip(constants, of_constants, strict=True))
    assert (x * of_input).sum().item() + absorbed == pytest.approx(start.item(), rel=1e-4)
    assert abs(absorbed) > 0.1 * abs(start.item())


def test_conservation_through_a_convolutional_network_without_biases() -> None:
    torch.manual_seed(0)
    stem, norm, head = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1, bias=False)
    norm.running_var.copy_(torch.rand(8) + 0.5)
    model = nn.Sequential(stem, norm, nn.Hardswish(), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), head, nn.Flatten())
    pixels = torch.rand(1, 3, 8, 8)
    graph = capture(model, pixels, free=ONE_SIZE)
    with torch.no_grad():
        start = logit(graph.run(pixels)).item()
    for rules in (ATTN, LrpRules(conv_gamma=0.25)):
        scores = lrp(graph, [pixels], logit, rules)
        for key in ("0/conv/input", "0/conv/weight", "5/conv/input"):
            assert scores[key].signed == pytest.approx(start, rel=1e-3)


def test_cp_leaves_queries_and_keys_nothing(plain: Graph) -> None:
    for key, score in lrp(plain, [PIXELS], logit, CP).items():
        assert (score.magnitude == 0) == (key.rpartition("/")[2] in ("query", "key"))


def test_the_model_itself_keeps_its_gradient(plain: Graph) -> None:
    before = gradient_times_activation(plain, [PIXELS], logit)
    lrp(plain, [PIXELS], logit)
    assert gradient_times_activation(plain, [PIXELS], logit) == before


@pytest.mark.parametrize(
    ("function", "operator"),
    [(lambda x: (x + 5).log(), "aten.log.default"), (lambda x: 2.0**x, "aten.pow.Scalar")],
)
def test_an_operation_without_a_rule_is_named(function: Function, operator: str) -> None:
    graph = capture(nn.Sequential(nn.ReLU(), Of(function)), X, free=ONE_SIZE)
    with pytest.raises(InputError, match=f"no rule for {operator} in the module '1', which is not linear"):
        lrp_graph(graph)


def test_gammas_are_checked() -> None:
    with pytest.raises(InputError, match="conv_gamma: wanted a finite number from 0 up, or None, got -1"):
        LrpRules(conv_gamma=-1)


def test_nothing_needs_it() -> None:
    """It is patented for some uses: who imports it does so only when asked to run it."""
    package = Path(denselab.__file__).parent
    importing = {
        (path.relative_to(package).as_posix(), node in tree.body)
        for path in package.rglob("*.py")
        for tree in (ast.parse(path.read_text()),)
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        and "relevance.lrp" in ast.unparse(node).replace(" import ", ".")
    }
    assert importing == {
        ("explain/heat.py", False),
        ("compress/measure_losses.py", False),
        ("compress/stages.py", False),
    }
