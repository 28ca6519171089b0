"""denselab fit: train a model on a folder of images and masks."""

import inspect
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from denselab.errors import InputError
from denselab.training.options import FitOptions, options

RUN_FILE = "run.yaml"


def _fit(config: Path | None, resume: bool, overwrite: bool, **given: Any) -> None:
    """Train a model on a folder of images and masks, and evaluate the best checkpoint.

    Every option can come from a file (--config); those given on the command line win. The resolved options are
    written to run.yaml in the run folder.
    """
    explicit = {name: value for name, value in given.items() if value is not None}
    if resume and config:
        raise InputError("--config: a resumed run has its own options in run.yaml; leave out --config")
    source = Path(explicit["out"]) / RUN_FILE if resume and "out" in explicit else config
    if resume and source and not source.is_file():
        raise InputError(f"{source.parent}: wanted a run to resume, got no {RUN_FILE} there; check -o")
    values = FitOptions.load(source) if source else {}
    resolved = FitOptions.from_mapping(values | explicit, str(source or "command line"))
    if not find_spec("torch") or not find_spec("lightning"):
        raise InputError('training needs PyTorch; install it with: pip install "denselab[train]"')
    from denselab.cli.progress import track
    from denselab.training.fit import fit as run

    evaluation = run(resolved, resume, overwrite, track)
    if evaluation:
        print(f"{evaluation.to_text()}\n\nbest.ckpt, evaluation.json and all else: {resolved.out}")


def _command() -> Callable[..., None]:
    """`_fit` with a parameter per field of FitOptions; None means not given."""
    hints: dict[str, Any] = {
        "config": Annotated[Path | None, typer.Option(help="Options from a YAML file, such as a run.yaml.")],
        "resume": Annotated[bool, typer.Option("--resume", help="Go on where the run in --out stopped.")],
        "overwrite": Annotated[bool, typer.Option("--overwrite", help="Throw away the run in --out.")],
    }
    defaults: dict[str, Any] = {"config": None, "resume": False, "overwrite": False}
    for option in options():
        shown = option.about.unset or ("" if option.default is None else str(option.default)) or False
        flags = ("--out", "-o") if option.name == "out" else ()
        hints[option.name] = Annotated[
            option.kind | None, typer.Option(*flags, help=option.about.text, show_default=shown)
        ]
        defaults[option.name] = None

    def fit(**given: Any) -> None:
        _fit(**given)

    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter(name, keyword, default=defaults[name], annotation=hints[name]) for name in hints]
    fit.__doc__, fit.__annotations__ = _fit.__doc__, hints
    fit.__dict__["__signature__"] = inspect.Signature(parameters)
    return fit


fit = _command()
