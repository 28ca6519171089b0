"""One training step and one validation step of semantic segmentation, for Lightning."""

import math
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from denselab import _vision as _vision  # makes torchvision, and so Lightning, importable beside a CPU torch
from denselab.checkpoint import KEY, ModelCard
from denselab.classes import VOID
from denselab.errors import InputError
from denselab.losses.pixel import LossWeights, pixel_loss
from denselab.metrics.semantic import SemanticFigures, SemanticScore
from denselab.model import DensePredictor
from denselab.tasks.semantic import decode, logits_at_source
from denselab.training.ema import AveragedModel
from denselab.training.options import Decay, FitOptions
from denselab.types import ImageBatch, QueryOutput

# isort: split
from lightning.pytorch import LightningModule

Batch = tuple[ImageBatch, Tensor]


class SemanticModule(LightningModule):
    """A model, its loss, its optimizer, and the averaged weights that are validated.

    figures: of the last validation, None before. Scores are counted with `denselab.metrics` and merged over
    processes, so a validation image counts once however many processes there are.
    """

    def __init__(
        self, model: DensePredictor, card: ModelCard, options: FitOptions, class_weights: Tensor | None = None
    ) -> None:
        super().__init__()
        self.model = channels_last(model)
        self.averaged = AveragedModel(self.model, options.ema_decay)
        self.card, self.options = card, options
        self.loss_weights = LossWeights(**options.loss_weights)
        self.class_weights: Tensor | None
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.score = SemanticScore(len(card.classes), VOID, boundary=False)
        self.figures: SemanticFigures | None = None

    @property
    def evaluated(self) -> DensePredictor:
        """The model with averaged weights."""
        return cast("DensePredictor", self.averaged.model)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of a batch of crops."""
        images, target = batch
        output = in_float32(self.model(images.pixels))
        logits = logits_at_source(output, self.model.spec, (target.shape[-2], target.shape[-1]))
        loss, _ = pixel_loss(logits, target, self.loss_weights, VOID, self.class_weights)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Count the pixels of whole images."""
        images, target = batch
        predicted = predict(self.evaluated, images)
        for ids, truth, (height, width) in zip(predicted.cpu(), target.cpu(), images.source_hw, strict=True):
            self.score.update(ids[:height, :width].numpy(), truth[:height, :width].numpy())

    def on_train_epoch_start(self) -> None:
        """Seed dropout by epoch and process, so that a resumed run repeats what an uninterrupted one does."""
        torch.manual_seed(hash((self.options.seed, self.current_epoch, self.global_rank)))

    def on_validation_epoch_start(self) -> None:
        """Start counting at zero."""
        self.score = SemanticScore(len(self.card.classes), VOID, boundary=False)

    def on_validation_epoch_end(self) -> None:
        """Merge the counts of all processes."""
        if self.trainer.world_size > 1:
            scores: list[Any] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(scores, self.score)
            self.score = scores[0]
            for other in scores[1:]:
                self.score.merge(other)
        self.figures = self.score.compute()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """One step of the optimizer, which the averaged weights follow."""
        super().optimizer_step(*args, **kwargs)
        self.averaged.update(self.model)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW; weights with two or more dimensions decay, biases and norms do not."""
        weights = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim <= 1]
        groups = [
            {"params": weights, "weight_decay": self.options.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.options.lr)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say in plain data what the weights are."""
        score = {"split": "val", "miou": self.figures.miou} if self.figures else None
        checkpoint[KEY] = replace(self.card, score=score).to_dict()

    def transfer_batch_to_device(self, batch: Batch | InputError, device: torch.device, dataloader_idx: int) -> Batch:
        """The batch on the device; a worker's InputError is raised here."""
        if isinstance(batch, InputError):
            raise batch
        images, target = batch
        pixels = images.pixels.to(device, non_blocking=True, memory_format=torch.channels_last)
        return ImageBatch(pixels, images.valid.to(device), images.source_hw), target.to(device, non_blocking=True)


def channels_last(model: DensePredictor) -> DensePredictor:
    """The model with the memory layout in which convolutions are fastest, on CPUs and on tensor cores."""
    for parameter in model.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return model


def in_float32(output: QueryOutput) -> QueryOutput:
    """What autocast computed in 16 bits, in 32 for upsampling and loss."""
    return replace(output, mask_logits=output.mask_logits.float(), values=output.values.float())


def predict(model: DensePredictor, images: ImageBatch) -> Tensor:
    """Class ids [B, H, W]; padding gets the model's mean colour, as the model itself pads with."""
    pixels = torch.where(images.valid[:, None], images.pixels, model.mean)
    height, width = pixels.shape[-2:]
    return decode(in_float32(model(pixels)), model.spec, (height, width))


def learning_rate(options: FitOptions, step: int, progress: float) -> float:
    """The rate after linear warm-up: cosine (Loshchilov & Hutter 2017, eq. 5) or poly (1 - progress)^0.9.

    progress: share of the run that is over. Warm-up ends after `warmup_steps`, or a tenth of the run if that is less.
    """
    warmup = max((step + 1) / (options.warmup_steps + 1), min(progress, 0.1) / 0.1)
    left = 1 - min(progress, 1.0)
    fall = (1 - math.cos(math.pi * left)) / 2 if options.decay is Decay.COSINE else left**0.9
    return options.lr * min(1.0, warmup) * fall
