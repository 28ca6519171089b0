"""The plan: at how many bits, and on which grid, every site is quantized; a JSON file that people read and edit.

One line per site, so that two plans can be compared line by line. A site that a plan does not list stays float.
"""

import difflib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from torch import fx

from denselab.compress.allocate import Allocation
from denselab.compress.graph import Graph
from denselab.compress.quantizers.checks import BITS
from denselab.compress.saved_file import check_version, reading
from denselab.compress.sites import ModelHash, Operand, QuantSite, SiteList, Source
from denselab.errors import InputError
from denselab.files import atomic_path

PLAN_FORMAT = 1

Choice = TypeVar("Choice", bound=Enum)

_ATTENTION = (Operand.QUERY, Operand.KEY, Operand.ATTENTION, Operand.VALUE)
_BATCHED_HEADS = 4


class Grid(Enum):
    """Where the numbers lie that a quantizer can represent (see `quantizers`)."""

    UNIFORM = "uniform"
    LOG2 = "log2"
    LOG_SQRT2 = "log_sqrt2"
    ADALOG = "adalog"
    SULQ = "sulq"
    TANQ = "tanq"
    TERNARY = "ternary"


class Granularity(Enum):
    """What shares one set of parameters."""

    PER_TENSOR = "per_tensor"
    PER_CHANNEL = "per_channel"
    PER_HEAD = "per_head"


class Kept(Enum):
    """What stays at 8 bits. HEAD: both sites of the last product before every output of the model."""

    FIRST_INPUT = "first input"
    FIRST_WEIGHT = "first weight"
    HEAD = "head"


KEPT = frozenset({Kept.FIRST_INPUT, Kept.HEAD})

MOST_WEIGHT_BITS = 7
"""Of weights that engines multiply in integers: with 8, processors of x86 without VNNI saturate (`export.integers`)."""


@dataclass(frozen=True)
class QuantSpec:
    """How a site is quantized. symmetric: the number 0 has code 0, around which the codes lie; of uniform grids.

    Raises InputError for widths and combinations that no quantizer has.
    """

    bits: int
    grid: Grid = Grid.UNIFORM
    granularity: Granularity = Granularity.PER_TENSOR
    symmetric: bool = False

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in BITS:
            raise InputError(f"bits: wanted a whole number from {BITS.start} to {BITS.stop - 1}, got {self.bits!r}")
        if self.grid is Grid.TERNARY and (self.bits != 2 or not self.symmetric):
            raise InputError(f"grid: ternary takes 2 bits and is symmetric, got {self.bits} bits, {self.symmetric}")
        if self.symmetric and self.grid not in (Grid.UNIFORM, Grid.TERNARY):
            raise InputError(f"symmetric: wanted false for the grid {self.grid.value}, which has no negative numbers")


def finest(site: QuantSite) -> Granularity:
    """The finest granularity of a site: of features for layers, of heads for attention in [..., heads, rows, columns].

    Per tensor for other products: their sums may run over pixels, whose number depends on the image.
    """
    if site.operand in (Operand.INPUT, Operand.WEIGHT) and site.channel_axis is not None and len(site.shape) > 1:
        return Granularity.PER_CHANNEL
    if site.operand in _ATTENTION and len(site.shape) >= _BATCHED_HEADS:
        return Granularity.PER_HEAD
    return Granularity.PER_TENSOR


def kept_axes(site: QuantSite, granularity: Granularity) -> tuple[int, ...]:
    """The dimensions of a site that keep parameters of their own (`keep` of the range searches).

    Raises InputError for a granularity that the site does not have.
    """
    if granularity is Granularity.PER_TENSOR:
        return ()
    if granularity is not finest(site):
        raise InputError(
            f"{site.key}: wanted the granularity {finest(site).value} or per_tensor, got {granularity.value}"
        )
    if granularity is Granularity.PER_HEAD:
        return (len(site.shape) - 3,)
    assert site.channel_axis is not None
    return (site.channel_axis,)


def kept_sites(graph: Graph, kept: Iterable[Kept] = KEPT) -> frozenset[str]:
    """Keys of the sites that stay at 8 bits."""
    wanted = frozenset(kept)
    first = {
        place.node for site in graph.sites if site.made_by is Source.IMAGE for place in graph.found.places[site.key]
    }
    head = _head(graph)
    keys: set[str] = set()
    for site in graph.sites:
        nodes = {place.node for place in graph.found.places[site.key]}
        if (
            (Kept.FIRST_INPUT in wanted and site.made_by is Source.IMAGE)
            or (Kept.FIRST_WEIGHT in wanted and site.is_weight and nodes & first)
            or (Kept.HEAD in wanted and nodes & head)
        ):
            keys.add(site.key)
    return frozenset(keys)


def equal_bits(graph: Graph, weights: int, activations: int, kept: Iterable[Kept] = KEPT) -> dict[str, int]:
    """So many bits for every site by key, but 8 for what is kept."""
    at_8 = kept_sites(graph, kept)
    return {site.key: 8 if site.key in at_8 else weights if site.is_weight else activations for site in graph.sites}


def exact_everywhere(graph: Graph, bits: Mapping[str, int]) -> dict[str, int]:
    """The same bits, of weights at most MOST_WEIGHT_BITS: engines then say the same on every processor."""
    sites = graph.found.by_key
    return {key: min(each, MOST_WEIGHT_BITS) if sites[key].is_weight else each for key, each in bits.items()}


def allocated_bits(
    graph: Graph, allocation: Allocation, members: Mapping[str, Sequence[str]], kept: Iterable[Kept] = KEPT
) -> dict[str, int]:
    """The bits that an allocation chose for the sites of each of its groups, and 8 for what is kept.

    members: keys of the sites of every group. Weights take the group's weight bits, all else its activation bits.
    Raises InputError for groups without members, sites that the model does not have, that are in two groups, or in
    none without being kept.
    """
    sites = graph.found.by_key
    at_8 = kept_sites(graph, kept)
    bits = dict.fromkeys(at_8, 8)
    owner: dict[str, str] = {}
    for group, option in allocation.chosen.items():
        for key in members.get(group, ()):
            if key not in sites:
                raise InputError(f"members[{group!r}]: {_unknown(key, sites)}")
            if key in owner:
                raise InputError(f"members: {key!r} is in {owner[key]!r} and in {group!r}; wanted one group per site")
            owner[key] = group
            bits.setdefault(key, option.weight_bits if sites[key].is_weight else option.activation_bits)
        if not members.get(group):
            raise InputError(f"members: wanted the sites of every group, got none for {group!r}")
    missing = [key for key in sites if key not in bits]
    if missing:
        raise InputError(f"members: wanted every site in a group or kept at 8 bits, got {missing[0]!r} in none")
    return {key: bits[key] for key in sites}


@dataclass(frozen=True)
class QuantPlan:
    """How every site is quantized. model: what it was made for. method: that fits it. kept: at 8 bits, for the receipt.

    specs: by key of the site, in order of execution.
    """

    model: ModelHash
    method: str
    kept: frozenset[Kept]
    specs: Mapping[str, QuantSpec]

    @classmethod
    def make(
        cls,
        graph: Graph,
        method: str,
        spec: Callable[[QuantSite, int], QuantSpec],
        bits: Mapping[str, int],
        kept: Iterable[Kept] = KEPT,
    ) -> "QuantPlan":
        """The plan of a method for given bits by key. spec: what the method does with a site at so many bits.

        kept: what the bits were made with. Raises InputError for unknown keys and widths that no quantizer has.
        """
        sites = graph.found.by_key
        for key in bits:
            if key not in sites:
                raise InputError(f"bits: {_unknown(key, sites)}")
        specs = {key: spec(site, bits[key]) for key, site in sites.items() if key in bits}
        return cls(graph.model, method, frozenset(kept), specs)

    def check(self, sites: SiteList, file: str | Path = "plan") -> None:
        """Raise InputError, naming the file, for another model, unknown sites, and what a site cannot be."""
        sites.model.check_same(self.model, file)
        known = {site.key: site for site in sites.sites}
        for key, spec in self.specs.items():
            if key not in known:
                raise InputError(f"{file}: {_unknown(key, known)}")
            try:
                kept_axes(known[key], spec.granularity)
            except InputError as error:
                raise InputError(f"{file}: {error}") from error
            if spec.grid is Grid.TERNARY and not known[key].is_weight:
                raise InputError(f"{file}: {key}: wanted the grid ternary for weights alone; take another")

    def write(self, path: Path) -> None:
        """As JSON with one line per site, atomically."""
        head = {
            "format_version": PLAN_FORMAT,
            "model": vars(self.model),
            "method": self.method,
            "kept_at_8_bits": sorted(each.value for each in self.kept),
        }
        lines = [f"  {json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}," for name, value in head.items()]
        sites = [
            f"    {json.dumps(key, ensure_ascii=False)}: {json.dumps(_spec_to_dict(spec))}"
            for key, spec in self.specs.items()
        ]
        inside = "{\n" + ",\n".join(sites) + "\n  }" if sites else "{}"
        with atomic_path(path) as partial:
            partial.write_text("\n".join(["{", *lines, f'  "sites": {inside}', "}"]) + "\n", "utf-8")

    @classmethod
    def read(cls, path: Path, sites: SiteList) -> "QuantPlan":
        """A plan for the model with these sites.

        Raises InputError, naming the file and the site: missing, damaged, a newer format, another model, an unknown or
        repeated site, none at all, bits and grids that there are not.
        """
        with reading(path, "a plan", "mend it or make it again"):
            text = path.read_text("utf-8")
            check_version(path, json.loads(text)["format_version"], PLAN_FORMAT)
            try:
                data = json.loads(text, object_pairs_hook=_without_repeats)
                kept = frozenset(_choice(Kept, "kept_at_8_bits", each) for each in data["kept_at_8_bits"])
                specs = {key: _spec_from_dict(key, entry) for key, entry in data["sites"].items()}
            except InputError as error:
                raise InputError(f"{path}: {error}") from error
            plan = cls(ModelHash(**data["model"]), str(data["method"]), kept, specs)
        plan.check(sites, path)
        if not specs:
            raise InputError(
                f"{path}: wanted at least one site to quantize, got a plan with none; give it sites (sites.json lists "
                "them) or make it again"
            )
        return plan


def wide_weights(graph: Graph, plan: QuantPlan) -> tuple[str, ...]:
    """Keys of the weights that have more than MOST_WEIGHT_BITS."""
    sites = graph.found.by_key
    return tuple(key for key, spec in plan.specs.items() if sites[key].is_weight and spec.bits > MOST_WEIGHT_BITS)


def _head(graph: Graph) -> set[fx.Node]:
    """Of every output, the last product that leads to it: what joins a residual before that is no head."""
    order = {node: number for number, node in enumerate(graph.module.graph.nodes)}
    products = {place.node for places in graph.found.places.values() for place in places}
    found: set[fx.Node] = set()
    for output in graph.module.graph.output_node().all_input_nodes:
        before = _ancestors(output) & products
        if before:
            found.add(max(before, key=order.__getitem__))
    return found


def _ancestors(node: fx.Node) -> set[fx.Node]:
    """A node and all that it is computed from."""
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        each = waiting.pop()
        if each not in found:
            found.add(each)
            waiting += each.all_input_nodes
    return found


def _unknown(key: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(key, list(known), 1)
    hint = f"did you mean {close[0]!r}?" if close else "sites.json lists them"
    return f"wanted keys of the model's sites, got {key!r}; {hint}"


def _spec_to_dict(spec: QuantSpec) -> dict[str, Any]:
    return {name: value.value if isinstance(value, Enum) else value for name, value in vars(spec).items()}


def _spec_from_dict(key: str, entry: Mapping[str, Any]) -> QuantSpec:
    expected = ("bits", "grid", "granularity", "symmetric")
    if sorted(entry) != sorted(expected):
        raise InputError(f"{key}: wanted {', '.join(expected)}, got {', '.join(entry) or 'nothing'}")
    if not isinstance(entry["symmetric"], bool):
        raise InputError(f"{key}: symmetric: wanted true or false, got {entry['symmetric']!r}")
    try:
        return QuantSpec(
            entry["bits"],
            _choice(Grid, "grid", entry["grid"]),
            _choice(Granularity, "granularity", entry["granularity"]),
            entry["symmetric"],
        )
    except InputError as error:
        raise InputError(f"{key}: {error}") from error


def _choice(kind: type[Choice], name: str, value: object) -> Choice:
    for each in kind:
        if each.value == value:
            return each
    raise InputError(f"{name}: wanted one of {', '.join(str(each.value) for each in kind)}, got {value!r}")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise InputError(f"{key!r} is there twice; keep one")
        found[key] = value
    return found
