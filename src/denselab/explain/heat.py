"""A photo and a question to a model become numbers: how much every pixel speaks for the answer, or against it.

Which rules: convolutions by the gamma rule with gamma 0.25, linear layers by the epsilon rule, as zennit 0.5.1
`EpsilonGammaBox` has them (without its rule for the first layer). On photos of streets that puts most of the relevance
on the objects themselves; with gamma 0, relevance propagation of networks of convolutions is gradient times input,
whose signs change from pixel to pixel.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, assert_never

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from denselab._packaged import PACKAGED
from denselab.checkpoint import LoadedModel, ModelCard
from denselab.compress.graph import capture
from denselab.compress.relevance.scores import pixel_relevance
from denselab.errors import InputError
from denselab.explain.question import Asked, Method, OfClass
from denselab.explain.subject import Said
from denselab.export.graph import ArtifactGraph
from denselab.export.torch_session import TorchSession, describe, open_model
from denselab.hub import is_published
from denselab.model import head_outputs
from denselab.runtime.artifact import read_info
from denselab.runtime.predictor import Predictor
from denselab.tasks.task import Task
from denselab.training.start import start_from
from denselab.zoo import build

CONV_GAMMA = 0.25
MOST_PX = 1_000_000
"""Photos are shrunk to as many pixels: every activation is kept for the way back."""

_WITH_CLASSES = ("semantic", "panoptic", "instance")
_FROM_WHERE = 'give the checkpoint it was exported from (FILE.ckpt), or "street"'


@dataclass(frozen=True, eq=False)
class Explanation:
    """relevance: float32 [H, W] at the size of the photo, above 0 where a pixel speaks for the answer; its sum is that
    of the relevance that reached what the model saw. subject: what is explained. notes: what a user should know.
    """

    relevance: NDArray[np.float32]
    subject: str
    method: Method
    notes: tuple[str, ...]


def open_to_explain(source: str) -> LoadedModel:
    """A model in torch: of a checkpoint, hf:NAME, kmax:FILE, or a built-in one, whose weights its artifact holds.

    Raises InputError for another artifact, and for what cannot be opened.
    """
    if source in PACKAGED:
        info = read_info(PACKAGED[source])
        assert info.classes is not None
        model = build(source, info.tasks, len(info.classes), {})
        start_from(model, source, torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
        card = ModelCard(info.tasks, source, {}, info.classes, info.train_hw, info.score, info.licence)
        return LoadedModel(model.eval(), card)
    suffix = Path(source).suffix
    if suffix == ".onnx":
        raise InputError(
            f"model: wanted one that relevance can go back through, got the artifact {source}, which only runs "
            f"forward; {_FROM_WHERE}"
        )
    if suffix != ".ckpt" and not is_published(source):
        names = ", ".join(PACKAGED)
        raise InputError(f"model: wanted {names}, a checkpoint (FILE.ckpt), hf:NAME or kmax:FILE, got {source}")
    return open_model(source)


def explain(
    loaded: LoadedModel,
    photo: NDArray[np.uint8],
    asked: Asked,
    method: Method = Method.LRP,
    task: str | None = None,
    say: Callable[[str], object] = lambda _: None,
) -> Explanation:
    """Which pixels of a photo uint8 [H, W, 3] made a model say what is asked about.

    The model sees large photos shrunk, as `Predictor` has it, and to at most MOST_PX pixels. task: of a model of
    several; if not given, the first that can answer. say: is told what is done before it takes long.
    Raises InputError: see `Said.find`; a model that cannot be captured, or that has operations without a rule.
    """
    chosen = _task_of(loaded, asked, task)
    source_hw = (photo.shape[0], photo.shape[1])
    seen_hw = _seen_hw(loaded, source_hw)
    pixels = _pixels(photo, seen_hw)
    if loaded.network_hw is not None:
        pixels = F.interpolate(pixels, size=loaded.network_hw, mode="bilinear", align_corners=False)
    network_hw = (pixels.shape[2], pixels.shape[3])
    with torch.no_grad():
        output, spec = head_outputs(loaded.model, (chosen.name,), pixels)[chosen.name]
        answers = chosen.decode(output, spec, network_hw)
    classes = loaded.card.classes if chosen.name in _WITH_CLASSES else None
    said = Said(chosen.name, output, spec, answers, source_hw, classes, loaded.depth_unit)
    subject = said.find(asked)
    start = subject.start(spec)

    def begin(outputs: Any) -> Float[Tensor, "B"]:
        return start(outputs[chosen.name] if isinstance(outputs, dict) else outputs)

    if method is not Method.GRADIENT:
        say(f"tracing the model at {network_hw[1]}x{network_hw[0]} px")
    relevance = _relevance(loaded, pixels, begin, method)
    notes = [subject.note] if subject.note else []
    if seen_hw != source_hw:
        notes.append(f"the photo of {source_hw[1]}x{source_hw[0]} px was seen at {seen_hw[1]}x{seen_hw[0]} px")
    return Explanation(_at_photo_size(relevance, source_hw), subject.text, method, tuple(notes))


def _task_of(loaded: LoadedModel, asked: Asked, name: str | None) -> Task:
    tasks = loaded.card.make_tasks()
    if name is not None:
        for task in tasks:
            if task.name == name:
                return task
        raise InputError(f"task: wanted one of the model's, {', '.join(loaded.card.tasks)}, got {name!r}")
    with_classes = [task for task in tasks if task.name in _WITH_CLASSES]
    return with_classes[0] if isinstance(asked, OfClass) and with_classes else tasks[0]


def _seen_hw(loaded: LoadedModel, source_hw: tuple[int, int]) -> tuple[int, int]:
    graph = ArtifactGraph(loaded.model, loaded.card.make_tasks(), loaded.network_hw)
    seen_hw = Predictor(TorchSession(graph), describe(loaded, loaded.card.model)).seen_hw(source_hw)
    scale = min(1.0, math.sqrt(MOST_PX / (seen_hw[0] * seen_hw[1])))
    return max(1, int(seen_hw[0] * scale)), max(1, int(seen_hw[1] * scale))


def _pixels(photo: NDArray[np.uint8], hw: tuple[int, int]) -> Float[Tensor, "1 3 H W"]:
    picture = Image.fromarray(photo).resize((hw[1], hw[0]), Image.Resampling.BILINEAR, reducing_gap=3)
    return torch.tensor(np.array(picture)).permute(2, 0, 1)[None].float() / 255


def _relevance(
    loaded: LoadedModel, pixels: Float[Tensor, "1 3 H W"], begin: Callable[[Any], Tensor], method: Method
) -> Float[Tensor, "H W"]:
    model = loaded.model
    if method is Method.GRADIENT:
        return pixel_relevance(model, pixels, begin, model.mean)[0]
    from denselab.compress.relevance.lrp import Attention, LrpRules, lrp_graph

    match method:
        case Method.LRP:
            rules = LrpRules(Attention.ATTN_LRP, CONV_GAMMA)
        case Method.CP_LRP:
            rules = LrpRules(Attention.CP_LRP, CONV_GAMMA)
        case _:
            assert_never(method)
    try:
        graph = lrp_graph(capture(model, pixels, free=frozenset()), rules)
    except InputError as error:
        raise InputError(f"{error}; or explain it by gradient, which takes any model") from error
    return pixel_relevance(graph.run, pixels, begin, model.mean)[0]


def _at_photo_size(relevance: Float[Tensor, "h w"], hw: tuple[int, int]) -> NDArray[np.float32]:
    if tuple(relevance.shape) == hw:
        return relevance.numpy()
    enlarged = F.interpolate(relevance[None, None], size=hw, mode="bilinear", align_corners=False, antialias=True)
    return (enlarged[0, 0] * (relevance.numel() / (hw[0] * hw[1]))).numpy()
