"""denselab explain: which pixels made a model say so."""

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from denselab.errors import InputError
from denselab.explain.question import Asked, AtPoint, Largest, Method, OfClass


def explain(
    photo: Annotated[Path, typer.Argument(help="The image.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The picture to write (.png).")],
    model: Annotated[str, typer.Option(help="street, FILE.ckpt, hf:NAME or kmax:FILE.")] = "street",
    class_name: Annotated[
        str | None, typer.Option("--class", help="Explain all that the model calls by this name.")
    ] = None,
    at: Annotated[
        str | None,
        typer.Option(
            metavar="X,Y", help="Explain what is said at this pixel: its class, its segment, its depth or its normal."
        ),
    ] = None,
    method: Annotated[
        Method,
        typer.Option(
            help="lrp: relevance propagation; cp-lrp: the same with attention held fixed; gradient: gradient times "
            "input, noisier and quicker. lrp and cp-lrp are patented for commercial use in some places."
        ),
    ] = Method.LRP,
    task: Annotated[str | None, typer.Option(help="Of a model of several. [default: the first that answers]")] = None,
    npy: Annotated[Path | None, typer.Option(help="Write the numbers too: float32 [H, W].")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")] = False,
) -> None:
    """Show which pixels of a photo made a model say so: orange speaks for it, blue against it.

    Without --class and --at, what covers most of the photo is explained.
    """
    asked = _parse(class_name, at)
    for option, path, suffix in (("--out", out, ".png"), ("--npy", npy, ".npy")):
        if path is not None:
            _check_target(option, path, suffix, overwrite)
    if not find_spec("torch"):
        raise InputError('explain needs PyTorch; install it with: pip install "denselab[train]"')
    import numpy as np

    from denselab.drawing.heat import heat_overlay
    from denselab.explain.heat import explain as run
    from denselab.explain.heat import open_to_explain
    from denselab.runtime.images import open_image

    pixels = open_image(photo)
    loaded = open_to_explain(model)
    found = run(loaded, pixels, asked, method, task, say=lambda text: print(text, file=sys.stderr, flush=True))
    for note in filter(None, (loaded.note, *found.notes)):
        print(f"note: {note}", file=sys.stderr)
    title = f"{found.subject} | {loaded.card.model}, {found.method}"
    marked = (asked.x_px, asked.y_px) if isinstance(asked, AtPoint) else None
    picture = heat_overlay(pixels, found.relevance, title, marked)
    _write(out, lambda partial: picture.save(partial, "PNG"))
    if npy is not None:
        _write(npy, lambda partial: np.save(partial, found.relevance))
    print(f"{found.subject}; results in {', '.join(str(path) for path in (out, npy) if path)}")


def _parse(class_name: str | None, at: str | None) -> Asked:
    if class_name is not None and at is not None:
        raise InputError("--class, --at: wanted one of them, got both; remove one")
    if class_name is not None:
        return OfClass(class_name)
    if at is None:
        return Largest()
    try:
        x_px, y_px = (int(part) for part in at.split(","))
    except ValueError as error:
        raise InputError(f"--at: wanted X,Y in px such as 320,200, got {at!r}") from error
    return AtPoint(x_px, y_px)


def _check_target(option: str, path: Path, suffix: str, overwrite: bool) -> None:
    if path.suffix.lower() != suffix:
        raise InputError(f"{option}: wanted a file name that ends in {suffix}, got {path}; rename it")
    if path.is_dir():
        raise InputError(f"{option}: wanted a file, got the folder {path}; choose another name")
    if path.exists() and not overwrite:
        raise InputError(f"{option}: {path} exists already; choose another name or give --overwrite")


def _write(path: Path, write: Callable[[Path], object]) -> None:
    from denselab.files import atomic_path

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as partial:
            write(partial)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error}); choose another path") from error
