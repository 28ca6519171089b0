"""What happens around the training loop: pace, interruption, progress, logs, pictures, checkpoints."""

import csv
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, Self

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import Tensor

from denselab import _vision as _vision  # makes torchvision, and so Lightning, importable beside a CPU torch
from denselab.checkpoint import save_atomically
from denselab.data.samples import DenseDataset
from denselab.drawing import contact_sheet
from denselab.errors import InputError
from denselab.files import atomic_path
from denselab.task_scores import numbers, true_result
from denselab.training.loaders import whole_images
from denselab.training.module import Batch, DenseModule, learning_rate, predict, results_of
from denselab.training.options import FitOptions

# isort: split
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO

LAST, BEST, METRICS, PICTURES, TENSORBOARD = "last.ckpt", "best.ckpt", "metrics.csv", "pictures", "tensorboard"
_SAVE_SECONDS = 300.0
_LINE_SECONDS = 5.0
_LOSS_EVERY_STEPS = 20
_PICTURES_SHOWN = 4


Clock = Callable[[], float]
"""Seconds since some moment."""


class InterruptedRunError(Exception):
    """Ctrl-C; the run is saved."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and renames.

    Lightning writes to the temporary folder and moves, which across file systems is a copy that a kill cuts short.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Replace `path` by the new checkpoint."""
        save_atomically(checkpoint, Path(path))


class Pace(Callback):
    """Sets what depends on the share of the run that is over, as the learning rate does, and ends the run by time.

    That share is the larger one of steps and time. spent_s: seconds of training, over all resumed parts; steps: taken
    in this part. clock: what measures the time, such as time.process_time where others use the machine too.
    """

    def __init__(self, options: FitOptions, clock: Clock = time.monotonic) -> None:
        self.options, self.clock = options, clock
        self.spent_s, self.steps = 0.0, 0
        self._before_s, self._start = 0.0, 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock, unless the time is over."""
        self._before_s, self._start = self.spent_s, self.clock()
        self._stop_in_time(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Set the learning rate, and tell the model."""
        progress = trainer.global_step / trainer.estimated_stepping_batches
        if self.options.max_seconds:
            progress = max(progress, self.spent_s / self.options.max_seconds)
        rate = learning_rate(self.options, trainer.global_step, progress)
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = rate * group["share"]
        _module(pl_module).set_progress(min(progress, 1.0))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Read the clock."""
        self.steps += 1
        self.spent_s = _largest(trainer, self._before_s + self.clock() - self._start)
        self._stop_in_time(trainer)

    def _stop_in_time(self, trainer: Trainer) -> None:
        if self.options.max_seconds and self.spent_s >= self.options.max_seconds:
            trainer.should_stop = True

    def state_dict(self) -> dict[str, float]:
        """The time spent."""
        return {"spent_s": self.spent_s}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Go on counting."""
        self.spent_s = state_dict["spent_s"]


class Interrupt(Callback):
    """Within its context, the first Ctrl-C ends the run after the step under way, saved; the second ends it at once.

    It acts after all other callbacks, so an epoch that is over has been logged and saved.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self._requested = False
        self._pid = os.getpid()
        self._previous: Any = None

    def __enter__(self) -> Self:
        """Take over SIGINT."""
        self._previous = signal.signal(signal.SIGINT, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        """Give SIGINT back."""
        signal.signal(signal.SIGINT, self._previous)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a process that loads images
            return
        if self._requested:
            raise KeyboardInterrupt
        self._requested = True
        print("\nstopping after this step or validation (Ctrl-C again: at once) ...", file=sys.stderr, flush=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Save and leave, in every process at the same step; the last step of an epoch waits for its validation."""
        if not trainer.is_last_batch and _largest(trainer, float(self._requested)):
            trainer.save_checkpoint(self.run / LAST)
            raise InterruptedRunError

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave; the epoch is saved."""
        if _largest(trainer, float(self._requested)):
            raise InterruptedRunError


class Meter(Callback):
    """Mean loss and images per second of the epoch under way, and the row that the logs get at its end."""

    def __init__(self, pace: Pace) -> None:
        self.pace = pace
        self.loss, self.images_per_s, self.lr = math.nan, math.nan, math.nan
        self._sum: Tensor | float = 0.0
        self._steps, self._images, self._start = 0, 0, 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start at zero: a resumed run may begin in the middle of an epoch."""
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start at zero."""
        self._sum, self._steps, self._images, self._start = 0.0, 0, 0, time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Count; the loss is fetched now and then only, for that waits for a GPU."""
        self._sum, self._steps = self._sum + outputs["loss"].detach(), self._steps + 1
        self._images += len(batch[0].source_hw) * trainer.world_size
        self.images_per_s = self._images / max(1e-9, time.monotonic() - self._start)
        self.lr = max(group["lr"] for group in trainer.optimizers[0].param_groups)
        due = pl_module.device.type == "cpu" or self._steps % _LOSS_EVERY_STEPS == 1
        if due or trainer.is_last_batch or trainer.should_stop:
            self.loss = float(self._sum) / self._steps
            if not math.isfinite(self.loss):
                raise InputError(
                    f"training: the loss became {self.loss} by step {trainer.global_step}; "
                    "lower --lr, or clip gradients (--clip-norm 1)"
                )

    def row(self, trainer: Trainer, module: DenseModule) -> dict[str, float]:
        """What is logged of an epoch."""
        row = {
            "epoch": trainer.current_epoch + 1,
            "step": trainer.global_step,
            "seconds": round(self.pace.spent_s, 1),
            "lr": self.lr,
            "loss": self.loss,
            "images_per_s": self.images_per_s,
        }
        names = module.card.classes.names if module.card.classes else ()
        for task, figures in module.figures.items():
            prefix = "val_" if len(module.figures) == 1 else f"val_{task}_"
            row |= {prefix + name: value for name, value in numbers(figures.to_dict(names)).items()}
        return row


class Report(Callback):
    """A bar on a terminal, a line every few seconds elsewhere (both on standard error); a line per epoch in both."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._shown = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar."""
        self._shown = time.monotonic()
        if not (trainer.is_global_zero and sys.stderr.isatty()):
            return
        columns = (
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task("", total=int(trainer.num_training_batches), epoch="", numbers="")
        self._bar.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Show where we are."""
        if not trainer.is_global_zero:
            return
        epoch = str(trainer.current_epoch + 1)
        numbers = self._numbers() + (f"  {_headlines(pl_module)}" if _module(pl_module).figures else "")
        if self._bar:
            self._bar.update(self._task, completed=batch_idx + 1, epoch=epoch, numbers=numbers)
        elif time.monotonic() - self._shown >= _LINE_SECONDS:
            self._shown = time.monotonic()
            step = f"{batch_idx + 1}/{trainer.num_training_batches}"
            print(f"epoch {epoch} step {step}  {numbers}", file=sys.stderr, flush=True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say how the epoch went."""
        if not trainer.is_global_zero:
            return
        row = self.meter.row(trainer, _module(pl_module))
        last = f"/{trainer.max_epochs}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
        spent = time.strftime("%H:%M:%S", time.gmtime(row["seconds"]))
        line = f"epoch {row['epoch']}{last}  {self._numbers()}  {_headlines(pl_module)}  {spent}"
        if self._bar:
            self._bar.console.print(line, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def _numbers(self) -> str:
        return f"loss {self.meter.loss:.4f}  lr {self.meter.lr:.1e}  {self.meter.images_per_s:.1f} images/s"

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
        if self._bar:
            self._bar.stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the bar."""
        self.on_train_end(trainer, pl_module)


class RunLog(Callback):
    """One row per epoch in metrics.csv, and the same numbers for TensorBoard. A resumed run goes on in both."""

    def __init__(self, run: Path, meter: Meter) -> None:
        self.run, self.meter = run, meter
        self._rows: list[dict[str, Any]] = []
        self.board: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the rows of epochs that will not be trained again."""
        if not trainer.is_global_zero:
            return
        from torch.utils.tensorboard.writer import SummaryWriter

        path = self.run / METRICS
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                self._rows = [row for row in csv.DictReader(file) if int(row["epoch"]) <= trainer.current_epoch]
        self.board = SummaryWriter(str(self.run / TENSORBOARD), purge_step=trainer.global_step + 1)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the row; the file is replaced whole, so it is never half written."""
        if not trainer.is_global_zero:
            return
        row = self.meter.row(trainer, _module(pl_module))
        self._rows.append({name: f"{value:.6g}" for name, value in row.items()})
        with atomic_path(self.run / METRICS) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(row), restval="", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(self._rows)
        for name, value in row.items():
            self.board.add_scalar(name, value, trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close TensorBoard's file."""
        if self.board:
            self.board.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close TensorBoard's file."""
        self.on_train_end(trainer, pl_module)


class Pictures(Callback):
    """Image, truth and prediction of a few validation images, the same ones each time.

    After the first and the last epoch, and every few between.
    """

    def __init__(self, run: Path, val: DenseDataset, log: RunLog, every_epochs: int) -> None:
        self.run, self.val, self.run_log, self.every_epochs = run, val, log, every_epochs

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw pictures/epoch_NNNN.png."""
        epoch = trainer.current_epoch + 1
        ends = epoch in (1, trainer.max_epochs) or trainer.should_stop
        if not (trainer.is_global_zero and self.every_epochs and (ends or epoch % self.every_epochs == 0)):
            return
        module = _module(pl_module)
        sheet = contact_sheet(self._tiles(module), columns=1 + 2 * len(module.tasks))
        path = self.run / PICTURES / f"epoch_{epoch:04d}.png"
        path.parent.mkdir(exist_ok=True)
        with atomic_path(path) as partial:
            sheet.save(partial)
        self.run_log.board.add_image("validation", np.asarray(sheet), trainer.global_step, dataformats="HWC")

    def _tiles(self, module: DenseModule) -> Sequence[tuple[Any, str]]:
        count = min(_PICTURES_SHOWN, len(self.val))
        tiles: list[tuple[Any, str]] = []
        for index in (i * len(self.val) // count for i in range(count)):
            image, truth = self.val.read(index)
            batch = whole_images([(image, truth)])
            images, _ = module.transfer_batch_to_device(batch, module.device, 0)
            module.evaluated.eval()
            with torch.no_grad():
                answers = predict(module.evaluated, module.tasks, images)
            tiles.append((image, self.val.items[index].image.name))
            for task in module.tasks:
                (result,) = results_of(task.name, answers[task.name], images, module.card.classes)
                wanted = true_result(task.name, truth, module.card.classes)
                tiles.append((np.asarray(wanted.overlay(image, legend=False)), f"{task.name}: truth"))
                tiles.append((np.asarray(result.overlay(image, legend=False)), f"{task.name}: prediction"))
        return tiles


class Checkpoints(Callback):
    """last.ckpt after every epoch and every five minutes, best.ckpt when the first task does better in validation."""

    def __init__(self, run: Path, pace: Pace) -> None:
        self.run, self.pace = run, pace
        self.best: float | None = None
        self._saved_s = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The next save by time is due in five minutes."""
        self._saved_s = self.pace.spent_s

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Save by time."""
        if self.pace.spent_s - self._saved_s >= _SAVE_SECONDS and not trainer.is_last_batch:
            self._save(trainer, LAST)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the epoch."""
        figures = _module(pl_module).figures
        if figures:
            headline = next(iter(figures.values())).headline
            before = None if self.best is None else replace(headline, value=self.best)
            if before is None or headline.better_than(before) or not (self.run / BEST).exists():
                self.best = headline.value
                self._save(trainer, BEST)
        self._save(trainer, LAST)

    def _save(self, trainer: Trainer, name: str) -> None:
        trainer.save_checkpoint(self.run / name, weights_only=name == BEST)
        self._saved_s = self.pace.spent_s

    def state_dict(self) -> dict[str, float | None]:
        """The best score so far."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, float | None]) -> None:
        """Only a better one replaces best.ckpt."""
        self.best = state_dict["best"]


def _module(module: LightningModule) -> DenseModule:
    assert isinstance(module, DenseModule)
    return module


def _headlines(module: LightningModule) -> str:
    """The main figure of every task."""
    headlines = [figures.headline for figures in _module(module).figures.values()]
    return "  ".join(f"val {each.name} {each.value:.4f}" for each in headlines) or "val -"


def _largest(trainer: Trainer, value: float) -> float:
    """The largest value of all processes, so that all decide alike."""
    if trainer.world_size == 1:
        return value
    return float(trainer.strategy.reduce(torch.tensor(value, device=trainer.strategy.root_device), reduce_op="max"))
