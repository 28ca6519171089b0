"""denselab export: a checkpoint becomes one file that runs without PyTorch."""

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from denselab.errors import InputError
from denselab.export.precision import Precision

if TYPE_CHECKING:
    from denselab.checkpoint import ModelCard
    from denselab.data.dataset import Dataset

_RUN_FILE = "run.yaml"


def export(
    source: Annotated[str, typer.Argument(metavar="RUN.ckpt", help="Checkpoint of fit, hf:NAME or kmax:FILE.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The artifact to write (.onnx).")],
    precision: Annotated[Precision, typer.Option(help="How numbers are stored (int8: and computed).")] = Precision.FP32,
    data: Annotated[
        Path | None, typer.Option(help="Data folder to calibrate and compare with. [default: the run's own]")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the model. [default: the file's]")] = None,
    licence: Annotated[str | None, typer.Option(help="Licence of the model. [default: the checkpoint's]")] = None,
    network_size: Annotated[
        str | None, typer.Option(help="Run the network at WIDTHxHEIGHT px whatever the photo's size.")
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Images to compare on.")] = 16,
    calibration_images: Annotated[int, typer.Option(min=1, help="Images to calibrate int8 with.")] = 24,
    min_agreement: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Least share of pixels labelled as by torch. [default: fp32 0.999, else 0.97]"),
    ] = None,
    max_score_drop: Annotated[
        float,
        typer.Option(min=0, max=100, help="Most points of the main figure an engine may lose (errors: per cent)."),
    ] = 1.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the artifact if it exists.")] = False,
) -> None:
    """Write a model as one ONNX file: a photo of any size in, the answers at its size out.

    The file is compared with the model on real images in every engine, and not written where they disagree.
    What was compared and measured is printed, and kept in the file. OpenVINO computes in bf16 where the CPU has it;
    in that mode its labels may differ from torch's on 3 % of pixels, held to fp32 it must reach --min-agreement.
    """
    from denselab.data.descriptor import open_dataset
    from denselab.evaluate import check_classes
    from denselab.export.artifact import check_target, export_artifact
    from denselab.export.examples import CALIBRATION_SPLITS, PARITY_SPLITS, from_dataset, from_scenes
    from denselab.export.parity import Limits
    from denselab.export.torch_session import describe, open_model

    check_target(out, overwrite)
    network_hw = _size_hw(network_size)
    loaded = open_model(source)
    network_hw = network_hw or loaded.network_hw
    if loaded.note:
        print(f"note: {loaded.note}", file=sys.stderr)
    if data is not None:
        dataset = open_dataset(data)
        dataset.require(loaded.card.tasks)
        check_classes(loaded.card.classes, dataset)
    else:
        dataset = _dataset_of_run(Path(source), loaded.card)
    info = describe(loaded, name or out.stem, precision)
    if dataset:
        parity = from_dataset(dataset, loaded.card.tasks, PARITY_SPLITS, images)
        calibration = from_dataset(dataset, loaded.card.tasks, CALIBRATION_SPLITS, calibration_images)
    else:
        parity, calibration = from_scenes(0, images), from_scenes(images, calibration_images)
    limits = Limits.of(precision)
    if min_agreement is not None:
        limits = replace(limits, exact=min_agreement, default=min(min_agreement, limits.default))
    receipt = export_artifact(
        loaded.model,
        loaded.card.make_tasks(),
        info if licence is None else replace(info, licence=licence),
        out,
        parity,
        calibration,
        network_hw,
        replace(limits, score_drop=max_score_drop / 100),
        overwrite,
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )
    print(receipt.to_text())
    print(out)


def _dataset_of_run(checkpoint: Path, card: "ModelCard") -> "Dataset | None":
    """The data set that run.yaml beside the checkpoint names, if it still is there and fits the model."""
    from denselab.data.descriptor import open_dataset
    from denselab.evaluate import check_classes
    from denselab.training.options import FitOptions

    run = next(
        (folder / _RUN_FILE for folder in checkpoint.resolve().parents[:2] if (folder / _RUN_FILE).is_file()), None
    )
    try:
        if not run:
            return None
        dataset = open_dataset(FitOptions.load(run)["data"])
        dataset.require(card.tasks)
        check_classes(card.classes, dataset)
    except (InputError, KeyError):
        return None
    return dataset


def _size_hw(size: str | None) -> tuple[int, int] | None:
    if size is None:
        return None
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", size)
    if not match:
        raise InputError(f"--network-size: wanted WIDTHxHEIGHT in px such as 512x512, got {size}")
    return int(match[2]), int(match[1])
