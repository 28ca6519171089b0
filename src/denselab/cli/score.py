"""denselab score: label pictures against the truth, without any model."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from denselab.errors import InputError

if TYPE_CHECKING:
    from denselab.metrics import SemanticScore

LABELS, OVERLAY = ".labels", ".overlay"
_SHOWN = 10


def score(
    pred: Annotated[
        Path, typer.Option(help="Folder of predicted label PNGs: x.labels.png, as predict writes them, or x.png.")
    ],
    gt: Annotated[Path, typer.Option(help="Folder of true label PNGs, with the same names and subfolders.")],
    task: Annotated[str, typer.Option(help="What the labels are; today: semantic.")] = "semantic",
    num_classes: Annotated[
        int | None, typer.Option(min=1, help="Class ids are 0..N-1; default: as many as names.")
    ] = None,
    ignore: Annotated[str, typer.Option(help="True ids that are not scored, separated by commas.")] = "255",
    names: Annotated[str | None, typer.Option(help="Class names, separated by commas.")] = None,
    classes: Annotated[
        Path | None, typer.Option(help="A dataset.yaml or .json with the names, and ids to ignore too.")
    ] = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write every figure to this file.")] = None,
    confusion: Annotated[Path | None, typer.Option(help="Draw the confusion matrix to this PNG.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes that read and count.")] = 1,
    boundary: Annotated[bool, typer.Option(help="Measure boundary IoU as well.")] = True,
    allow_missing: Annotated[bool, typer.Option(help="Score what matches; leave out files without a partner.")] = False,
) -> None:
    """Score predicted label PNGs (pixel value or palette index = class id) against the truth.

    Counts are taken over the whole data set. A pair that cannot be scored is listed and left out, and the exit code
    is 1.
    """
    from denselab.metrics import SemanticScore

    if task != "semantic":
        raise InputError(f"--task: wanted semantic, the only task that can be scored today, got {task}")
    ignored = _parse_ids(ignore)
    class_names = None if names is None else [name.strip() for name in names.split(",")]
    if classes is not None:
        if class_names is not None:
            raise InputError("--names, --classes: wanted one of them, got both; remove one")
        class_names, also_ignored = _read_classes(classes)
        ignored = sorted({*ignored, *also_ignored})
    num_classes = _class_count(num_classes, class_names)
    class_names = class_names or [str(class_id) for class_id in range(num_classes)]

    pairs, unmatched = _match(pred, gt)
    if unmatched and not allow_missing:
        raise InputError(
            f"{_listed('files without a partner', unmatched)}; add them, or leave them out: --allow-missing"
        )
    counted = SemanticScore(num_classes, ignored, boundary)
    failures = _count(pairs, counted, jobs)

    if len(failures) < len(pairs):
        figures = counted.compute()
        left_out = f", {len(unmatched)} files without a partner left out" if unmatched else ""
        print(f"{figures.to_text(class_names)}\n\n{len(pairs) - len(failures)} pairs{left_out}")
        if json_out is not None:
            report: dict[str, Any] = {
                "task": task,
                "pairs": len(pairs) - len(failures),
                "ignore": ignored,
                **figures.to_dict(class_names),
                "failed": [{"name": name, "error": error} for name, error in failures],
                "unmatched": unmatched,
            }
            _write(json_out, lambda path: path.write_text(json.dumps(report, indent=1) + "\n", "utf-8"))
        if confusion is not None:
            from denselab.metrics.draw import confusion_picture

            picture = confusion_picture(figures.confusion, class_names)
            _write(confusion, lambda path: picture.save(path, "PNG"))
    if failures:
        print(f"{len(failures)} of {len(pairs)} pairs could not be scored:", file=sys.stderr)
        for name, error in failures[:_SHOWN]:
            print(f"  {name}: {error}", file=sys.stderr)
        if len(failures) > _SHOWN:
            print(f"  and {len(failures) - _SHOWN} more", file=sys.stderr)
        raise typer.Exit(1)


@dataclass(frozen=True)
class LabelPair:
    """A predicted and a true label file; name: their path below both folders, without suffix."""

    name: str
    pred: Path
    truth: Path


def _match(pred: Path, gt: Path) -> tuple[list[LabelPair], list[str]]:
    """Pairs by relative stem, and the files of either folder that found no partner."""
    preds, truths = _label_files("--pred", pred), _label_files("--gt", gt)
    pairs = [LabelPair(name, preds[name], truths[name]) for name in truths if name in preds]
    unmatched = [str(truths[name]) for name in truths if name not in preds]
    unmatched += [str(preds[name]) for name in preds if name not in truths]
    if not pairs:
        raise InputError(
            f"--pred, --gt: wanted files of the same name in both folders, got e.g. {preds[min(preds)]} and "
            f"{truths[min(truths)]}; name the folders whose contents correspond"
        )
    return pairs, unmatched


def _label_files(option: str, folder: Path) -> dict[str, Path]:
    """Label PNGs below a folder by relative stem; x.labels.png stands for x, also beside the photo x.png."""
    if not folder.is_dir():
        raise InputError(f"{option}: wanted a folder of label PNGs, got {folder}, which is no folder; check the path")
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder).with_suffix("")
        hidden = any(part.startswith(".") for part in relative.parts)
        if path.suffix.lower() != ".png" or relative.suffix == OVERLAY or hidden:
            continue
        if relative.suffix == LABELS:
            found[relative.with_suffix("").as_posix()] = path
        else:
            found.setdefault(relative.as_posix(), path)
    if not found:
        raise InputError(f"{option}: wanted a folder of label PNGs, got {folder}, which holds none; check the path")
    return found


def _count(pairs: Sequence[LabelPair], total: "SemanticScore", jobs: int) -> list[tuple[str, str]]:
    """Add every pair to `total`; returns name and error of those that could not be counted."""
    from denselab.cli.progress import track

    failures: list[tuple[str, str]] = []
    counting = partial(_count_pair, num_classes=total.num_classes, ignore=total.ignore, boundary=total.boundary)
    results = track(_counted(counting, pairs, jobs), len(pairs), "score")
    for pair, result in zip(pairs, results, strict=True):
        if isinstance(result, str):
            failures.append((pair.name, result))
        else:
            total.merge(result)
    return failures


def _count_pair(pair: LabelPair, num_classes: int, ignore: Sequence[int], boundary: bool) -> "SemanticScore | str":
    """The counts of one pair, or what is wrong with it."""
    from denselab.metrics import SemanticScore
    from denselab.runtime.images import open_labels

    counted = SemanticScore(num_classes, ignore, boundary)
    try:
        counted.update(open_labels(pair.pred), open_labels(pair.truth))
    except InputError as error:
        return str(error)
    return counted


def _counted(
    counting: Callable[[LabelPair], "SemanticScore | str"], pairs: Sequence[LabelPair], jobs: int
) -> "Iterator[SemanticScore | str]":
    """The result of every pair in order, from this process or from `jobs` others."""
    if jobs == 1:
        yield from map(counting, pairs)
        return
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(counting, pairs, chunksize=8)


def _parse_ids(text: str) -> list[int]:
    try:
        return sorted({int(part) for part in text.split(",") if part.strip()})
    except ValueError as error:
        raise InputError(f"--ignore: wanted class ids separated by commas, such as 11,255, got {text!r}") from error


def _class_count(num_classes: int | None, class_names: Sequence[str] | None) -> int:
    if num_classes is None and class_names is None:
        raise InputError(
            "--num-classes: wanted how many classes there are, got nothing; add it, or --names or --classes"
        )
    if num_classes is not None and class_names is not None and num_classes != len(class_names):
        raise InputError(
            f"--num-classes: wanted as many as there are class names, {len(class_names)}, got {num_classes}; drop it"
        )
    return num_classes if num_classes is not None else len(class_names or ())


def _read_classes(path: Path) -> tuple[list[str], list[int]]:
    """Names of the classes 0..K-1 and the ignored ids that a dataset description gives."""
    import yaml

    try:
        described = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(
            f"--classes: {path}: wanted a YAML or JSON file, got one that does not read: {error}"
        ) from error
    given: Any = cast("dict[str, Any]", described).get("names") if isinstance(described, dict) else None
    if not isinstance(given, list | dict) or not given:
        raise InputError(f"--classes: {path}: wanted names: as a list, or a mapping of id to name, got {given!r}")
    ignored: Any = described.get("ignore", [])
    ignored = ignored if isinstance(ignored, list) else [ignored]
    by_id: dict[Any, Any] = dict(enumerate(given)) if isinstance(given, list) else given
    try:
        named = {int(class_id): str(name) for class_id, name in by_id.items()}
        dropped = [int(class_id) for class_id in ignored]
    except (TypeError, ValueError) as error:
        raise InputError(f"--classes: {path}: wanted whole numbers as class ids, got another: {error}") from error
    kept = sorted(class_id for class_id in named if class_id not in dropped)
    if kept != list(range(len(kept))):
        raise InputError(
            f"--classes: {path}: wanted the ids 0..{len(kept) - 1} for {len(kept)} names, got {kept}; "
            "score reads class ids as they are in the files, so number the classes from 0"
        )
    return [named[class_id] for class_id in kept], dropped


def _write(path: Path, write: Callable[[Path], object]) -> None:
    from denselab.files import atomic_path

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as partial_path:
            write(partial_path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error}); choose another path") from error


def _listed(what: str, items: Sequence[str]) -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return f"{len(items)} {what}: {', '.join(items[:_SHOWN])}{more}"
