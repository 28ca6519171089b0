"""denselab predict: images in, every pixel labelled."""

import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from denselab.errors import InputError
from denselab.files import FoundImage, find_images

if TYPE_CHECKING:
    from denselab.runtime.pipeline import Job, Outcome, Output
    from denselab.runtime.predictor import LongSide, Predictor


def predict(
    inputs: Annotated[
        list[str], typer.Argument(metavar="INPUT", help="Images, folders (with all below) and patterns.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the results; subfolders are kept.")],
    model: Annotated[str, typer.Option(help="street, FILE.onnx, FILE.ckpt, hf:NAME or kmax:FILE.")] = "street",
    engine: Annotated[str, typer.Option(help="auto, openvino or onnxruntime.")] = "auto",
    write: Annotated[str, typer.Option(help="Any of overlay,labels,json.")] = "overlay,labels,json",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace results that exist.")] = False,
    skip_existing: Annotated[
        bool, typer.Option("--skip-existing", help="Label only images whose results are not all there.")
    ] = False,
    long_side: Annotated[
        str,
        typer.Option(
            help="Largest side the model sees, in px; results keep their size. auto: images over twice as large as "
            "those it learned from are shrunk to their size; native: never shrink (but to 3 million px where the "
            "model does more than semantic labels, for it sees those in one piece)."
        ),
    ] = "auto",
    min_score: Annotated[
        float, typer.Option(min=0, max=1, help="Instances of which the model is less sure are dropped.")
    ] = 0.05,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the engine; its own choice if absent.")] = None,
) -> None:
    """Label every pixel of images, and write an overlay, a label PNG and figures (JSON) for each.

    The label PNG holds class ids, or coded segment ids, numbers of objects, millimetres or normals, as the model's
    task is; a model of several tasks writes a set for each, such as NAME.depth.labels.png.

    Exit code 1 when some inputs failed (the others are written, the failures listed at the end), 2 for misuse.
    """
    from denselab.runtime.pipeline import label_files

    seen_at = _parse_long_side(long_side)
    found, failures = _find(inputs, out)
    outputs = _parse_outputs(write)
    stems = _stems(found, out)
    planned, jobs = [], []
    done: list[Outcome] = []
    start = time.perf_counter()
    if found:
        from denselab._load import load
        from denselab.cli.progress import track

        predictor = load(model, engine, threads, seen_at, min_score)
        planned = _plan(found, stems, out, outputs, predictor.info.tasks)
        jobs = _spare_existing(planned, overwrite, skip_existing)
        _make_writable(out)
        start = time.perf_counter()
        try:
            for outcome in track(label_files(predictor, jobs), len(jobs), "labelling"):
                done.append(outcome)
        except KeyboardInterrupt:
            print(f"interrupted; finished results are in {out}, --skip-existing does the rest", file=sys.stderr)
            raise typer.Exit(130) from None
        _say_what_was_shrunk(done, predictor)
        _say_what_has_no_unit(predictor)
    failures += [_describe(outcome) for outcome in done if outcome.error is not None]
    if len(done) < len(jobs):
        failures.append(f"{len(jobs) - len(done)} more images were not labelled: the disk of {out} is full")
    labelled = sum(outcome.error is None for outcome in done)
    _report(labelled, len(planned) - len(jobs), time.perf_counter() - start, out, failures)


def _parse_outputs(write: str) -> "list[Output]":
    from denselab.runtime.pipeline import Output

    names = [name.strip().lower() for name in write.split(",")]
    known = {output.name.lower(): output for output in Output}
    strange = [name for name in names if name not in known]
    if strange:
        raise InputError(f"--write: wanted some of {','.join(known)}, got {write!r}")
    return [output for name, output in known.items() if name in names]


def _find(inputs: Sequence[str], out: Path) -> tuple[list[FoundImage], list[str]]:
    """The images, each once, and a text for every input that names none; results of an earlier run are not inputs."""
    from denselab.runtime.pipeline import Output

    found: dict[Path, FoundImage] = {}
    failures: list[str] = []
    for item in inputs:
        try:
            images = find_images([item])
        except InputError as error:
            failures.append(str(error))
            continue
        for image in images:
            path = image.path.resolve()
            written_here = path.name.endswith(tuple(output.value for output in Output))
            if not (written_here and path.is_relative_to(out.resolve())):
                found.setdefault(path, image)
    return list(found.values()), failures


def _stems(found: Sequence[FoundImage], out: Path) -> list[Path]:
    """Name the results after the images: without the suffix, or with it where two would share a name."""
    short = [image.relative.with_suffix("") for image in found]
    times = Counter(_folded(stem) for stem in short)
    stems = [stem if times[_folded(stem)] == 1 else image.relative for stem, image in zip(short, found, strict=True)]
    owners: dict[str, FoundImage] = {}
    for stem, image in zip(stems, found, strict=True):
        other = owners.setdefault(_folded(stem), image)
        if other is not image:
            got = f"{other.path} and {image.path}, which would both become {out / stem}.*"
            raise InputError(f"inputs: wanted distinct results, got {got}; label them into two folders")
    return stems


def _plan(
    found: Sequence[FoundImage], stems: Sequence[Path], out: Path, outputs: "Sequence[Output]", tasks: Sequence[str]
) -> "list[Job]":
    """What to write for every image: every output of every task."""
    from denselab.runtime.pipeline import Job, ending

    wanted = [(task, output) for task in tasks for output in outputs]
    joint = len(tasks) > 1
    return [
        Job(image.path, {(task, output): out / f"{stem}{ending(task, output, joint)}" for task, output in wanted})
        for stem, image in zip(stems, found, strict=True)
    ]


def _folded(stem: Path) -> str:
    return str(stem).casefold()  # some file systems hold only one of A.png and a.png


def _spare_existing(jobs: "list[Job]", overwrite: bool, skip_existing: bool) -> "list[Job]":
    if overwrite:
        return jobs
    if skip_existing:
        return [job for job in jobs if not all(map(_is_there, job.outputs.values()))]
    existing = [str(path) for job in jobs for path in job.outputs.values() if _is_there(path)]
    if existing:
        shown = ", ".join(existing[:3]) + (", ..." if len(existing) > 3 else "")
        mend = "--overwrite replaces them, --skip-existing labels only the rest"
        raise InputError(f"--out: wanted room for the results, got {len(existing)} that exist ({shown}); {mend}")
    return jobs


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # such as a name too long, which writing will report
        return False


def _make_writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise InputError(f"--out: wanted a folder to write to, got {out} ({error.strerror}); choose another") from error


def _parse_long_side(text: str) -> "LongSide":
    if text == "auto" or text == "native":
        return text
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise InputError(f"--long-side: wanted auto, native or a number of px, got {text!r}")


def _say_what_was_shrunk(done: "Sequence[Outcome]", predictor: "Predictor") -> None:
    """A note where the model saw less than was there, unless a number was asked for."""
    sizes = [outcome.source_hw for outcome in done if outcome.source_hw]
    shrunk = [max(hw) for hw in sizes if predictor.asked_hw(hw) != hw]
    cut = [hw for hw in sizes if predictor.seen_hw(hw) != predictor.asked_hw(hw)]
    if shrunk and predictor.long_side == "auto" and predictor.info.train_hw:
        print(
            f"note: {_images(shrunk)} of up to {max(shrunk)} px seen at {max(predictor.info.train_hw)} px, the size "
            "the model learned at; --long-side native labels at full size",
            file=sys.stderr,
        )
    if cut:
        largest = max(cut, key=max)
        print(
            f"note: {_images(cut)} of up to {max(largest)} px seen at {max(predictor.seen_hw(largest))} px: "
            f"{predictor.info.task} is done in one piece, and a larger one would not fit into memory",
            file=sys.stderr,
        )


def _say_what_has_no_unit(predictor: "Predictor") -> None:
    from denselab.depth_unit import DepthUnit

    if "depth" in predictor.info.tasks and predictor.info.depth_unit is DepthUnit.RELATIVE:
        print(
            f"note: the depth of {predictor.info.name} is relative, in no unit: labels hold its inverse, 65535 for "
            "what is nearest in the photo",
            file=sys.stderr,
        )


def _images(some: Sequence[object]) -> str:
    return "1 image" if len(some) == 1 else f"{len(some)} images"


def _describe(outcome: "Outcome") -> str:
    error = outcome.error
    if isinstance(error, OSError):
        place = error.filename2 or error.filename or next(iter(outcome.job.outputs.values()))
        return f"{outcome.job.source}: its results could not be written to {place} ({error.strerror or error})"
    return str(error) if isinstance(error, InputError) else f"{outcome.job.source}: {type(error).__name__}: {error}"


def _report(labelled: int, skipped: int, seconds: float, out: Path, failures: Sequence[str]) -> None:
    if failures:
        print(f"{len(failures)} failed:", *(f"  {text}" for text in failures), sep="\n", file=sys.stderr)
    rate = f" ({labelled / seconds:.1f}/s)" if labelled > 1 else ""
    there = f", {skipped} were there already" if skipped else ""
    lost = f", {len(failures)} failed" if failures else ""
    images = "image" if labelled == 1 else "images"
    print(f"labelled {labelled} {images} in {seconds:.1f} s{rate}{there}{lost}; results in {out}")
    if failures:
        raise typer.Exit(1)
