"""Observing: extremes against hooks of torch, the sample against numpy, files, and images that cannot be used."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compress_models import HEADS, WIDTH, SmallNetwork, images, small_graph
from denselab.compress.graph import Graph, capture
from denselab.compress.observing import FEWEST_ROWS, Stats, observe, weights
from denselab.compress.plan import Granularity, finest, kept_axes
from denselab.compress.sites import ModelHash, Operand
from denselab.errors import InputError

pytestmark = pytest.mark.usefixtures("one_thread")

FC1 = "widen/linear/input"


@pytest.fixture(scope="module")
def model() -> SmallNetwork:
    return small_graph()[0]


@pytest.fixture(scope="module")
def graph() -> Graph:
    return small_graph()[1]


@pytest.fixture(scope="module")
def stats(graph: Graph) -> Stats:
    return observe(graph, images(12).split(5))


def inputs_of(model: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
    """What every linear layer and convolution reads, by torch's own hooks."""
    seen: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    ]
    with torch.no_grad():
        model(pixels)
    for handle in handles:
        handle.remove()
    return seen


def test_extremes_are_those_that_modules_read(model: SmallNetwork, graph: Graph, stats: Stats) -> None:
    read = inputs_of(model, images(12))
    layers = [site for site in graph.sites if site.operand is Operand.INPUT]
    assert len(layers) == len(read) == 9
    for site in layers:
        x = read[site.module]
        assert site.channel_axis is not None
        seen, others = stats.sites[site.key], [dim for dim in range(x.ndim) if dim != site.channel_axis]
        torch.testing.assert_close(seen.low, x.amin(others), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(seen.high, x.amax(others), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.stack(seen.extremes()), torch.stack([x.min(), x.max()]), rtol=1e-5, atol=1e-5)
        low, _ = seen.extremes((site.channel_axis,))
        assert low.shape == torch.Size(n if dim == site.channel_axis else 1 for dim, n in enumerate(x.shape))
    assert stats.images == 12


def test_attention_is_seen_per_head(graph: Graph, stats: Stats) -> None:
    site = next(site for site in graph.sites if site.operand is Operand.ATTENTION)
    assert finest(site) is Granularity.PER_HEAD
    assert kept_axes(site, Granularity.PER_HEAD) == (1,)
    maps: list[Tensor] = []
    graph.run(images(12), hooks={site.key: lambda x: maps.append(x) or x})
    torch.testing.assert_close(stats.sites[site.key].high, maps[0].amax((0, 2, 3)), rtol=1e-5, atol=1e-6)
    assert stats.sites[site.key].high.shape == (HEADS,)
    with pytest.raises(InputError, match=r"wanted the granularity per_head or per_tensor, got per_channel"):
        kept_axes(site, Granularity.PER_CHANNEL)


def test_a_large_enough_sample_is_all_there_was(model: SmallNetwork, stats: Stats) -> None:
    seen, x = stats.sites[FC1], inputs_of(model, images(12))["widen"]
    assert seen.seen == len(seen.rows) == 12 * 16
    for share in (0.05, 0.5, 0.99):
        wanted = np.quantile(x.flatten(0, 1).numpy(), share, axis=0)
        np.testing.assert_allclose(np.quantile(seen.rows.numpy(), share, axis=0), wanted, rtol=1e-4, atol=1e-5)
    assert seen.values().shape == (192, 1, WIDTH)
    assert torch.equal(seen.values()[:, 0], seen.rows)


def test_a_sample_is_bounded_even_and_seeded(graph: Graph) -> None:
    # Each batch is a constant image of its own, so that a row of the first input tells which batch it came from.
    key, batches = "stem/conv/input", 4
    of_batches = [torch.full((8, 3, 16, 16), float(number)) for number in range(batches)]
    found = observe(graph, of_batches, sampled=0).sites[key]
    assert found.seen == batches * 8 * 256
    assert found.rows.shape == (FEWEST_ROWS, 3)
    shares = found.rows[:, 0].long().bincount(minlength=batches) / FEWEST_ROWS
    assert (shares - 1 / batches).abs().max() < 0.08
    again, other = (observe(graph, of_batches, sampled=0, seed=seed).sites[key] for seed in (0, 1))
    assert torch.equal(found.rows, again.rows)
    assert not torch.equal(found.rows, other.rows)


def test_readers_of_one_tensor_share_what_was_seen(stats: Stats, graph: Graph) -> None:
    assert stats.sites["query/linear/input"] is stats.sites["key/linear/input"]
    assert stats.sites.keys() == {site.key for site in graph.sites if not site.is_weight}


def test_saved_and_read_back(tmp_path: Path, graph: Graph, stats: Stats) -> None:
    path = tmp_path / "stats.safetensors"
    stats.write(path)
    found = Stats.read(path, graph.model)
    assert found.images == stats.images
    assert found.sites.keys() == stats.sites.keys()
    for key, seen in stats.sites.items():
        other = found.sites[key]
        assert (other.axis, other.dimensions, other.seen) == (seen.axis, seen.dimensions, seen.seen)
        assert all(torch.equal(getattr(other, name), getattr(seen, name)) for name in ("low", "high", "rows"))
    assert found.sites["query/linear/input"] is found.sites["key/linear/input"]


def test_files_of_other_models_are_refused(tmp_path: Path, graph: Graph, stats: Stats) -> None:
    path = tmp_path / "stats.safetensors"
    stats.write(path)
    with pytest.raises(InputError, match=r"stats.safetensors: wanted a file made for this model"):
        Stats.read(path, ModelHash("another", graph.model.values))
    with pytest.raises(InputError, match=r"stats.safetensors: the model's weights changed"):
        Stats.read(path, ModelHash(graph.model.architecture, "trained"))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match=r"stats.safetensors: wanted statistics of a model, but it is damaged"):
        Stats.read(path, graph.model)
    with pytest.raises(InputError, match=r"none.safetensors: cannot be read"):
        Stats.read(tmp_path / "none.safetensors", graph.model)


def broken(pixels: Tensor) -> Tensor:
    pixels[1, 0, 0, 0] = torch.nan
    return pixels


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (lambda: [], "wanted at least 8 to calibrate with, got none"),
        (lambda: [images(7)], "wanted at least 8 to calibrate with, got 7; add images"),
        (
            lambda: [images(8), broken(images(8))],
            "stem/conv/input: wanted finite numbers, got NaN or infinity for the ",
        ),
        (lambda: [images(8, side_px=24)], "inputs: wanted shapes like 2x3x16x16 with batch free to change"),
    ],
)
def test_images_that_cannot_be_used(graph: Graph, batches: Callable[[], list[Tensor]], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        observe(graph, batches())


def test_a_graph_tied_to_its_batch_is_fed_as_many() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    graph = capture(model, torch.rand(2, 3, 2, 2), free=frozenset())
    pixels = images(8, side_px=2)
    seen = observe(graph, [pixels]).sites["1/linear/input"]
    assert torch.equal(seen.high, pixels.flatten(1).amax(0))


def test_weights(model: SmallNetwork, graph: Graph) -> None:
    found = weights(graph)
    assert len(found) == 9
    assert torch.equal(found["head/linear/weight"], model.head.weight)
