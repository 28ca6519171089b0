"""Where a network can be quantized: the operands of its linear layers, convolutions and matrix products.

An operand is named by the part that it plays, because published methods choose grids by it: query, key, attention map
and value of an attention, left and right of any other product of two activations, else input and weight. So is what
made it: RepQ-ViT (Li et al., ICCV 2023, section 3) treats what follows a LayerNorm and a softmax each in its own way,
AdaLog (Wu et al., ECCV 2024, section 3) what follows a GELU. How they are found: `find_sites`.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from denselab.compress.saved_file import check_version, reading
from denselab.errors import InputError
from denselab.files import write_json


class Op(Enum):
    """The operation that reads a site."""

    LINEAR = "linear"
    CONV = "conv"
    CONV_TRANSPOSE = "conv_transpose"
    MATMUL = "matmul"


class Operand(Enum):
    """The part that a tensor plays in its operation."""

    INPUT = "input"
    WEIGHT = "weight"
    QUERY = "query"
    KEY = "key"
    ATTENTION = "attention"
    VALUE = "value"
    LEFT = "left"
    RIGHT = "right"


class Source(Enum):
    """What made a tensor, seen through reshapes, slices, padding, pooling and joins of equals.

    NORM: layer, batch, group, instance or RMS norm. RELU: any that cuts off at zero. ACTIVATION: another non-linearity
    of one element. SUM: of two tensors that depend on the image, as a residual is. PARAMETER: weights alone.
    """

    IMAGE = "image"
    NORM = "norm"
    GELU = "gelu"
    RELU = "relu"
    ACTIVATION = "activation"
    SOFTMAX = "softmax"
    SUM = "sum"
    PARAMETER = "parameter"
    OTHER = "other"

    @property
    def bounds(self) -> tuple[float, float]:
        """Values that cannot be left, whatever the image."""
        if self is Source.SOFTMAX:
            return 0.0, 1.0
        return (0.0 if self is Source.RELU else -math.inf), math.inf


@dataclass(frozen=True)
class QuantSite:
    """A tensor that an operation reads, and that can be quantized there.

    module: path of the module that runs the operation. call: counts operations of that module with such operands, where
    there are several or the module runs more than once. shape: at the example. channel_axis: of output channels
    (weight), else of the features that the product sums over (value: those it does not), None for attention maps.
    elements: of the weight, or of the activation per image. macs: multiplications per image of the operations that
    read it. tensor: key of the first site that reads the same tensor (its own key, if it is the first).
    """

    module: str
    op: Op
    operand: Operand
    call: int
    made_by: Source
    shape: tuple[int, ...]
    channel_axis: int | None
    elements: int
    macs: int
    tensor: str

    @property
    def key(self) -> str:
        """What names the site in every saved file: "blocks.0.attn.qkv/linear/weight", "#1" after it for call 1."""
        return site_key(self.module, self.op, self.operand, self.call)

    @property
    def is_weight(self) -> bool:
        """Whether it is stored rather than computed."""
        return self.operand is Operand.WEIGHT


@dataclass(frozen=True)
class Product:
    """One operation and the keys of its two sites: bit operations are macs x bits x bits."""

    left: str
    right: str
    macs: int


@dataclass(frozen=True)
class Place:
    """An argument of a node of the graph."""

    node: fx.Node
    argument: int


@dataclass(frozen=True)
class FoundSites:
    """Sites in order of execution, the operations over them, and where each is read: a shared weight in many places."""

    sites: tuple[QuantSite, ...]
    products: tuple[Product, ...]
    places: Mapping[str, tuple[Place, ...]]

    @property
    def by_key(self) -> dict[str, QuantSite]:
        """The sites by what names them in files."""
        return {site.key: site for site in self.sites}


def site_key(module: str, op: Op, operand: Operand, call: int) -> str:
    """See `QuantSite.key`."""
    return f"{module}/{op.value}/{operand.value}" + (f"#{call}" if call else "")


def module_of(node: fx.Node) -> str:
    """Path of the innermost module that runs a node; "" for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    return list(stack.values())[-1][0] if stack else ""


@dataclass(frozen=True)
class ModelHash:
    """What says that a saved plan or statistic belongs to a model.

    architecture: of the sites and of the names and shapes of all parameters; the same at every input size and after
    every training step. values: of all parameters and buffers.
    """

    architecture: str
    values: str

    @classmethod
    def of(cls, model: nn.Module, found: FoundSites) -> "ModelHash":
        """The hashes of a model with these sites."""
        architecture, values = hashlib.sha256(), hashlib.sha256()
        for site in found.sites:
            architecture.update(f"{site.key} {site.made_by.value} {site.shape if site.is_weight else ''}\n".encode())
        for name, value in sorted(model.state_dict().items()):
            architecture.update(f"{name} {tuple(value.shape)}\n".encode())
            values.update(name.encode())
            values.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return cls(architecture.hexdigest(), values.hexdigest())

    def check_same(self, other: "ModelHash", file: str | Path) -> None:
        """Raise InputError, naming the file, where `other` is of another architecture."""
        if other.architecture != self.architecture:
            raise InputError(
                f"{file}: wanted a file made for this model (architecture {self.architecture[:12]}), got one for "
                f"another ({other.architecture[:12]}); make it again, or give the model it was made for"
            )


SITES_FORMAT = 1


@dataclass(frozen=True)
class SiteList:
    """`sites.json`: what a capture found, for steps and readers that do without the model."""

    model: ModelHash
    sites: tuple[QuantSite, ...]
    products: tuple[Product, ...]

    def write(self, path: Path) -> None:
        """As readable JSON, atomically."""
        data = {
            "format_version": SITES_FORMAT,
            "model": vars(self.model),
            "sites": [{"key": site.key, **_site_to_dict(site)} for site in self.sites],
            "products": [vars(product) for product in self.products],
        }
        write_json(path, data)

    @classmethod
    def read(cls, path: Path) -> "SiteList":
        """Raises InputError, naming the file: missing, damaged, a newer format, a wrong entry."""
        with reading(path, "a list of sites", "capture the model again"):
            data = json.loads(path.read_bytes())
            check_version(path, data["format_version"], SITES_FORMAT)
            sites = tuple(map(_site_from_dict, data["sites"]))
            for site, entry in zip(sites, data["sites"], strict=True):
                if entry["key"] != site.key:
                    raise ValueError(f"the entry {entry['key']!r} describes {site.key!r}")
            return cls(ModelHash(**data["model"]), sites, tuple(Product(**each) for each in data["products"]))


def _site_to_dict(site: QuantSite) -> dict[str, Any]:
    return {name: value.value if isinstance(value, Enum) else value for name, value in vars(site).items()}


def _site_from_dict(entry: Mapping[str, Any]) -> QuantSite:
    return QuantSite(
        module=entry["module"],
        op=Op(entry["op"]),
        operand=Operand(entry["operand"]),
        call=entry["call"],
        made_by=Source(entry["made_by"]),
        shape=tuple(entry["shape"]),
        channel_axis=entry["channel_axis"],
        elements=entry["elements"],
        macs=entry["macs"],
        tensor=entry["tensor"],
    )
