"""denselab evaluate: a model against a split of a data set."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from denselab.errors import InputError
from denselab.files import atomic_path

if TYPE_CHECKING:
    from denselab.classes import Classes
    from denselab.metrics.semantic import SemanticFigures


def evaluate(
    data: Annotated[Path, typer.Option(help="Folder with images and masks.")],
    model: Annotated[str, typer.Option(help="street, FILE.onnx, FILE.ckpt, hf:NAME or kmax:FILE.")] = "street",
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    engine: Annotated[str, typer.Option(help="auto, openvino or onnxruntime.")] = "auto",
    json_out: Annotated[Path | None, typer.Option("--json", help="Write every figure to this file.")] = None,
    confusion: Annotated[Path | None, typer.Option(help="Draw the confusion matrix to this PNG.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the engine; its own choice if absent.")] = None,
) -> None:
    """Label every image of a split at its own size and score the labels."""
    from denselab._load import load
    from denselab.cli.progress import track
    from denselab.data.descriptor import open_dataset
    from denselab.evaluate import check_classes
    from denselab.evaluate import evaluate as run

    dataset = open_dataset(data)
    dataset.split(split)
    predictor = load(model, engine=engine, threads=threads)
    dataset.require(predictor.info.tasks)
    check_classes(predictor.info.classes, dataset)
    if confusion and "semantic" not in predictor.info.tasks:
        raise InputError(f"--confusion: wanted a model of semantic labels, got one of {predictor.info.task}; drop it")
    for note in dataset.notes:
        print(note)
    evaluation = run(predictor, dataset, split, track)
    print(f"{model} ({predictor.session.engine}), {evaluation.to_text()}")
    try:
        if json_out:
            report = {"model": model, "engine": predictor.session.engine, "data": str(data), **evaluation.to_dict()}
            json_out.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(json_out) as partial:
                partial.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
        if confusion:
            from denselab.metrics.draw import confusion_picture

            figures = cast("SemanticFigures", evaluation.figures["semantic"])
            names = cast("Classes", predictor.info.classes).names
            picture = confusion_picture(figures.confusion, names)
            confusion.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(confusion) as partial:
                picture.save(partial, "PNG")
    except OSError as error:
        path = error.filename or json_out or confusion
        raise InputError(f"{path}: cannot be written ({error.strerror or error}); choose another path") from error
