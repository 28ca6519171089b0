"""Sites that must take the same bits, and what a model stores beside them.

Sites are one group where they cannot differ: the two operands of a product (a weight and its input; query and key;
attention map and value), and all products that read the same tensor, as those share its quantizer. A group chooses a
pair: bits of its weights, bits of its activations. What is kept at 8 bits has no choice.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from denselab.compress.edit import stored_tensor
from denselab.compress.graph import Graph
from denselab.compress.plan import KEPT, Kept, kept_sites

FLOAT_BYTES = 4
"""Of a number that stays as it is."""


@dataclass(frozen=True)
class SiteGroup:
    """Sites that choose together. key: of its first weight, or of its first site.

    weights, activations: keys of the sites. weight_elements; activation_elements: per image, a tensor counted once;
    macs: per image. weights_kept, activations_kept: at 8 bits, whatever is chosen.
    """

    key: str
    weights: tuple[str, ...]
    activations: tuple[str, ...]
    weight_elements: int
    activation_elements: int
    macs: int
    weights_kept: bool
    activations_kept: bool

    @property
    def sites(self) -> tuple[str, ...]:
        """All of them, activations first."""
        return self.activations + self.weights

    @property
    def free_weights(self) -> tuple[str, ...]:
        """The weights if their bits are to be chosen."""
        return () if self.weights_kept else self.weights

    @property
    def free_activations(self) -> tuple[str, ...]:
        """The activations if their bits are to be chosen."""
        return () if self.activations_kept else self.activations

    @property
    def free(self) -> tuple[str, ...]:
        """All sites whose bits are to be chosen."""
        return self.free_activations + self.free_weights


def site_groups(graph: Graph, kept: Iterable[Kept] = KEPT) -> tuple[SiteGroup, ...]:
    """The sites of a graph by what must take the same bits, in order of execution.

    Readers of a tensor that is kept at 8 bits anywhere read it at 8 bits; it ties no weights together.
    """
    at_8, sites = kept_sites(graph, kept), graph.found.by_key
    tensors_at_8 = {sites[key].tensor for key in at_8 if not sites[key].is_weight}
    leader = {key: key for key in sites}

    def lead(key: str) -> str:
        while leader[key] != key:
            key = leader[key]
        return key

    def tie(one: str, other: str) -> None:
        leader[lead(one)] = lead(other)

    for product in graph.found.products:
        tie(product.left, product.right)
    for site in sites.values():
        if site.tensor not in tensors_at_8:
            tie(site.key, site.tensor)
    together: dict[str, list[str]] = {}
    for key in sites:
        together.setdefault(lead(key), []).append(key)
    macs = dict.fromkeys(together, 0)
    for product in graph.found.products:
        macs[lead(product.left)] += product.macs
    found: list[SiteGroup] = []
    counted: set[str] = set()
    for leading, keys in together.items():
        weights = tuple(key for key in keys if sites[key].is_weight)
        activations = tuple(key for key in keys if not sites[key].is_weight)
        tensors = {sites[key].tensor: sites[key].elements for key in activations if sites[key].tensor not in counted}
        counted |= tensors.keys()
        found.append(
            SiteGroup(
                (weights or activations)[0],
                weights,
                activations,
                sum(sites[key].elements for key in weights),
                sum(tensors.values()),
                macs[leading],
                any(key in at_8 for key in weights),
                any(sites[key].tensor in tensors_at_8 for key in activations),
            )
        )
    return tuple(found)


def float_elements(graph: Graph) -> int:
    """Numbers that a graph stores and that no site replaces: biases, norms, embeddings, and buffers such as masks."""
    weights = {
        (place.node, place.argument) for site in graph.sites if site.is_weight for place in graph.found.places[site.key]
    }
    stored: list[fx.Node] = []
    seen = {graph.module.graph.output_node()}
    waiting = [*seen]
    while waiting:
        node = waiting.pop()
        if node.op == "get_attr":
            stored.append(node)
        replaced = [each for number, each in enumerate(node.args) if (node, number) in weights]
        for each in node.all_input_nodes:
            if each not in seen and not any(each is weight for weight in replaced):
                seen.add(each)
                waiting.append(each)
    tensors = {id(value): value for value in (stored_tensor(graph.module, node) for node in stored)}
    return sum(value.numel() for value in tensors.values() if value.is_floating_point())


def float_bytes(graph: Graph) -> int:
    """Bytes that the model takes as float32: what `FloatShare` and `parse_budget` ask for."""
    return FLOAT_BYTES * (float_elements(graph) + sum(site.elements for site in graph.sites if site.is_weight))
