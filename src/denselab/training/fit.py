"""A training run from options to evaluated checkpoint, read from top to bottom."""

import errno
import json
import logging
import os
import shutil
import time
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from denselab import _vision as _vision  # makes torchvision, and so Lightning, importable beside a CPU torch
from denselab.checkpoint import KEY, ModelCard, note_score, read_checkpoint
from denselab.data.augment import training_views
from denselab.data.dataset import Dataset
from denselab.data.descriptor import open_dataset
from denselab.data.samples import DenseDataset, SampleKey, collate
from denselab.errors import InputError
from denselab.evaluate import Evaluation, Track, evaluate, untracked
from denselab.export.torch_session import load_predictor
from denselab.files import atomic_path
from denselab.losses.pixel import LossWeights, inverse_log_weights
from denselab.losses.remax import ReMax
from denselab.model import JointPredictor, Model
from denselab.runtime.images import read_size
from denselab.tasks.task import InstanceTask, PanopticTask, SemanticTask, Task, make_task
from denselab.training.callbacks import (
    BEST,
    LAST,
    METRICS,
    PICTURES,
    TENSORBOARD,
    AtomicCheckpointIO,
    Checkpoints,
    Clock,
    Interrupt,
    InterruptedRunError,
    Meter,
    Pace,
    Pictures,
    Report,
    RunLog,
)
from denselab.training.loaders import Loaders
from denselab.training.module import DenseModule
from denselab.training.options import ClassWeighting, FitOptions, Precision
from denselab.training.start import start_from
from denselab.types import ValueKind
from denselab.zoo import build

# isort: split
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Callback, Trainer

RUN_FILE, EVALUATION = "run.yaml", "evaluation.json"
_WRITTEN = (RUN_FILE, EVALUATION, LAST, BEST, METRICS, PICTURES, TENSORBOARD)
_LARGEST_CROP_PX = 512
_WEIGHED_IMAGES = 500


def fit(
    options: FitOptions,
    resume: bool = False,
    overwrite: bool = False,
    track: Track = untracked,
    clock: Clock = time.monotonic,
) -> Evaluation | None:
    """Train, keep the best checkpoint, evaluate it on the test split (val if there is none).

    resume: go on from `last.ckpt` in the run folder; overwrite: throw away a run that is there; track: shows the
    progress of the evaluation; clock: measures the time that `max_time` limits.
    Returns None where Ctrl-C ended the run, and in all processes but the first.
    Raises InputError for options, data or checkpoints that cannot be used, before training where that shows before,
    and for a full disk.
    """
    run = Path(options.out)
    dataset = open_dataset(options.data)
    dataset.require(options.tasks)
    train, val = open_splits(dataset, options)
    options = resolve(options, train)
    card = ModelCard(
        tasks=options.tasks,
        model=options.model,
        choices=options.choices,
        classes=dataset.classes,
        train_hw=usual_hw(train),
        score=None,
        licence=options.licence,
    )
    torch.manual_seed(options.seed)
    model = build(
        options.model, options.tasks, len(dataset.classes or ()), options.choices, pretrained=options.pretrained
    )
    started = start_from(model, options.start, first_images(train)) if options.start else ""
    module = DenseModule(model, card, options, make_tasks(options, train, model))
    last = open_run(run, card, resume, overwrite)
    describe(dataset, train, val, module)
    if started:
        say(started)

    pace, interrupt = Pace(options, clock), Interrupt(run)
    trainer = make_trainer(options, callbacks(options, pace, interrupt, val))
    if trainer.is_global_zero:
        options.save(run / RUN_FILE)
    try:
        with quiet(), interrupt:
            trainer.fit(module, datamodule=Loaders(train, val, options), ckpt_path=last, weights_only=True)
    except InterruptedRunError:
        say(f"interrupted and saved; go on with: denselab fit -o {run} --resume")
        return None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(f"{run}: the disk is full; free some space and go on with --resume") from error
    except ValueError as error:
        if "Expected more than 1 value per channel" not in str(error):
            raise
        raise InputError(
            f"batch_size: {options.model} normalises image-wide features over the batch and needs at least 2 images "
            f"per step, got {min(options.batch_size, len(train))}; raise --batch-size or add images"
        ) from error
    if last and not pace.steps:
        say("nothing left to train; raise --epochs or --max-time to go on")
    return final_evaluation(run, dataset, track) if trainer.is_global_zero else None


def open_splits(dataset: Dataset, options: FitOptions) -> tuple[DenseDataset, DenseDataset]:
    """Train and val, their images decoded into memory if all fit, else the first few tried. Raises InputError."""
    for split in ("train", "val"):
        if not dataset.splits.get(split):
            raise InputError(
                f"{dataset.root}: wanted at least one image to train and one to validate, got none in {split} "
                f"({', '.join(f'{len(items)} in {name}' for name, items in dataset.splits.items()) or 'no split'}); "
                "add images"
            )
    train, val = (DenseDataset(dataset, dataset.split(split), options.tasks) for split in ("train", "val"))
    for samples in (train, val):
        if not samples.decode_all(options.cache_mb * 1e6 * len(samples) / (len(train) + len(val))):
            for index in range(min(4, len(samples))):
                samples.read(index)
    return train, val


def resolve(options: FitOptions, train: DenseDataset) -> FitOptions:
    """Fill in what the data or other options decide, and set the training views."""
    if options.epochs is None and options.max_time is None:
        options = replace(options, epochs=60)
    if options.crop_hw is None:
        height, width = (min(side, _LARGEST_CROP_PX) for side in train.read(0)[0].shape[:2])
        options = replace(options, crop=f"{width}x{height}")
    train.views = training_views(cast("tuple[int, int]", options.crop_hw), options.zoom, options.flip, options.jitter)
    train.copy_paste = options.copy_paste
    return replace(options, data=str(Path(options.data).resolve()))


def make_tasks(options: FitOptions, train: DenseDataset, model: Model) -> tuple[Task, ...]:
    """The tasks, with the losses that the options ask for. Raises InputError for those the model has no use for."""
    tasks = tuple(make_task(name, train.dataset.classes) for name in options.tasks)
    weights = class_weights(train, options.class_weights) if "semantic" in options.tasks else None
    class_loss = LossWeights(**options.loss_weights) if options.loss else None
    if options.remax and options.model != "kmax":
        raise InputError(f"remax: wanted a model whose masks compete (kmax), got {options.model}; drop --remax")

    specs = model.specs.values() if isinstance(model, JointPredictor) else [model.spec]
    if options.loss and all(spec.value_kind is ValueKind.CLASS_LOGITS for spec in specs):
        raise InputError(
            f"loss: wanted none for {options.model}, whose masks have losses of their own, got {options.loss}; "
            "drop --loss"
        )

    def with_losses(task: Task) -> Task:
        match task:
            case SemanticTask():
                return replace(task, class_loss=class_loss, class_weights=weights)
            case PanopticTask() | InstanceTask():
                return replace(task, remax=ReMax() if options.remax else None, class_loss=class_loss)
            case _:
                return task

    return tuple(map(with_losses, tasks))


def open_run(run: Path, card: ModelCard, resume: bool, overwrite: bool) -> Path | None:
    """Make the run folder ready in the first process; the checkpoint to resume from, if any. Raises InputError."""
    last = run / LAST if resume and (run / LAST).exists() else None
    if last:
        check_same_model(last, card)
    if getattr(rank_zero_only, "rank", 0) != 0:
        return last
    if resume and not (run / RUN_FILE).exists():
        raise InputError(f"{run}: wanted a run to resume, got a folder without {RUN_FILE}; start without --resume")
    try:
        if not resume and run.exists() and any(run.iterdir()):
            if not overwrite:
                raise InputError(
                    f"{run}: wanted a new or empty run folder, got one that holds files; go on with --resume, "
                    "start again with --overwrite, or choose another -o"
                )
            for name in _WRITTEN:
                shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink(missing_ok=True)
        run.mkdir(parents=True, exist_ok=True)
        for partial in run.glob(".*.part.*"):  # of a run that was killed
            partial.unlink()
    except OSError as error:
        raise InputError(f"{run}: cannot be written ({error.strerror or error}); choose another -o") from error
    return last


def check_same_model(last: Path, card: ModelCard) -> None:
    """Raise InputError where the run to resume trains another model, or other classes."""
    saved, wanted = ModelCard.from_dict(read_checkpoint(last)[KEY]), card
    for name in ("tasks", "model", "choices"):
        if getattr(saved, name) != getattr(wanted, name):
            raise InputError(
                f"{last}: {name} is {getattr(saved, name)}, got {getattr(wanted, name)}; "
                "a resumed run keeps its model: drop the option, or start a new run with another -o"
            )
    names = [card.classes.names if card.classes else ("none",) for card in (saved, wanted)]
    if names[0] != names[1]:
        raise InputError(
            f"{last}: trained for the classes {', '.join(names[0])}, the data has {', '.join(names[1])}; "
            "resume with the same data, or start a new run with another -o"
        )


def first_images(train: DenseDataset) -> Tensor:
    """A batch [B, 3, H, W] of up to 16 training views, evenly spread. Raises InputError for a file of no use."""
    step = -(-len(train) // 16)
    batch = collate([train[SampleKey(index, index)] for index in range(0, len(train), step)])
    if isinstance(batch, InputError):
        raise batch
    return batch[0].pixels


def usual_hw(train: DenseDataset) -> tuple[int, int]:
    """Height and width in px of the image with the median long side among up to 100, evenly spread."""
    sizes = [read_size(item.image) for item in train.items[:: -(-len(train) // 100)]]
    return sorted(sizes, key=max)[len(sizes) // 2]


def class_weights(train: DenseDataset, weighting: ClassWeighting) -> Tensor | None:
    """Weights [K] of the cross entropy, from the labels of up to 500 training images, evenly spread."""
    if weighting is ClassWeighting.NONE:
        return None
    counts = np.zeros(256, np.int64)
    for index in range(0, len(train), -(-len(train) // _WEIGHED_IMAGES)):
        class_ids = train.read(index)[1].class_ids
        assert class_ids is not None
        counts += np.bincount(class_ids.ravel(), minlength=256)
    return inverse_log_weights(torch.from_numpy(counts[: len(train.dataset.classes or ())]).float())


def describe(dataset: Dataset, train: DenseDataset, val: DenseDataset, module: DenseModule) -> None:
    """Say what is about to be trained on what."""
    for note in dataset.notes:
        say(note)
    options, parameters = module.options, sum(p.numel() for p in module.model.parameters())
    backbone = f" with {options.backbone}" if options.backbone else ""
    classes = f"{len(dataset.classes)} classes, " if dataset.classes else ""
    say(
        f"{options.task}: {options.model}{backbone}, {parameters / 1e6:.2f} M parameters; {classes}"
        f"{len(train)} images to train, {len(val)} to validate, crops of {options.crop}"
        f"{', in memory' if train.decoded else ''}"
    )


def callbacks(options: FitOptions, pace: Pace, interrupt: Interrupt, val: DenseDataset) -> list[Callback]:
    """In the order in which they act: checkpoints come last and hold the state of all."""
    run, meter = Path(options.out), Meter(pace)
    log = RunLog(run, meter)
    pictures = Pictures(run, val, log, options.picture_epochs)
    return [pace, meter, Report(meter), log, pictures, Checkpoints(run, pace), interrupt]


def make_trainer(options: FitOptions, callbacks: list[Callback]) -> Trainer:
    """Lightning's trainer; it finds GPUs and SLURM by itself, and torchrun says how many processes there are."""
    devices, nodes = options.devices or "auto", options.nodes
    if "TORCHELASTIC_RUN_ID" in os.environ:
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // devices
    with quiet():
        return Trainer(
            max_epochs=options.epochs or -1,
            devices=devices,
            num_nodes=nodes,
            precision=cast("Any", lightning_precision(options.precision)),
            gradient_clip_val=options.clip_norm or None,
            callbacks=callbacks,
            plugins=[AtomicCheckpointIO()],
            default_root_dir=options.out,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            sync_batchnorm=torch.cuda.is_available(),
        )


def lightning_precision(precision: Precision) -> str:
    """What Lightning calls it; `auto` is bf16 where the processor multiplies it in hardware, else fp16 on GPUs."""
    if precision is Precision.AUTO:
        if torch.cuda.is_available():
            precision = Precision.BF16 if torch.cuda.is_bf16_supported(including_emulation=False) else Precision.FP16
        else:
            has_bf16 = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))
            precision = Precision.BF16 if has_bf16 and not torch.backends.mps.is_available() else Precision.FP32
    return {Precision.FP32: "32-true", Precision.BF16: "bf16-mixed", Precision.FP16: "16-mixed"}[precision]


def final_evaluation(run: Path, dataset: Dataset, track: Track) -> Evaluation:
    """Figures of the best checkpoint at full size, written into it and into evaluation.json."""
    best = run / (BEST if (run / BEST).exists() else LAST)
    predictor = load_predictor(best)
    split = "test" if dataset.splits.get("test") else "val"
    evaluation = evaluate(predictor, dataset, split, track)
    with atomic_path(run / EVALUATION) as partial:
        partial.write_text(json.dumps({"checkpoint": best.name, **evaluation.to_dict()}, indent=1) + "\n", "utf-8")
    note_score(best, {"split": split, **evaluation.headlines(), "images": evaluation.images})
    return evaluation


@contextmanager
def quiet() -> Generator[None]:
    """Without Lightning's tips and its warnings about what is meant here."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning|torch")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@rank_zero_only
def say(text: str) -> None:
    """Print in the first process."""
    print(text, flush=True)
