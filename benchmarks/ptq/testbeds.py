"""The networks that compression is measured on: how each is opened, calibrated and scored.

All but the built-in `street` are trained by recipes/cifar.py and recipes/proofs.py into the work folder.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from denselab._packaged import PACKAGED
from denselab.compress.fold_norms import fold_norms
from denselab.compress.graph import Axis, Graph, capture
from denselab.compress.subject import Dense, Photos, Subject, dense_subject, open_classifier
from denselab.compress.to_onnx import with_network
from denselab.data.dataset import Dataset
from denselab.data.descriptor import open_dataset
from denselab.evaluate import evaluate
from denselab.explain.heat import open_to_explain
from denselab.export.graph import ArtifactGraph
from denselab.export.torch_session import TorchSession, describe
from denselab.metrics.headline import Headline
from denselab.runtime.images import open_image
from denselab.runtime.predictor import Predictor

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"
sys.path.insert(0, str(ROOT / "recipes"))
from cifar import read_split  # noqa: E402


@dataclass(frozen=True)
class Testbed:
    """One network and its images.

    source: what is opened, below the work folder unless it is built in. data: of dense models, below the work folder or
    beside the repository. calibration: images to calibrate with, of the training split, evenly spread; test: at most so
    many images of the test split, evenly spread.
    """

    name: str
    source: str
    data: str
    calibration: int
    test: int

    def subject(self, work: Path) -> Subject:
        if self.source.startswith("cifar/"):
            return open_classifier(f"timm:{work / self.source}")
        source = self.source if self.source in PACKAGED else str(work / self.source)
        return dense_subject(open_to_explain(source), self.name)

    def dataset(self, work: Path) -> Dataset:
        return open_dataset(work / self.data if (work / self.data).exists() else SHARED / self.data)

    def photos(self, subject: Subject, work: Path) -> Photos:
        """Images to calibrate with."""
        if not isinstance(subject.kind, Dense):
            images, _ = read_split("train")
            return Photos(subject, tuple(images[spread(len(images), self.calibration)]), at_once=32)
        items = self.dataset(work).split("train")
        chosen = [items[index] for index in spread(len(items), self.calibration)]
        return Photos(subject, tuple(subject.seen(open_image(item.image)) for item in chosen), at_once=1)

    def scorer(self, subject: Subject, work: Path) -> Callable[[nn.Module], Headline]:
        """What scores a network in the place of the subject's own."""
        if not isinstance(subject.kind, Dense):
            return top1(subject, *read_split("test"))
        loaded = subject.kind.loaded
        dataset = self.dataset(work)
        split = "test" if dataset.splits.get("test") else "val"
        items = dataset.split(split)
        few = replace(dataset, splits={split: tuple(items[index] for index in spread(len(items), self.test))})

        def score(network: nn.Module) -> Headline:
            graph = ArtifactGraph(with_network(loaded.model, network), loaded.card.make_tasks(), loaded.network_hw)
            predictor = Predictor(TorchSession(graph), describe(loaded, self.name))
            return next(iter(evaluate(predictor, few, split).figures.values())).headline

        return score


def spread(count: int, wanted: int) -> list[int]:
    """At most so many places out of a count, evenly spread."""
    return list(dict.fromkeys(index * count // wanted for index in range(min(count, wanted))))


def top1(subject: Subject, images: Tensor, ids: Tensor) -> Callable[[nn.Module], Headline]:
    """Share of images whose class a network names."""

    @torch.no_grad()
    def score(network: nn.Module) -> Headline:
        answers = [network(subject.pixels(part)).argmax(1) for part in images.split(250)]
        return Headline("top1", float((torch.cat(answers) == ids).double().mean()), higher_is_better=True)

    return score


def captured(network: nn.Module, pixels: Tensor) -> Graph:
    """The graph of a network at the size of some images, norms folded; of a single one, for one image at once."""
    return fold_norms(capture(network, pixels, free=frozenset({Axis.BATCH}) if len(pixels) > 1 else frozenset()))


TESTBEDS = {
    each.name: each
    for each in (
        Testbed("cifar_vit", "cifar/vit", "cifar10", 128, 3000),
        Testbed("cifar_swin", "cifar/swin", "cifar10", 128, 3000),
        Testbed("street", "street", "camvid", 32, 58),
        Testbed("camvid_vit", "camvid_semantic_vit/best.ckpt", "half_camvid", 16, 78),
        Testbed("scenes_panoptic", "small_scenes_panoptic_kmax/best.ckpt", "small_scenes_one_camera", 16, 50),
        Testbed("scenes_depth", "small_scenes_depth_polymax/best.ckpt", "small_scenes_one_camera", 16, 50),
    )
}
