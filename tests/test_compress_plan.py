"""Plans: what they say of every site, their file, and what is refused of one that was edited by hand."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compress_models import small_graph
from denselab.compress.allocate import Group, Option, allocate
from denselab.compress.budgets import MeanBits
from denselab.compress.graph import Graph
from denselab.compress.methods.min_max import MIN_MAX
from denselab.compress.methods.repq_vit import REPQ_VIT
from denselab.compress.plan import (
    Granularity,
    Grid,
    Kept,
    QuantPlan,
    QuantSpec,
    allocated_bits,
    equal_bits,
    exact_everywhere,
    kept_sites,
    wide_weights,
)
from denselab.errors import InputError

pytestmark = pytest.mark.usefixtures("one_thread")

ATTENTION, HEAD = "/matmul/attention", {"head/linear/input", "head/linear/weight"}


@pytest.fixture(scope="module")
def graph() -> Graph:
    return small_graph()[1]


@pytest.fixture(scope="module")
def plan(graph: Graph) -> QuantPlan:
    return QuantPlan.make(graph, REPQ_VIT.name, REPQ_VIT.spec, equal_bits(graph, 4, 6))


def test_bits(graph: Graph) -> None:
    bits = equal_bits(graph, 4, 6)
    assert bits.keys() == {site.key for site in graph.sites}
    at_8 = {key for key, each in bits.items() if each == 8}
    # The second output is the norm before the block's MLP: `project` is the last product that leads to it.
    assert at_8 == {"stem/conv/input", *HEAD, "project/linear/input", "project/linear/weight"}
    assert bits["widen/linear/weight"] == 4
    assert bits["widen/linear/input"] == 6
    assert set(equal_bits(graph, 4, 4, kept=()).values()) == {4}
    assert kept_sites(graph, [Kept.FIRST_WEIGHT]) == {"stem/conv/weight"}


def test_weights_of_8_bits_are_named_and_7_are_exact_everywhere(graph: Graph) -> None:
    bits = equal_bits(graph, 8, 8)
    exact = exact_everywhere(graph, bits)
    assert {key: each for key, each in exact.items() if each != 7} == {
        site.key: 8 for site in graph.sites if not site.is_weight
    }
    assert exact_everywhere(graph, equal_bits(graph, 4, 6))["widen/linear/weight"] == 4
    wide, narrow = (QuantPlan.make(graph, MIN_MAX.name, MIN_MAX.spec, each) for each in (bits, exact))
    assert wide_weights(graph, wide) == tuple(site.key for site in graph.sites if site.is_weight)
    assert wide_weights(graph, narrow) == ()


def test_what_methods_do_with_each_kind(graph: Graph, plan: QuantPlan) -> None:
    assert plan.specs[ATTENTION] == QuantSpec(6, Grid.LOG_SQRT2)
    assert plan.specs["widen/linear/weight"] == QuantSpec(4, Grid.UNIFORM, Granularity.PER_CHANNEL)
    assert plan.specs["widen/linear/input"] == QuantSpec(6)
    plain = QuantPlan.make(graph, MIN_MAX.name, MIN_MAX.spec, equal_bits(graph, 4, 6))
    assert plain.specs[ATTENTION] == QuantSpec(6)
    assert plain.specs["widen/linear/weight"].symmetric


def test_file_has_one_line_per_site(tmp_path: Path, graph: Graph, plan: QuantPlan) -> None:
    path = tmp_path / "plan.json"
    plan.write(path)
    lines = path.read_text().splitlines()
    line = '    "widen/linear/input": {"bits": 6, "grid": "uniform", "granularity": "per_tensor", "symmetric": false},'
    assert line in lines
    assert sum('"bits"' in each for each in lines) == len(graph.sites)
    assert '  "kept_at_8_bits": ["first input", "head"],' in lines
    assert QuantPlan.read(path, graph.site_list()) == plan
    changed = replace(plan, specs={**plan.specs, "widen/linear/input": QuantSpec(3)})
    changed.write(path)
    assert len(set(lines) ^ set(path.read_text().splitlines())) == 2


def edited(edit: Callable[[dict[str, Any]], object]) -> Callable[[str], str]:
    def changed(text: str) -> str:
        data = json.loads(text)
        edit(data)
        return json.dumps(data)

    return changed


SITE = "widen/linear/input"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda text: text.replace("widen/linear/input", "widen/linear/inputs"),
            r"plan.json: wanted keys of the model's sites, got 'widen/linear/inputs'; did you mean 'widen/lin",
        ),
        (
            edited(lambda data: data["sites"][SITE].update(bits=9)),
            r"plan.json: widen/linear/input: bits: wanted a whole number from 2 to 8, got 9",
        ),
        (
            edited(lambda data: data["sites"][SITE].update(bits=4.5)),
            r"plan.json: widen/linear/input: bits: wanted a whole number from 2 to 8, got 4.5",
        ),
        (
            edited(lambda data: data["sites"][SITE].update(grid="log3")),
            r"widen/linear/input: grid: wanted one of uniform, log2, .*, got 'log3'",
        ),
        (
            edited(lambda data: data["sites"][SITE].update(granularity="per_head")),
            r"plan.json: widen/linear/input: wanted the granularity per_channel or per_tensor, got per_head",
        ),
        (
            edited(lambda data: data["sites"][SITE].pop("grid")),
            r"widen/linear/input: wanted bits, grid, granularity, symmetric, got bits, granularity, symmetric",
        ),
        (
            edited(lambda data: data["sites"][SITE].update(symmetric="no")),
            r"widen/linear/input: symmetric: wanted true or false, got 'no'",
        ),
        (
            edited(lambda data: data["sites"][SITE].update(grid="ternary", bits=2, symmetric=True)),
            r"widen/linear/input: wanted the grid ternary for weights alone",
        ),
        (
            lambda text: text.replace('"narrow/linear/input"', '"widen/linear/input"'),
            r"plan.json: 'widen/linear/input' is there twice",
        ),
        (
            edited(lambda data: data["model"].update(architecture="another")),
            r"plan.json: wanted a file made for this model",
        ),
        (
            edited(lambda data: data.update(sites={})),
            r"plan.json: wanted at least one site to quantize, got a plan with none; give it sites \(sites.json",
        ),
        (edited(lambda data: data.update(format_version=2)), r"plan.json: format version 2 is newer"),
        (edited(lambda data: data.update(kept_at_8_bits=["tail"])), r"kept_at_8_bits: wanted one of first input"),
        (edited(lambda data: data.pop("method")), r"plan.json: wanted a plan, but it lacks 'method'"),
        (lambda text: text[:-20], r"plan.json: wanted a plan, but it is damaged"),
    ],
)
def test_edited_by_hand_and_wrong(
    tmp_path: Path, graph: Graph, plan: QuantPlan, edit: Callable[[str], str], message: str
) -> None:
    path = tmp_path / "plan.json"
    plan.write(path)
    path.write_text(edit(path.read_text()))
    with pytest.raises(InputError, match=message):
        QuantPlan.read(path, graph.site_list())


def test_missing_file(tmp_path: Path, graph: Graph) -> None:
    with pytest.raises(InputError, match=r"none.json: cannot be read"):
        QuantPlan.read(tmp_path / "none.json", graph.site_list())


def test_from_an_allocation(graph: Graph) -> None:
    members = {module: [f"{module}/linear/input", f"{module}/linear/weight"] for module in ("widen", "narrow", "head")}
    rest = [site.key for site in graph.sites if not any(site.key in each for each in members.values())]
    # 2 bits lose 9 in `widen` and 1 in `narrow`, and 5 bits in the mean allow 8 for one of them alone.
    groups = [
        Group("widen", (Option(2, 3, 9.0), Option(8, 6, 0.0)), weights=128),
        Group("narrow", (Option(2, 3, 1.0), Option(8, 6, 0.0)), weights=128),
        Group("head", (Option(4, 4, 0.0),)),
        Group("rest", (Option(5, 7, 0.0),)),
    ]
    allocation = allocate(groups, MeanBits(weights=5.0))
    bits = allocated_bits(graph, allocation, {**members, "rest": rest})
    assert [bits[key] for name in ("widen", "narrow", "head") for key in members[name]] == [6, 8, 3, 2, 8, 8]
    assert bits["query/linear/weight"] == 5
    assert bits["query/linear/input"] == 7
    assert bits["stem/conv/input"] == 8
    with pytest.raises(InputError, match=r"wanted the sites of every group, got none for 'rest'"):
        allocated_bits(graph, allocation, members)
    with pytest.raises(InputError, match=r"'widen/linear/input' is in 'widen' and in 'rest'"):
        allocated_bits(graph, allocation, {**members, "rest": [*rest, "widen/linear/input"]})
    with pytest.raises(InputError, match=r"members\['rest'\]: wanted keys of the model's sites, got 'query/linear/in'"):
        allocated_bits(graph, allocation, {**members, "rest": ["query/linear/in"]})
    with pytest.raises(InputError, match=r"wanted every site in a group or kept at 8 bits, got 'stem/conv/weight'"):
        allocated_bits(graph, allocation, {**members, "rest": rest[2:]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1}, "bits: wanted a whole number from 2 to 8, got 1"),
        ({"bits": True}, "got True"),
        ({"bits": 4, "grid": Grid.LOG2, "symmetric": True}, "symmetric: wanted false for the grid log2"),
        ({"bits": 4, "grid": Grid.TERNARY, "symmetric": True}, "ternary takes 2 bits"),
    ],
)
def test_specs_that_no_quantizer_has(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        QuantSpec(**options)
