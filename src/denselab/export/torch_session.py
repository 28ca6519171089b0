"""The model in eager torch behind the same interface as an engine: what artifacts are compared with."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from denselab._version import __version__
from denselab.checkpoint import LoadedModel, load_checkpoint
from denselab.export.graph import ArtifactGraph
from denselab.export.precision import Precision
from denselab.runtime.artifact import ArtifactInfo
from denselab.runtime.predictor import Predictor


class TorchSession:
    """Runs an ArtifactGraph in eager fp32 on the CPU."""

    engine = "torch"

    def __init__(self, graph: ArtifactGraph) -> None:
        self._graph = graph.eval()

    @torch.inference_mode()
    def run(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Image [H, W, 3] RGB of any size to class ids [H, W]."""
        return self._graph(torch.tensor(image)[None])[0].numpy()


def load_predictor(path: str | Path) -> Predictor:
    """A predictor on a checkpoint's averaged weights. Raises InputError for a file that is none."""
    loaded = load_checkpoint(path)
    return Predictor(TorchSession(ArtifactGraph(loaded.model)), describe(loaded, loaded.card.model))


def describe(loaded: LoadedModel, name: str, precision: Precision = Precision.FP32) -> ArtifactInfo:
    """What an artifact of this checkpoint says about itself, before its receipt."""
    card = loaded.card
    return ArtifactInfo(
        task=card.task,
        name=name,
        classes=card.classes,
        void=card.ignore,
        size_multiple=loaded.model.size_multiple,
        train_hw=card.train_hw,
        precision=str(precision),
        licence=card.licence,
        score=card.score,
        receipt={},
        denselab_version=__version__,
    )
