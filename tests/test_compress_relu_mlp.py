"""MLPs with ReLU: which are found, what stays, and that training brings the answer back."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress_models import SmallNetwork, captured, images, small_graph
from denselab.compress.graph import Graph
from denselab.compress.methods.method import Calibration
from denselab.compress.methods.min_max import MIN_MAX
from denselab.compress.observing import observe
from denselab.compress.plan import QuantPlan, equal_bits
from denselab.compress.relu_mlp import gelu_mlps, reconstruct_relu_mlps
from denselab.compress.sites import Source
from denselab.errors import InputError

pytestmark = pytest.mark.usefixtures("one_thread")

PIXELS = images(8)
CALIBRATION = Calibration((PIXELS[:4], PIXELS[4:]))
WIDTH = 8


class Mlps(nn.Module):
    """One MLP behind a norm of its own, of tanh GELU and without a bias; then all sorts that are none."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 4, stride=4)
        self.norm = nn.LayerNorm(WIDTH)
        self.widen, self.narrow = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH, bias=False)
        self.shared, self.gate = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.stem(pixels).flatten(2).transpose(1, 2)
        x = x + self.narrow(F.gelu(self.widen(self.norm(x)), approximate="tanh"))
        x = self.shared(F.gelu(self.shared(x)))
        tapped = F.gelu(self.gate(x))
        return self.head(tapped * x).mean(1)


def mlps_graph() -> tuple[Mlps, Graph]:
    torch.manual_seed(0)
    model = Mlps().eval()
    return model, captured(model)


def with_relu(model: SmallNetwork, pixels: Tensor, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(nn.functional, "gelu", torch.relu)
        return model(pixels)


def error(graph: Graph, other: Graph) -> float:
    pixels = images(32, seed=1)
    with torch.no_grad():
        wanted, got = (each if isinstance(each, Tensor) else each[0] for each in (graph.run(pixels), other.run(pixels)))
    return ((got - wanted).norm() / wanted.norm()).item()


def test_which_are_found() -> None:
    _, graph = mlps_graph()
    (mlp,) = gelu_mlps(graph)
    assert mlp.norm is not None
    assert len(mlp.parameters) == 5  # weight and bias of norm and layers, one of which has no bias
    (tapped,) = gelu_mlps(small_graph()[1])
    assert tapped.norm is None  # what it reads is an answer of the network too
    assert len(tapped.parameters) == 4


def test_untrained_it_is_the_network_with_relu(monkeypatch: pytest.MonkeyPatch) -> None:
    model, graph = small_graph()
    changed = reconstruct_relu_mlps(graph, CALIBRATION, steps=0)
    for wanted, got in zip(with_relu(model, PIXELS, monkeypatch), changed.run(PIXELS), strict=True):
        torch.testing.assert_close(got, wanted)


def test_sites_stay_but_files_of_the_network_with_gelu_are_refused() -> None:
    graph = small_graph()[1]
    changed = reconstruct_relu_mlps(graph, CALIBRATION, steps=0)
    different = [
        (site.key, site.made_by, old.made_by)
        for site, old in zip(changed.sites, graph.sites, strict=True)
        if site != old
    ]
    assert different == [("narrow/linear/input", Source.RELU, Source.GELU)]
    plan = QuantPlan.make(graph, MIN_MAX.name, MIN_MAX.spec, equal_bits(graph, 8, 8))
    with pytest.raises(InputError, match="wanted a file made for this model"):
        MIN_MAX.quantize(changed, observe(graph, [PIXELS]), plan, CALIBRATION)
    for_changed = replace(plan, model=changed.model)
    with pytest.raises(InputError, match="stats: wanted a file made for this model"):
        MIN_MAX.quantize(changed, observe(graph, [PIXELS]), for_changed, CALIBRATION)
    quantized = MIN_MAX.quantize(changed, observe(changed, [PIXELS]), for_changed, CALIBRATION)
    assert quantized.quantizers.keys() == plan.specs.keys()


@pytest.mark.parametrize("tapped", [False, True])
def test_training_brings_the_answer_back_and_leaves_the_model(tapped: bool) -> None:
    model, graph = small_graph() if tapped else mlps_graph()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    said: list[str] = []
    calibration = replace(CALIBRATION, say=said.append)
    untrained = reconstruct_relu_mlps(graph, calibration, steps=0)
    trained = reconstruct_relu_mlps(graph, calibration, steps=150, rate=3e-3, tokens_per_step=64)
    assert error(graph, trained) < 0.7 * error(graph, untrained)
    assert [each.partition(",")[0] for each in said] == ["ReLU: MLP 1 of 1"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    moved = {
        name for name, value in trained.module.named_parameters() if not torch.equal(value, before.get(name, value))
    }
    norm = set() if tapped else {"norm.weight", "norm.bias"}
    assert moved == norm | {"widen.weight", "widen.bias", "narrow.weight"} | ({"narrow.bias"} if tapped else set())
    again = reconstruct_relu_mlps(graph, calibration, steps=150, rate=3e-3, tokens_per_step=64)
    assert error(trained, again) == 0


def test_without_such_mlps_nothing_changes() -> None:
    torch.manual_seed(0)
    graph = captured(nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Conv2d(4, 4, 3)).eval())
    assert reconstruct_relu_mlps(graph, CALIBRATION) is graph


def test_an_answer_that_does_not_change_asks_for_nothing_but_the_output() -> None:
    graph = small_graph()[1]
    flat = replace(CALIBRATION, change=lambda output, wanted: 0 * output[0].sum(dim=1))
    trained = reconstruct_relu_mlps(graph, flat, steps=20, rate=1e-3, tokens_per_step=16)
    assert all(value.isfinite().all() for value in trained.run(PIXELS))


def test_refusals() -> None:
    graph = small_graph()[1]
    with pytest.raises(InputError, match="calibration: wanted the images that were observed, got none"):
        reconstruct_relu_mlps(graph, Calibration(()), steps=1)
