"""The model in eager torch behind the same interface as an engine: what artifacts are compared with."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from denselab._version import __version__
from denselab.checkpoint import LoadedModel, ModelCard, load_checkpoint
from denselab.classes import VOID
from denselab.depth_unit import DepthUnit
from denselab.export.graph import ArtifactGraph
from denselab.export.precision import Precision
from denselab.hub import HUGGING_FACE, KMAX, is_published
from denselab.hub.kmax import from_kmax
from denselab.runtime.artifact import ArtifactInfo
from denselab.runtime.predictor import Predictor


class TorchSession:
    """Runs an ArtifactGraph in eager fp32 on the CPU."""

    engine = "torch"

    def __init__(self, graph: ArtifactGraph) -> None:
        self._graph = graph.eval()
        self.tasks = tuple(task.name for task in graph.tasks)

    @torch.inference_mode()
    def run(self, image: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """Image [H, W, 3] RGB of any size to the answers by name, at its size."""
        answers = self._graph(torch.tensor(image)[None])
        return {name: answer[0].numpy() for name, answer in zip(self._graph.outputs, answers, strict=True)}


def open_model(source: str | Path) -> LoadedModel:
    """A checkpoint's averaged weights; hf:NAME, a model of the Hugging Face hub or of a folder; or kmax:FILE, a
    checkpoint of the public kMaX-DeepLab.

    Raises InputError for anything that is none of these.
    """
    name = str(source)
    if not is_published(name):
        return load_checkpoint(source)
    if name.startswith(KMAX):
        hub = from_kmax(name.removeprefix(KMAX))
    else:
        from denselab.hub.hugging_face import from_hf

        hub = from_hf(name.removeprefix(HUGGING_FACE))
    card = ModelCard(hub.tasks[:1], name, {}, hub.classes, hub.train_hw, None, hub.licence)
    unit = DepthUnit.RELATIVE if hub.relative_depth else DepthUnit.METRES
    return LoadedModel(hub.model, card, hub.network_hw, hub.note, unit)


def load_predictor(source: str | Path) -> Predictor:
    """A predictor on a model in eager torch. Raises InputError for a source that is none (see `open_model`)."""
    loaded = open_model(source)
    graph = ArtifactGraph(loaded.model, loaded.card.make_tasks(), loaded.network_hw)
    return Predictor(TorchSession(graph), describe(loaded, loaded.card.model))


def describe(loaded: LoadedModel, name: str, precision: Precision = Precision.FP32) -> ArtifactInfo:
    """What an artifact of this checkpoint says about itself, before its receipt."""
    card = loaded.card
    return ArtifactInfo(
        tasks=card.tasks,
        name=name,
        classes=card.classes,
        void=VOID,
        size_multiple=loaded.model.size_multiple,
        train_hw=card.train_hw,
        precision=str(precision),
        licence=card.licence,
        score=card.score,
        receipt={},
        denselab_version=__version__,
        depth_unit=loaded.depth_unit,
    )
