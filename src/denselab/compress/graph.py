"""Any PyTorch vision model as one graph of operations, proved to say what the model says, that runs with hooks.

`torch.export` traces the model, attention is opened (`open_attention`), mutations become values, and what is left are
aten operations over the model's own parameters. A hook is a function on the tensor of a site (`sites`): one that
returns what it got observes, one that returns something else quantizes.
"""

import difflib
import inspect
import io
import linecache
import traceback
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from enum import Enum
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from denselab.compress.find_sites import find_sites
from denselab.compress.open_attention import decompositions
from denselab.compress.sites import FoundSites, ModelHash, QuantSite, SiteList, module_of
from denselab.errors import InputError

PARITY = 1e-5
"""How far an output of the opened graph may be from the model's, relative to its largest value."""


class Axis(Enum):
    """A dimension of an image tensor that may be left free."""

    BATCH = 0
    HEIGHT = 2
    WIDTH = 3


ANY_SIZE = frozenset(Axis)

Hook = Callable[[Tensor], Tensor]
"""What a site's tensor is replaced by; it may keep what it sees."""


@dataclass(frozen=True)
class Graph:
    """A captured model.

    module: aten operations over the parameters of the model itself, not copies; every node knows its module path
    (`sites.module_of`). found: where it can be quantized. model: what a saved plan is checked with.
    example_shapes: of the inputs it was captured with. free: what of them may change; for a model that is tied to one
    size this is the batch alone, or nothing. check_sizes: raises AssertionError for inputs of other sizes.
    """

    module: fx.GraphModule
    found: FoundSites
    model: ModelHash
    example_shapes: tuple[tuple[int, ...], ...]
    free: frozenset[Axis]
    check_sizes: Callable[..., None]

    @property
    def sites(self) -> tuple[QuantSite, ...]:
        """Everything that can be quantized, in order of execution."""
        return self.found.sites

    def site_list(self) -> SiteList:
        """What `sites.json` holds."""
        return SiteList(self.model, self.found.sites, self.found.products)

    def run(self, *inputs: Tensor, hooks: Mapping[str, Hook] | None = None) -> Any:
        """What the model returns, with the tensors of some sites, by key, passed through a function first.

        Only the operation of the site sees the result; a shared weight is replaced once for all that read it.
        Gradients flow as through the model. Raises InputError for an unknown site, and for sizes it is not free for.
        """
        for key in hooks or {}:
            if key not in self.found.places:
                close = difflib.get_close_matches(key, self.found.places, 1)
                hint = f"; did you mean {close[0]!r}?" if close else "; see Graph.sites"
                raise InputError(f"hooks: wanted keys of the model's sites, got {key!r}{hint}")
        try:
            self.check_sizes(*inputs)
        except AssertionError as error:
            free = " and ".join(axis.name.lower() for axis in Axis if axis in self.free) or "nothing"
            raise InputError(
                f"inputs: wanted shapes like {_listed(self.example_shapes)} with {free} free to change, got "
                f"{_listed([each.shape for each in inputs])} ({error}); resize them or capture at that size"
            ) from error
        return _HookedRun(self.module, self.found, hooks or {}).run(*inputs)


def capture(model: nn.Module, *example: Tensor, free: frozenset[Axis] = ANY_SIZE) -> Graph:
    """The graph of a model in evaluation mode, checked against it on the example: its inputs, images first.

    free: what shall stay free where the model allows it. Free heights and widths cost most of the time of a capture
    (seconds for a small model, a minute for a large one); work at one size needs the batch alone. A model that treats
    a square or its own image size differently keeps them free only for an example of another size.
    Raises InputError: a parameter that is not finite (named), a model that torch.export cannot capture (operator and
    module named), an output that the graph gets wrong (named).
    """
    _check_finite(model)
    shapes = tuple(tuple(each.shape) for each in example)
    with _evaluating(model), torch.no_grad():
        try:
            wanted = model(*example)
        except Exception as error:  # whatever the user's own code raises
            raise InputError(
                f"example: wanted inputs that the model runs on, got {_listed(shapes)} ({error}); give others"
            ) from error
        module, check_sizes = _traced(model, example, free)
    _check_attention_is_open(module)
    _check_no_nan(wanted, module, example)
    measured = ShapesRun(module)
    with torch.no_grad():
        _check_parity(wanted, measured.run(*example))
    found = find_sites(module.graph, measured.shapes, images=len(example[0]))
    really_free = frozenset(axis for axis in Axis if _allows(check_sizes, [_doubled(each, axis) for each in example]))
    return Graph(module, found, ModelHash.of(model, found), shapes, really_free, check_sizes)


class _HookedRun(fx.Interpreter):
    """One run of a graph in which hooks see and replace the arguments of nodes."""

    def __init__(self, module: fx.GraphModule, found: FoundSites, hooks: Mapping[str, Hook]) -> None:
        super().__init__(module)
        self.hooks = hooks
        self.sites = found.by_key
        self.places: dict[fx.Node, list[tuple[int, str]]] = {}
        for key in hooks:
            for place in found.places[key]:
                self.places.setdefault(place.node, []).append((place.argument, key))
        self.weights: dict[str, Tensor] = {}

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        if n not in self.places:
            return args, kwargs
        replaced = list(args)
        for argument, key in self.places[n]:
            replaced[argument] = self.hooked(key, replaced[argument])
        return tuple(replaced), kwargs

    def hooked(self, key: str, value: Tensor) -> Tensor:
        """The tensor of a site after its hook, computed once where several operations share a weight."""
        if not self.sites[key].is_weight:
            return self.hooks[key](value)
        if key not in self.weights:
            self.weights[key] = self.hooks[key](value)
        return self.weights[key]


class ShapesRun(fx.Interpreter):
    """One run of a graph that notes the shape of every tensor."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n] = tuple(value.shape)
        return value


def _traced(
    model: nn.Module, example: tuple[Tensor, ...], free: frozenset[Axis]
) -> tuple[fx.GraphModule, Callable[..., None]]:
    """Operations with as much left free as can be, and the check of sizes (see `Graph.check_sizes`)."""
    # A batch of one is never left free, and a square may be taken for the rule: trace twice the batch, twice as wide.
    several = tuple(_doubled(each, Axis.BATCH) if len(each) == 1 else each for each in example)
    wide = tuple(_doubled(each, Axis.WIDTH) for each in several)
    attempts = [(wide, free), (several, free)] if free - {Axis.BATCH} else []
    if Axis.BATCH in free:
        attempts.append((several, frozenset({Axis.BATCH})))
    for traced_with, axes in attempts:
        shapes = tuple({axis.value: Dim.AUTO for axis in axes if axis.value < each.ndim} for each in example)
        try:
            module, check_sizes = _decomposed(model, traced_with, shapes)
        except Exception:  # torch.export has a dozen exception types; what matters is whether less freedom helps
            continue
        if _allows(check_sizes, example):
            return module, check_sizes
    try:
        return _decomposed(model, example, None)
    except InputError:
        raise
    except Exception as error:
        raise InputError(_why_not_captured(model, error)) from error


def _doubled(value: Tensor, axis: Axis) -> Tensor:
    """Twice a tensor side by side; the tensor itself where it has no such axis."""
    return torch.cat((value, value), axis.value) if axis.value < value.ndim else value


def _allows(check_sizes: Callable[..., None], inputs: Sequence[Tensor]) -> bool:
    try:
        check_sizes(*inputs)
    except AssertionError:
        return False
    return True


def _decomposed(
    model: nn.Module, example: tuple[Tensor, ...], dynamic_shapes: Any
) -> tuple[fx.GraphModule, Callable[..., None]]:
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # nn.MultiheadAttention as one operation
    try:
        # torch warns about its own deprecations, of which a user can mend none, and prints what it could not trace.
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            program = torch.export.export(model, example, dynamic_shapes=dynamic_shapes, strict=False)
            module = program.run_decompositions(decompositions()).module()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    return module, _guards_taken_out_of(module)


@contextmanager
def _evaluating(model: nn.Module) -> Generator[None]:
    """Evaluation mode for a while; afterwards every module is in the mode it was in."""
    training = [each for each in model.modules() if each.training]
    model.eval()
    try:
        yield
    finally:
        for each in training:
            each.training = True


def _guards_taken_out_of(module: fx.GraphModule) -> Callable[..., None]:
    """What torch.export found that inputs must keep: a function of them that raises AssertionError."""
    for node in module.graph.nodes:
        if node.op == "call_module" and node.target == "_guards_fn":
            guards = module.get_submodule("_guards_fn").forward
            module.graph.erase_node(node)
            module.delete_submodule("_guards_fn")
            module.recompile()
            return cast("Callable[..., None]", guards)
    return lambda *_: None


_FUSED = {
    torch.ops.aten._scaled_dot_product_flash_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
    torch.ops.aten._scaled_dot_product_efficient_attention,
    torch.ops.aten._scaled_dot_product_cudnn_attention,
    torch.ops.aten._scaled_dot_product_fused_attention_overrideable,
    torch.ops.aten._native_multi_head_attention,
    torch.ops.aten._transformer_encoder_layer_fwd,
    torch.ops.higher_order.flex_attention,
}


def _check_attention_is_open(module: fx.GraphModule) -> None:
    for node in module.graph.nodes:
        if getattr(node.target, "overloadpacket", node.target) in _FUSED:
            raise InputError(
                f"model: wanted attention that can be opened, got {node.target} in the module "
                f"{module_of(node)!r}; call torch.nn.functional.scaled_dot_product_attention instead"
            )


def _check_finite(model: nn.Module) -> None:
    for name, value in model.named_parameters():
        if not value.isfinite().all():
            raise InputError(
                f"model: wanted finite weights, got NaN or infinity in {name!r}; take an earlier checkpoint"
            )
    for name, value in model.named_buffers():
        if value.isnan().any():  # infinity is how masks are stored
            raise InputError(f"model: wanted finite weights, got NaN in {name!r}; take an earlier checkpoint")


class _NanRun(fx.Interpreter):
    """One run of a graph that notes where the first NaN arises."""

    place = "the example"

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if self.place == _NanRun.place and isinstance(value, Tensor) and value.isnan().any() and n.op != "placeholder":
            self.place = f"the module {module_of(n)!r} ({n.target})"
        return value


def _check_no_nan(wanted: Any, module: fx.GraphModule, example: tuple[Tensor, ...]) -> None:
    for path, value in pytree.tree_flatten_with_path(wanted)[0]:
        if isinstance(value, Tensor) and value.isnan().any():
            run = _NanRun(module)
            with torch.no_grad():
                run.run(*example)
            raise InputError(
                f"model: wanted an answer to the example, got NaN in output{pytree.keystr(path)}, which arises in "
                f"{run.place}; take an earlier checkpoint, or give a real image"
            )


def _check_parity(wanted: Any, got: Any) -> None:
    for path, value in pytree.tree_flatten_with_path(wanted)[0]:
        name = f"output{pytree.keystr(path)}"
        other = pytree.key_get(got, path)
        if not isinstance(value, Tensor):
            continue
        if not value.is_floating_point():
            if not torch.equal(value, other):
                raise InputError(f"model: its opened graph gives another {name}; {_MEND}")
            continue
        apart = torch.where(value == other, 0, (value - other).abs())  # equal infinities
        size = value.abs().where(value.isfinite(), 0)
        if value.numel() and not apart.max() <= PARITY * size.max():
            raise InputError(
                f"model: its opened graph gives another {name}: wanted a difference of at most {PARITY:g} of its "
                f"largest value {size.max():.4g}, got {apart.max():.4g}; {_MEND}"
            )


_MEND = "does the model draw random numbers or compute in less than 32 bits? Capture it in float32 and without either"


def _why_not_captured(model: nn.Module, error: Exception) -> str:
    names = {id(each): name for name, each in model.named_modules()}
    chain = list(_causes(error))
    operator = next((str(func) for each in chain if (func := getattr(each, "func", None))), None)
    module, line = next(filter(None, (_innermost(each, names) for each in chain)), ("", ""))
    reason = str(error).strip().partition("\n")[0]
    return (
        f"model: torch.export cannot capture the module {module!r}: "
        f"{f'the operator {operator} in `{line}`' if operator else f'`{line}`'} ({reason}); rewrite it in tensor "
        "operations whose shapes and branches do not depend on values"
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and those that led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _innermost(error: BaseException, names: Mapping[int, str]) -> tuple[str, str] | None:
    """The deepest module in whose code an error was raised, and the line of code."""
    found = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        code = frame.f_code
        owner = frame.f_locals.get(code.co_varnames[0]) if code.co_varnames else None
        if isinstance(owner, nn.Module) and id(owner) in names and code.co_filename != inspect.getfile(nn.Module):
            found = names[id(owner)], linecache.getline(code.co_filename, line).strip()
    return found


def _listed(shapes: Sequence[Sequence[int]]) -> str:
    return ", ".join("x".join(map(str, shape)) for shape in shapes)
