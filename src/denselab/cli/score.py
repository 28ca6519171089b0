"""denselab score: predictions in files against the truth in files, without any model."""

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from denselab.errors import InputError
from denselab.runtime.artifact import TASKS

if TYPE_CHECKING:
    from denselab.scoring.count import Failure, Scored

MIN_DEPTH_M, MAX_DEPTH_M = 1e-3, 80.0
_SHOWN = 10
_OPTIONS_OF: Mapping[str, tuple[str, ...]] = {
    "semantic": (
        "--num-classes", "--ignore", "--names", "--classes", "--confusion", "--boundary", "--confidence", "--plot",
    ),
    "panoptic": ("--pred-masks", "--gt-masks", "--boundary"),
    "instance": ("--boundary",),
    "depth": ("--scale", "--pred-scale", "--invalid", "--min-depth", "--max-depth", "--align"),
    "normals": (),
}  # fmt: skip


def score(
    pred: Annotated[
        Path,
        typer.Option(
            help="Predictions. semantic, depth, normals: a folder, as predict writes it (x.labels.png, or "
            "x.TASK.labels.png of several tasks) or of plain names (x.png, x.npy, x.npz). panoptic: a COCO panoptic "
            "JSON. instance: a COCO result list."
        ),
    ],
    gt: Annotated[
        Path, typer.Option(help="The truth: a folder with the same names and subfolders, or a COCO annotation JSON.")
    ],
    task: Annotated[str, typer.Option(help=f"What is scored: {', '.join(TASKS)}.")] = "semantic",
    num_classes: Annotated[
        int | None, typer.Option(min=1, help="semantic: class ids are 0..N-1; default: as many as names.")
    ] = None,
    ignore: Annotated[
        str | None, typer.Option(help="semantic: true ids that are not scored, separated by commas; default: 255.")
    ] = None,
    names: Annotated[str | None, typer.Option(help="semantic: class names, separated by commas.")] = None,
    classes: Annotated[
        Path | None, typer.Option(help="semantic: a dataset.yaml or .json with the names, and ids to ignore too.")
    ] = None,
    confidence: Annotated[
        Path | None,
        typer.Option(
            help="semantic: a folder of confidences, named as the predictions; then calibration is scored too. Grey "
            "PNGs of 8 or 16 bits (255 or 65535 is sure) or arrays: [H, W] of the predicted class, or [K, H, W] of all."
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="semantic, with --confidence: draw accuracy over confidence to this PNG.")
    ] = None,
    pred_masks: Annotated[
        Path | None, typer.Option(help="panoptic: folder of the predicted PNGs; default: PRED without .json.")
    ] = None,
    gt_masks: Annotated[
        Path | None, typer.Option(help="panoptic: folder of the true PNGs; default: GT without .json.")
    ] = None,
    scale: Annotated[
        float | None, typer.Option(help="depth: metres per unit of integer files, e.g. 0.001; floats are metres.")
    ] = None,
    pred_scale: Annotated[
        float | None, typer.Option(help="depth: metres per unit of the predictions, where they differ.")
    ] = None,
    invalid: Annotated[
        str | None, typer.Option(help="depth: stored true values that mean unknown, besides 0, e.g. 65535.")
    ] = None,
    min_depth: Annotated[
        float | None, typer.Option(help=f"depth: nearer true metres do not count; default: {MIN_DEPTH_M:g}.")
    ] = None,
    max_depth: Annotated[
        float | None, typer.Option(help=f"depth: farther true metres do not count; default: {MAX_DEPTH_M:g}.")
    ] = None,
    align: Annotated[
        str | None,
        typer.Option(
            help="depth: fit each prediction to its truth first: none, median, scale_shift, or inverse, "
            "where predictions are relative inverse depth, as predict writes it of models of relative depth."
        ),
    ] = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write every figure to this file.")] = None,
    confusion: Annotated[Path | None, typer.Option(help="semantic: draw the confusion matrix to this PNG.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes that read and count.")] = 1,
    boundary: Annotated[
        bool | None,
        typer.Option(help="Count by boundaries as well; default: semantic yes, panoptic and instance no."),
    ] = None,
    allow_missing: Annotated[bool, typer.Option(help="Score what matches; leave out what has no partner.")] = False,
) -> None:
    """Score predictions in files against the truth, for the whole data set.

    A file or image that cannot be scored is listed and left out, and the exit code is 1.
    """
    from denselab.cli.progress import track
    from denselab.metrics.depth import Align

    if task not in TASKS:
        raise InputError(f"--task: wanted one of {', '.join(TASKS)}, got {task}")
    given = {
        "--num-classes": num_classes, "--ignore": ignore, "--names": names, "--classes": classes,
        "--confusion": confusion, "--boundary": boundary, "--confidence": confidence, "--plot": plot,
        "--pred-masks": pred_masks, "--gt-masks": gt_masks, "--scale": scale, "--pred-scale": pred_scale,
        "--invalid": invalid, "--min-depth": min_depth, "--max-depth": max_depth, "--align": align,
    }  # fmt: skip
    _refuse_strange(task, [option for option, value in given.items() if value is not None])

    match task:
        case "semantic":
            from denselab.scoring.semantic import score_semantic

            if plot is not None and confidence is None:
                raise InputError("--plot: wanted confidences to draw, got none; give their folder with --confidence")
            class_names, ignored = _read_class_options(num_classes, names, classes, "255" if ignore is None else ignore)
            scored = score_semantic(
                pred, gt, class_names, ignored, boundary is not False, jobs, allow_missing, track, confidence
            )
        case "panoptic":
            from denselab.scoring.panoptic import PanopticFiles, score_panoptic

            scored = score_panoptic(
                PanopticFiles(pred, pred_masks), PanopticFiles(gt, gt_masks), bool(boundary), jobs, allow_missing, track
            )
        case "instance":
            from denselab.scoring.instance import score_instance

            scored = score_instance(pred, gt, allow_missing, bool(boundary))
        case "depth":
            from denselab.scoring.depth import DepthScale, parse_invalid, score_depth

            if align is not None and align not in {how.value for how in Align}:
                raise InputError(f"--align: wanted {', '.join(how.value for how in Align)}, got {align}")
            scored = score_depth(
                pred,
                gt,
                DepthScale(scale, pred_scale, parse_invalid((invalid or "").split(","))),
                MIN_DEPTH_M if min_depth is None else min_depth,
                MAX_DEPTH_M if max_depth is None else max_depth,
                Align(align or "none"),
                jobs,
                allow_missing,
                track,
            )
        case _:
            from denselab.scoring.normals import score_normals

            scored = score_normals(pred, gt, jobs, allow_missing, track)

    if scored.counted:
        _report(task, scored, json_out)
        if confusion is not None:
            _draw(scored, confusion)
        if plot is not None:
            _draw_calibration(scored, plot)
    _end(scored.failures, scored.counted)


def _refuse_strange(task: str, given: Iterable[str]) -> None:
    """Raise InputError for an option that the task does not have."""
    for option in given:
        if option not in _OPTIONS_OF[task]:
            tasks = ", ".join(name for name in TASKS if option in _OPTIONS_OF[name])
            raise InputError(f"{option}: wanted only with --task {tasks}, got it with {task}; leave it out")


def _report(task: str, scored: "Scored", json_out: Path | None) -> None:
    left_out = f", {len(scored.unmatched)} {_LEFT_OUT[task]} left out" if scored.unmatched else ""
    tables = [scored.figures.to_text(scored.class_names)]
    if scored.calibration is not None:
        tables.append(scored.calibration.to_text())
    print("\n\n".join([*tables, f"{scored.counted} {_COUNTED[task]}{left_out}"]))
    if json_out is not None:
        report: dict[str, Any] = {
            "task": task,
            "pairs": scored.counted,
            **scored.settings,
            **scored.figures.to_dict(scored.class_names),
            **({} if scored.calibration is None else {"calibration": scored.calibration.to_dict()}),
            "failed": [vars(failure) for failure in scored.failures],
            "unmatched": list(scored.unmatched),
        }
        _write(json_out, lambda path: path.write_text(json.dumps(report, indent=1) + "\n", "utf-8"))


_COUNTED = {"instance": "images"} | dict.fromkeys(("semantic", "panoptic", "depth", "normals"), "pairs")
_LEFT_OUT = {
    "panoptic": "images without a partner",
    "instance": "images or categories without a partner",
} | dict.fromkeys(("semantic", "depth", "normals"), "files without a partner")


def _draw(scored: "Scored", path: Path) -> None:
    from denselab.metrics.draw import confusion_picture
    from denselab.metrics.semantic import SemanticFigures

    assert isinstance(scored.figures, SemanticFigures)
    picture = confusion_picture(scored.figures.confusion, scored.class_names or ())
    _write(path, lambda partial: picture.save(partial, "PNG"))


def _draw_calibration(scored: "Scored", path: Path) -> None:
    from denselab.metrics.draw import reliability_picture

    assert scored.calibration is not None
    picture = reliability_picture(scored.calibration)
    _write(path, lambda partial: picture.save(partial, "PNG"))


def _end(failures: "Sequence[Failure]", counted: int) -> None:
    """List what could not be scored, and exit with 1 if anything."""
    if failures:
        total = counted + len(failures)
        print(f"{len(failures)} of {total} pairs could not be scored:", file=sys.stderr)
        for failure in failures[:_SHOWN]:
            print(f"  {failure.name}: {failure.error}", file=sys.stderr)
        if len(failures) > _SHOWN:
            print(f"  and {len(failures) - _SHOWN} more", file=sys.stderr)
        raise typer.Exit(1)


def _read_class_options(
    num_classes: int | None, names: str | None, classes: Path | None, ignore: str
) -> tuple[list[str], list[int]]:
    """Class names and ignored ids that the options of semantic say."""
    ignored = _parse_ids(ignore)
    class_names = None if names is None else [name.strip() for name in names.split(",")]
    if classes is not None:
        if class_names is not None:
            raise InputError("--names, --classes: wanted one of them, got both; remove one")
        class_names, also_ignored = _read_classes(classes)
        ignored = sorted({*ignored, *also_ignored})
    num_classes = _class_count(num_classes, class_names)
    return class_names or [str(class_id) for class_id in range(num_classes)], ignored


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
