"""MLPs of a trained transformer rebuilt with ReLU in the place of GELU, whose outputs have no tail to quantize.

Wu et al.: APHQ-ViT: Post-Training Quantization with Average Perturbation Hessian Based Reconstruction for Vision
Transformers, CVPR 2025, arXiv:2504.02508; GoatWu/APHQ-ViT@44a985d utils/mlp_recon.py. Of every MLP the norm before it
and its two layers are trained so that its output stays the O of the float model:

    loss = mean H (O - fc2(relu(h)))^2 + alpha mean H (O - fc2(min(relu(h), ub)))^2,    h = fc1(norm(x)), alpha = 2,

where H is the average perturbation Hessian of O (`relevance.hessian`), scaled to a root mean square of 1, and ub the
quantile 0.99 of what a GELU gives above 0: the second term teaches the layers to do without outliers. Adam, its rate
on a cosine. Every MLP learns by itself, from what one run of the float model showed.

Deviations. `STEPS` steps of `TOKENS_PER_STEP` tokens in place of 20 000 of 32 images, over a sample of the tokens, and
H from at most `HESSIAN_IMAGES` images. A norm that others read too stays as it is. MLPs are found in the graph: a GELU
that alone reads a linear layer, and is read by one other alone; layers that share their weights stay as they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, fx

from denselab.compress.edit import GraphEdit, argument, float_dtype, is_shared, is_stored, packet
from denselab.compress.graph import Graph
from denselab.compress.methods.method import Calibration
from denselab.compress.ranges import percentile_scales
from denselab.compress.relevance.hessian import perturbation_hessian
from denselab.compress.relevance.scores import single_images
from denselab.compress.sites import FoundSites, Op, Operand, Place, QuantSite, Source
from denselab.errors import InputError

aten = torch.ops.aten

STEPS = 1000
TOKENS_PER_STEP = 512
RATE = 4e-5
ALPHA = 2.0
QUANTILE = 0.99
HESSIAN_IMAGES = 32

_CACHED_NUMBERS = 2**23
_PASSES = {aten.clone, aten.dropout, aten.contiguous, aten.alias, aten.detach}

Parameters = dict[tuple[fx.Node, int], Tensor]
"""By the operation that reads them, and the argument at which it does."""


@dataclass(frozen=True, eq=False)
class Mlp:
    """A GELU between two linear layers. norm: the LayerNorm that the first alone reads, if there is one."""

    norm: fx.Node | None
    widen: fx.Node
    gelu: fx.Node
    narrow: fx.Node

    @property
    def input(self) -> fx.Node:
        """What the first of its operations reads."""
        read = (self.norm or self.widen).args[0]
        assert isinstance(read, fx.Node)
        return read

    @property
    def parameters(self) -> tuple[tuple[fx.Node, int], ...]:
        """Operations and the arguments at which they read a weight or bias."""
        places = [(self.widen, 1), (self.widen, 2), (self.narrow, 1), (self.narrow, 2)]
        if self.norm is not None:
            places += [(self.norm, 2), (self.norm, 3)]
        return tuple((node, number) for node, number in places if argument(node, number) is not None)


def gelu_mlps(graph: Graph) -> tuple[Mlp, ...]:
    """The MLPs that can be rebuilt, in order of execution."""
    found = map(_mlp, graph.module.graph.find_nodes(op="call_function", target=aten.gelu.default))
    return tuple(mlp for mlp in found if mlp is not None)


def reconstruct_relu_mlps(
    graph: Graph,
    calibration: Calibration,
    steps: int = STEPS,
    rate: float = RATE,
    tokens_per_step: int = TOKENS_PER_STEP,
    alpha: float = ALPHA,
    quantile: float = QUANTILE,
) -> Graph:
    """The network with ReLU in the place of every GELU of an MLP, trained to say what it said; the model is untouched.

    Sites keep their keys, but what follows a ReLU is another source, so that the graph has a hash of its own: observe
    it anew, and make plans for it. A graph without such MLPs is returned as it is. steps: of every MLP, 0 trains
    nothing. calibration: `change` is what H is of, `seed` of the tokens that are drawn.
    Raises InputError for no images, and for images of several sizes.
    """
    mlps = gelu_mlps(graph)
    if not mlps:
        return graph
    tokens = _tokens(graph, mlps, calibration) if steps else {}
    hessians = _hessians(graph, mlps, calibration) if steps else {}
    edit = GraphEdit(graph)
    for number, mlp in enumerate(mlps):
        values = {(node, at): edit.stored(argument(node, at)).detach().clone() for node, at in mlp.parameters}
        if steps:
            loss = _Loss(mlp, tokens.pop(mlp), hessians[mlp], values, alpha, quantile)
            before, after = _train(loss, values, steps, rate, tokens_per_step, calibration.seed)
            calibration.say(f"ReLU: MLP {number + 1} of {len(mlps)}, loss {before:.3g}, then {after:.3g}")
        _put_in_place(edit, mlp, values)
    return edit.finish(same_model=False, same_answer=False)


def _mlp(gelu: fx.Node) -> Mlp | None:
    widen, narrow = _read_alone(gelu), _only_reader(gelu)
    if widen is None or narrow is None or packet(widen) is not aten.linear or packet(narrow) is not aten.linear:
        return None
    norm = _read_alone(widen)
    if norm is None or packet(norm) is not aten.layer_norm or len(argument(norm, 1)) != 1:
        norm = None
    mlp = Mlp(norm, widen, gelu, narrow)
    if norm is not None and not _are_own(mlp):
        mlp = replace(mlp, norm=None)
    return mlp if _are_own(mlp) else None


def _are_own(mlp: Mlp) -> bool:
    stored = [argument(node, number) for node, number in mlp.parameters]
    return all(is_stored(each) and not is_shared(each) for each in stored)


def _read_alone(node: fx.Node) -> fx.Node | None:
    """The operation whose result this one reads, if nothing else does."""
    before = node.args[0]
    while isinstance(before, fx.Node) and len(before.users) == 1 and packet(before) in _PASSES:
        before = before.args[0]
    return before if isinstance(before, fx.Node) and len(before.users) == 1 else None


def _only_reader(node: fx.Node) -> fx.Node | None:
    """The operation that alone reads the result of this one, as its first argument."""
    before, reader = node, node
    while len(before.users) == 1:
        reader = next(iter(before.users))
        if packet(reader) not in _PASSES:
            return reader if reader.args[0] is before else None
        before = reader
    return None


@dataclass(frozen=True, eq=False)
class _Tokens:
    """What some tokens of an MLP are: its inputs, its outputs with GELU, and the places of them in their images."""

    inputs: Float[Tensor, "tokens C"]
    outputs: Float[Tensor, "tokens O"]
    places: Int[Tensor, "tokens"]


def _tokens(graph: Graph, mlps: Sequence[Mlp], calibration: Calibration) -> dict[Mlp, _Tokens]:
    """From one run of the float model, as many of every image as memory is set aside for."""
    images = sum(len(batch) for batch in calibration.batches)
    if not images:
        raise InputError("calibration: wanted the images that were observed, got none; an MLP is trained on them")
    generator = torch.Generator().manual_seed(calibration.seed)
    wanted = {node for mlp in mlps for node in (mlp.input, mlp.narrow)}
    found: dict[Mlp, list[_Tokens]] = {mlp: [] for mlp in mlps}
    sizes: set[tuple[int, ...]] = set()
    with torch.no_grad():
        for pixels in single_images(graph, calibration.batches):
            sizes.add(tuple(pixels.shape))
            if len(sizes) > 1:
                listed = " and ".join("x".join(map(str, size)) for size in sorted(sizes))
                raise InputError(f"calibration: wanted images of one size, got {listed}; resize them or leave some out")
            run = _ValuesRun(graph.module, wanted)
            run.run(pixels)
            for mlp in mlps:
                inputs, outputs = (run.values[node].flatten(0, -2) for node in (mlp.input, mlp.narrow))
                few = _CACHED_NUMBERS * len(pixels) // ((inputs.shape[1] + outputs.shape[1]) * images)
                places = torch.randperm(len(inputs), generator=generator)[: max(few, 1)]
                found[mlp].append(_Tokens(inputs[places], outputs[places], places))
    names = [each.name for each in fields(_Tokens)]
    return {
        mlp: _Tokens(*(torch.cat([getattr(each, name) for each in parts]) for name in names))
        for mlp, parts in found.items()
    }


class _ValuesRun(fx.Interpreter):
    """One run of a graph that keeps what some nodes gave."""

    def __init__(self, module: fx.GraphModule, wanted: set[fx.Node]) -> None:
        super().__init__(module)
        self.wanted = wanted
        self.values: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.wanted:
            self.values[n] = value
        return value


def _hessians(graph: Graph, mlps: Sequence[Mlp], calibration: Calibration) -> dict[Mlp, Float[Tensor, "places O"]]:
    """H of the output of every MLP, of every place of an image, with a root mean square of 1."""
    edit = GraphEdit(graph)
    probes: dict[QuantSite, Place] = {}
    for mlp in mlps:
        # The output under another name, which all that used it reads: a place where a hook sees it once.
        narrow = edit.nodes[mlp.narrow]
        with edit.graph.inserting_after(narrow):
            probe = edit.graph.call_function(aten.alias.default, (narrow,))
        narrow.replace_all_uses_with(probe, lambda user, probe=probe: user is not probe)
        site = QuantSite(narrow.name, Op.LINEAR, Operand.INPUT, 0, Source.OTHER, (), None, 0, 0, narrow.name)
        probes[site] = Place(probe, 0)
    found = FoundSites(tuple(probes), (), {site.key: (place,) for site, place in probes.items()})
    probed = replace(graph, module=edit.module, found=found)
    images = list(islice(single_images(graph, calibration.batches), HESSIAN_IMAGES))
    hessians = perturbation_hessian(probed, images, [site.key for site in probes], calibration.change)
    scaled: dict[Mlp, Tensor] = {}
    for mlp, hessian in zip(mlps, hessians.values(), strict=True):
        size = hessian.square().mean().sqrt()
        scaled[mlp] = (hessian / size if size > 0 else torch.ones_like(hessian)).flatten(0, -2).to(float_dtype(graph))
    return scaled


class _Loss:
    """The loss of an MLP with ReLU on some of its tokens."""

    def __init__(
        self,
        mlp: Mlp,
        tokens: _Tokens,
        hessian: Float[Tensor, "places O"],
        values: Parameters,
        alpha: float,
        quantile: float,
    ) -> None:
        self.mlp, self.tokens, self.hessian, self.alpha = mlp, tokens, hessian, alpha
        gelu = F.gelu(self._hidden(values, tokens.inputs), approximate=str(mlp.gelu.kwargs.get("approximate", "none")))
        self.most = percentile_scales(gelu[gelu > 0], (quantile,))[0] if (gelu > 0).any() else torch.zeros(())

    def __call__(self, values: Parameters, chosen: Int[Tensor, "some"]) -> Float[Tensor, ""]:
        hidden = self._hidden(values, self.tokens.inputs[chosen]).relu()
        wanted, weight = self.tokens.outputs[chosen], self.hessian[self.tokens.places[chosen]]
        node = self.mlp.narrow
        errors = [
            ((F.linear(each, values[node, 1], values.get((node, 2))) - wanted).square() * weight).mean()
            for each in (hidden, hidden.clamp(max=self.most))
        ]
        return errors[0] + self.alpha * errors[1]

    def _hidden(self, values: Parameters, inputs: Float[Tensor, "some C"]) -> Float[Tensor, "some hidden"]:
        norm, widen = self.mlp.norm, self.mlp.widen
        if norm is not None:
            size, eps = argument(norm, 1), argument(norm, 4, 1e-5)
            inputs = F.layer_norm(inputs, size, values.get((norm, 2)), values.get((norm, 3)), eps)
        return F.linear(inputs, values[widen, 1], values.get((widen, 2)))


def _train(
    loss: _Loss, values: Parameters, steps: int, rate: float, tokens_per_step: int, seed: int
) -> tuple[float, float]:
    """Change the values; the loss before and after, on the same tokens."""
    generator = torch.Generator().manual_seed(seed)
    count = len(loss.tokens.places)
    test = torch.randperm(count, generator=generator)[: 4 * tokens_per_step]
    with torch.no_grad():
        before = loss(values, test).item()
    for value in values.values():
        value.requires_grad_()
    optimizer = torch.optim.Adam(values.values(), rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with torch.enable_grad():
        for _ in range(steps):
            optimizer.zero_grad()
            loss(values, torch.randint(count, (min(tokens_per_step, count),), generator=generator)).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        return before, loss(values, test).item()


def _put_in_place(edit: GraphEdit, mlp: Mlp, values: Parameters) -> None:
    gelu = edit.nodes[mlp.gelu]
    with edit.graph.inserting_before(gelu):
        relu = edit.graph.call_function(aten.relu.default, (gelu.args[0],))
    relu.meta = dict(gelu.meta)
    gelu.replace_all_uses_with(relu)
    edit.graph.erase_node(gelu)
    for (node, number), value in values.items():
        edit.set_parameter(edit.nodes[node], number, value, str(argument(node, number).target))
