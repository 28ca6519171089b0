"""One training step and one validation step of any tasks, for Lightning."""

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from denselab import _vision as _vision  # makes torchvision, and so Lightning, importable beside a CPU torch
from denselab.checkpoint import KEY, ModelCard
from denselab.classes import Classes
from denselab.data.truth import Truth
from denselab.errors import InputError
from denselab.metrics.headline import Figures
from denselab.model import Model, head_outputs
from denselab.results import Result
from denselab.runtime.answers import PER_PIXEL, outputs_of, to_result
from denselab.task_scores import Score, count, new_score
from denselab.tasks.task import Task
from denselab.training.ema import AveragedModel
from denselab.training.options import Decay, FitOptions
from denselab.types import ImageBatch, QueryOutput, Scheduled, Targets

# isort: split
from lightning.pytorch import LightningModule

Batch = tuple[ImageBatch, Targets]


class DenseModule(LightningModule):
    """A model, its tasks with their losses, its optimizer, and the averaged weights that are validated.

    figures: by task, of the last validation; empty before. Scores are counted with `denselab.metrics` and merged over
    processes, so a validation image counts once however many processes there are.
    """

    def __init__(self, model: Model, card: ModelCard, options: FitOptions, tasks: tuple[Task, ...]) -> None:
        super().__init__()
        self.model = channels_last(model)
        self.averaged = AveragedModel(self.model, options.ema_decay)
        self.card, self.options, self.tasks = card, options, tasks
        self.scores: dict[str, Score] = {}
        self.figures: dict[str, Figures] = {}

    @property
    def evaluated(self) -> Model:
        """The model with averaged weights."""
        return cast("Model", self.averaged.model)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The weighted sum of the losses of all tasks on a batch of crops."""
        images, targets = batch
        weights = self.options.task_weights
        outputs = head_outputs(self.model, self.card.tasks, images.pixels)
        with torch.autocast(self.device.type, enabled=False):
            losses = [
                weights[t.name] * t.loss(in_float32(outputs[t.name][0]), outputs[t.name][1], targets)[0]
                for t in self.tasks
            ]
            return torch.stack(losses).sum()

    def validation_step(self, batch: tuple[ImageBatch, tuple[Truth, ...]], batch_idx: int) -> None:
        """Score whole images."""
        images, truths = batch
        for task, answers in predict(self.evaluated, self.tasks, images).items():
            for result, truth in zip(results_of(task, answers, images, self.card.classes), truths, strict=True):
                count(self.scores[task], result, truth)

    def on_train_epoch_start(self) -> None:
        """Seed dropout by epoch and process, so that a resumed run repeats what an uninterrupted one does."""
        torch.manual_seed(hash((self.options.seed, self.current_epoch, self.global_rank)))

    def set_progress(self, progress: float) -> None:
        """Tell the parts that change over a run how much of it is over, 0..1."""
        for part in self.model.modules():
            if isinstance(part, Scheduled):
                part.set_progress(progress)

    def on_validation_epoch_start(self) -> None:
        """Start counting at zero."""
        self.scores = {task.name: new_score(task.name, self.card.classes, boundary=False) for task in self.tasks}

    def on_validation_epoch_end(self) -> None:
        """Merge the counts of all processes."""
        if self.trainer.world_size > 1:
            gathered: list[Any] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(gathered, self.scores)
            self.scores = gathered[0]
            for other in gathered[1:]:
                for task, score in self.scores.items():
                    cast("Any", score).merge(other[task])
        self.figures = {task: score.compute() for task, score in self.scores.items()}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """One step of the optimizer, which the averaged weights follow."""
        super().optimizer_step(*args, **kwargs)
        self.averaged.update(self.model)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW; weights with two or more dimensions decay, biases and norms do not.

        share: of the learning rate, which `Pace` sets.
        """
        groups: defaultdict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
        for name, parameter in self.model.named_parameters():
            share = self.options.backbone_lr if name.startswith("backbone.") else 1.0
            groups[share, self.options.weight_decay if parameter.ndim > 1 else 0.0].append(parameter)
        return torch.optim.AdamW(
            [{"params": params, "weight_decay": decay, "share": share} for (share, decay), params in groups.items()],
            lr=self.options.lr,
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say in plain data what the weights are."""
        figures = {f.headline.name: f.headline.value for f in self.figures.values()}
        checkpoint[KEY] = replace(self.card, score={"split": "val", **figures} if figures else None).to_dict()

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """The batch on the device; a worker's InputError is raised here."""
        if isinstance(batch, InputError):
            raise batch
        images, targets = batch
        pixels = images.pixels.to(device, non_blocking=True, memory_format=torch.channels_last)
        moved = ImageBatch(pixels, images.valid.to(device), images.source_hw)
        return moved, targets.to(device) if isinstance(targets, Targets) else targets


def channels_last(model: Model) -> Model:
    """The model with the memory layout in which convolutions are fastest, on CPUs and on tensor cores."""
    for parameter in model.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return model


def in_float32(output: QueryOutput) -> QueryOutput:
    """What autocast computed in 16 bits, in 32 for upsampling and loss."""
    return QueryOutput(
        output.mask_logits.float(),
        output.values.float(),
        None if output.pixel_embed is None else output.pixel_embed.float(),
        tuple(map(in_float32, output.aux)),
    )


def predict(model: Model, tasks: tuple[Task, ...], images: ImageBatch) -> dict[str, tuple[Tensor, ...]]:
    """Answers of every task; padding gets the model's mean colour, as the model itself pads with."""
    pixels = torch.where(images.valid[:, None], images.pixels, model.mean)
    size_hw = (pixels.shape[-2], pixels.shape[-1])
    heads = head_outputs(model, tuple(task.name for task in tasks), pixels)
    with torch.autocast(pixels.device.type, enabled=False):
        return {t.name: t.decode(in_float32(heads[t.name][0]), heads[t.name][1], size_hw) for t in tasks}


def results_of(task: str, answers: tuple[Tensor, ...], images: ImageBatch, classes: Classes | None) -> Iterator[Result]:
    """The result of every image of a batch, its padding cut off."""
    names = outputs_of(task)
    for index, (height, width) in enumerate(images.source_hw):
        arrays = {name: answer[index].cpu().numpy() for name, answer in zip(names, answers, strict=True)}
        cut = {name: a[..., :height, :width] if name in PER_PIXEL else a for name, a in arrays.items()}
        yield to_result(task, cut, classes)


def learning_rate(options: FitOptions, step: int, progress: float) -> float:
    """The rate after linear warm-up: cosine (Loshchilov & Hutter 2017, eq. 5) or poly (1 - progress)^0.9.

    progress: share of the run that is over. Warm-up ends after `warmup_steps`, or a tenth of the run if that is less.
    """
    warmup = max((step + 1) / (options.warmup_steps + 1), min(progress, 0.1) / 0.1)
    left = 1 - min(progress, 1.0)
    fall = (1 - math.cos(math.pi * left)) / 2 if options.decay is Decay.COSINE else left**0.9
    return options.lr * min(1.0, warmup) * fall
