"""denselab data: what is in a data folder, what is wrong with it, and scenes to try everything on."""

import json
import re
import sys
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from denselab.errors import InputError

if TYPE_CHECKING:
    from denselab.classes import Classes
    from denselab.data.check import Report

app = typer.Typer(no_args_is_help=True, help="Check a data folder, look at it, or render street scenes.")

_SHOWN_PER_KIND = 10

Folder = Annotated[
    Path, typer.Argument(metavar="DIR", help="Data folder, or a dataset.yaml that names one (docs: your own data).")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]


@app.command()
def check(
    folder: Folder,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the report here too.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Read every file; print counts, sizes, classes and what is wrong. Exit code 1 where something is."""
    from denselab.cli.progress import track
    from denselab.data.check import check as check_folder
    from denselab.files import atomic_path

    if json_file:
        _refuse_to_overwrite(json_file, overwrite)
    report = check_folder(folder, track)
    for line in report_lines(report):
        print(line)
    if json_file:
        with _writing(json_file), atomic_path(json_file) as partial:
            partial.write_text(json.dumps(report.to_dict(), indent=2, ensure_ascii=False) + "\n", "utf-8")
    if report.problems:
        raise typer.Exit(1)


@app.command()
def show(
    folder: Folder,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FILE", help="The picture to write (.png or .jpg).")],
    split: Annotated[str, typer.Option(help="Which split.")] = "train",
    count: Annotated[int, typer.Option(min=1, max=200, help="How many images.")] = 12,
    seed: Annotated[int, typer.Option(help="Chooses the images.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Draw images beside their labels in colour, with names and classes, on one sheet."""
    from denselab.cli.progress import track
    from denselab.data.descriptor import open_dataset
    from denselab.data.sheet import choose_items, draw_sheet
    from denselab.files import atomic_path

    if out.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise InputError(f"-o: wanted a file that ends in .png or .jpg, got {out}")
    _refuse_to_overwrite(out, overwrite)
    dataset = open_dataset(folder)
    sheet = draw_sheet(dataset, choose_items(dataset.split(split), count, seed), track)
    with _writing(out), atomic_path(out) as partial:
        sheet.picture.save(partial)
    for note in dataset.notes:
        print(f"note: {note}")
    print(out)
    for failure in sheet.failures:
        print(f"left out: {failure}", file=sys.stderr)
    if sheet.failures:
        raise typer.Exit(1)


@app.command()
def scenes(
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Folder to fill.")],
    count: Annotated[int, typer.Option(min=1, help="How many scenes.")] = 200,
    size: Annotated[str, typer.Option(help="WIDTHxHEIGHT in px.")] = "480x360",
    seed: Annotated[int, typer.Option(min=0, help="The same seed renders the same scenes.")] = 0,
    clip_frames: Annotated[int, typer.Option(min=0, help="Render clips of so many frames; 0: single images.")] = 0,
    one_camera: Annotated[bool, typer.Option("--one-camera", help="One lens and height for all: for depth.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Render random street scenes with exact labels, depth, normals, boxes and tracks, ready for `fit`."""
    size_hw = _size_hw(size)
    if out.is_file():
        raise InputError(f"-o: wanted a folder, got the file {out}")
    if not overwrite and out.is_dir() and any(out.iterdir()):
        raise InputError(
            f"{out}: wanted an empty or a new folder, got one with files; choose another or add --overwrite"
        )
    from denselab.cli.progress import track
    from denselab.data.scenes import Mount, write_scenes

    with _writing(out):
        write_scenes(out, count, size_hw, seed, clip_frames, Mount() if one_camera else None, progress=track)
    print(out)


def report_lines(report: "Report") -> Iterable[str]:
    """The report as text: what there is of every kind, notes, problems by kind, and the verdict."""
    yield f"truth for {', '.join(sorted(report.tasks))}"
    yield ""
    yield f"{'split':<7}{'images':>7}  {'smallest':<11}{'median':<11}{'largest':<11}sizes"
    for name, split in report.splits.items():
        sizes = split.size_range_hw() or ()
        texts = "".join(f"{f'{width}x{height}':<11}" for height, width in sizes) or f"{'none readable':<33}"
        yield f"{name:<7}{split.images:>7}  {texts}{len(split.sizes_hw)}"
    yield ""
    if report.classes:
        yield from _class_lines(report, report.classes)
    yield from _object_lines(report)
    yield from _surface_lines(report)
    yield from (f"note: {note}" for note in report.notes)
    for kind in dict.fromkeys(problem.kind for problem in report.problems):
        texts = [problem.text for problem in report.problems if problem.kind is kind]
        yield f"{kind.value}: {len(texts)}"
        yield from (f"  {text}" for text in texts[:_SHOWN_PER_KIND])
        if len(texts) > _SHOWN_PER_KIND:
            yield f"  and {len(texts) - _SHOWN_PER_KIND} more (all of them with --json FILE)"
    count = len(report.problems)
    yield "ok" if not count else f"{count} problem{'s' if count > 1 else ''}"


def _class_lines(report: "Report", classes: "Classes") -> Iterable[str]:
    """Area, images and objects of every class."""
    width = max(len(name) for name in (*classes.names, "class")) + 5
    counted = any(split.objects for split in report.splits.values())
    heads = (
        f"{name + ' area':>12}{'images':>8}{'objects' if counted else '':>{9 * counted}}" for name in report.splits
    )
    yield f"{'class':<{width}}" + "".join(heads)
    for class_id, class_name in enumerate(classes.names):
        cells: list[str] = []
        for split in report.splits.values():
            cells.append(f"{_percent(split.class_pixels[class_id], split.pixels):>12}{split.class_images[class_id]:>8}")
            if split.objects:
                cells.append(f"{split.objects.of_class[class_id] if class_id in classes.things else '':>9}")
        yield f"{f'{class_id:>3} {class_name}':<{width}}{''.join(cells)}".rstrip()
    gap = 17 if counted else 8
    void = (f"{_percent(split.void_pixels, split.pixels):>12}{'':{gap}}" for split in report.splits.values())
    rest = "void" if "semantic" in report.tasks else "none"
    yield f"{f'    {rest}':<{width}}{''.join(void)}".rstrip()
    yield ""


def _object_lines(report: "Report") -> Iterable[str]:
    objects = {name: split.objects for name, split in report.splits.items() if split.objects}
    if not objects:
        return
    yield f"{'split':<7}{'objects':>9}  per image: {'fewest':>7}{'median':>8}{'most':>7}{'none in':>10}{'crowds':>9}"
    for name, found in objects.items():
        fewest, median, most = found.per_image
        cells = f"{fewest:>18}{median:>8}{most:>7}{found.empty:>10}{found.crowds:>9}"
        yield f"{name:<7}{sum(found.of_class):>9}  {cells}"
    yield ""


def _surface_lines(report: "Report") -> Iterable[str]:
    for name, split in report.splits.items():
        if split.depth:
            depth = split.depth
            yield (
                f"{name:<7}depth {depth.nearest_m:.2f} to {depth.farthest_m:.2f} m, median {depth.median_m:.2f} m, "
                f"known at {100 * depth.known_share:.1f} %"
            )
        if split.known_normals is not None:
            yield f"{name:<7}normals known at {100 * split.known_normals:.1f} %"
    if report.tasks & {"depth", "normals"}:
        yield ""


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / max(whole, 1):.2f} %"


def _size_hw(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if not match or min(map(int, match.groups())) < 1:
        raise InputError(f"--size: wanted WIDTHxHEIGHT in px such as 480x360, got {text}")
    return int(match[2]), int(match[1])


def _refuse_to_overwrite(path: Path, overwrite: bool) -> None:
    if path.is_dir():
        raise InputError(f"{path}: wanted a file to write, got a folder; name a file in it")
    if path.exists() and not overwrite:
        raise InputError(f"{path}: there is a file already; choose another name or add --overwrite")


@contextmanager
def _writing(path: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error}); choose another place") from error
