"""denselab compress: a trained network becomes a small file of integers, measured before it is kept."""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from denselab._packaged import PACKAGED
from denselab.compress.names import ImportanceName, KeepName, MethodName
from denselab.errors import InputError
from denselab.hub import HUGGING_FACE, is_published

if TYPE_CHECKING:
    from denselab.compress.pipeline import Outcome
    from denselab.compress.plan import Kept
    from denselab.compress.subject import Subject

_TIMM = "timm:"


def compress(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="street, FILE.ckpt, hf:NAME (of a dense model or an image classifier), kmax:FILE, timm:NAME with "
            "--weights, or timm:FOLDER.",
        ),
    ],
    calibrate: Annotated[
        Path, typer.Option(help="Photos that the network is observed on: a folder, FILE.zip or FILE.zip/FOLDER.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write (.onnx).")],
    budget: Annotated[
        str | None, typer.Option(help="4.0bits (mean), 2.5MB or 0.25x (of the file), 8ms or 3.5GBOPs.")
    ] = None,
    method: Annotated[
        MethodName | None, typer.Option(help="How ranges and weights are fitted. [default: auto, or the plan's]")
    ] = None,
    images: Annotated[int, typer.Option(min=8, help="Photos to calibrate with, spread over all there are.")] = 128,
    data: Annotated[
        Path | None, typer.Option(help="Labelled photos to score on, before and after (classifiers: class folders).")
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="Use this plan as it is, in place of a budget.")] = None,
    work: Annotated[
        Path | None, typer.Option(help="Folder of the saved stages. [default: beside the output, .work]")
    ] = None,
    importance: Annotated[
        ImportanceName | None,
        typer.Option(
            help="What decides where bits go. [default: sensitivity, or the method's own]. lrp is patented for "
            "commercial use in some places."
        ),
    ] = None,
    keep: Annotated[
        list[KeepName] | None, typer.Option(help="Stays at 8 bits; may be repeated. [default: first-input, head]")
    ] = None,
    quantize_attention: Annotated[
        bool,
        typer.Option(
            "--quantize-attention",
            help="Quantize products of two activations too, as in attention. Budgets of bits and GBOPs do so anyway; "
            "under others they stay in float, as no engine gains by it.",
        ),
    ] = False,
    train_steps: Annotated[
        int,
        typer.Option(
            min=0,
            help="Batches of calibration photos on which the small network learns to answer as the float one does; "
            "plans of 2 bits need it.",
        ),
    ] = 0,
    weights: Annotated[Path | None, typer.Option(help="Weights of timm:NAME (.safetensors or .pth).")] = None,
    report: Annotated[Path | None, typer.Option(help="Write a report with plots to this file (.html).")] = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the receipt to this file.")] = None,
    min_agreement: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Least share of answers that engines give as the simulation in torch does."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of all that is drawn at random.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")] = False,
) -> None:
    """Make a trained network small: mixed-precision integers within a budget, in one ONNX file.

    Every stage is saved in the work folder and not made again for the same photos and settings. What is printed of the
    file was measured: bytes, milliseconds per engine, answers and scores beside those of the float network.
    """
    _check_target("--report", report, overwrite)
    _check_target("--json", json_out, overwrite)
    if not find_spec("torch"):
        raise InputError('compress needs PyTorch; install it with: pip install "denselab[train]"')
    from denselab.cli.progress import track
    from denselab.cli.ticker import Ticker
    from denselab.compress.options import Options
    from denselab.compress.pipeline import compress as run

    options = Options(
        calibrate=calibrate,
        out=out,
        budget=budget,
        method=method,
        images=images,
        importance=importance,
        kept=_kept(keep),
        quantize_attention=quantize_attention,
        plan=plan,
        data=data,
        work=work,
        overwrite=overwrite,
        seed=seed,
        min_agreement=min_agreement,
        train_steps=train_steps,
    )
    options.check()
    subject = _open(source, weights)
    if subject.note:
        print(f"note: {subject.note}", file=sys.stderr)
    try:
        with Ticker() as ticker:
            outcome = run(subject, options, ticker, track)
    except KeyboardInterrupt:
        print(
            f"interrupted; finished stages are in {options.work_folder}, the same command does the rest",
            file=sys.stderr,
        )
        raise typer.Exit(130) from None
    _print(outcome)
    try:
        if json_out is not None:
            from denselab.files import write_json

            json_out.parent.mkdir(parents=True, exist_ok=True)
            write_json(json_out, {"model": source, "file": str(out), **outcome.receipt.to_dict()})
        if report is not None:
            from denselab.compress.report import write_report

            report.parent.mkdir(parents=True, exist_ok=True)
            write_report(outcome, report)
    except OSError as error:
        path = error.filename or json_out or report
        raise InputError(f"{path}: cannot be written ({error.strerror or error}); choose another path") from error
    print(", ".join(str(path) for path in (out, report, json_out) if path is not None))


def _open(source: str, weights: Path | None) -> "Subject":
    from denselab.compress.subject import dense_subject, hub_classifier_subject, open_classifier

    if source.startswith(_TIMM):
        return open_classifier(source, weights)
    if weights is not None:
        raise InputError(f"--weights: wanted with timm:NAME alone, got {source}; drop it")
    _check_source(source)
    if source.startswith(HUGGING_FACE):
        from denselab.hub.image_classifier import image_classifier, is_image_classifier

        name = source.removeprefix(HUGGING_FACE)
        if is_image_classifier(name):
            return hub_classifier_subject(image_classifier(name))
    from denselab.explain.heat import open_to_explain

    return dense_subject(open_to_explain(source), Path(source).stem if source.endswith(".ckpt") else source)


def _check_source(source: str) -> None:
    if is_published(source) or source in PACKAGED or source.endswith(".ckpt"):
        return
    if source.endswith(".onnx"):
        raise InputError(
            f"SOURCE: wanted a network in PyTorch, got the artifact {source}, which only runs; give what it was "
            'exported from (FILE.ckpt, hf:NAME, kmax:FILE), or "street"'
        )
    known = ", ".join((*PACKAGED, "a checkpoint (FILE.ckpt)", "hf:NAME", "kmax:FILE", "timm:NAME or timm:FOLDER"))
    raise InputError(f"SOURCE: wanted {known}, got {source}; correct it")


def _kept(names: list[KeepName] | None) -> "frozenset[Kept]":
    from denselab.compress.plan import KEPT, Kept

    if names is None:
        return KEPT
    if KeepName.NOTHING in names:
        if len(names) > 1:
            raise InputError("--keep: wanted nothing by itself, got more beside it; remove one")
        return frozenset()
    kinds = {
        KeepName.FIRST_INPUT: Kept.FIRST_INPUT,
        KeepName.FIRST_WEIGHT: Kept.FIRST_WEIGHT,
        KeepName.HEAD: Kept.HEAD,
    }
    return frozenset(kinds[name] for name in names)


def _check_target(option: str, path: Path | None, overwrite: bool) -> None:
    if path is None:
        return
    if path.is_dir():
        raise InputError(f"{option}: wanted a file, got the folder {path}; choose another name")
    if path.exists() and not overwrite:
        raise InputError(f"{option}: {path} exists already; choose another name or give --overwrite")


def _print(outcome: "Outcome") -> None:
    """The table of layers, the receipt, and what is worse than before."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from denselab.compress.layer_table import COLUMNS, layer_cells

    console = Console(width=None if sys.stdout.isatty() else 140)
    layers = Table(box=None, pad_edge=False)
    for name in COLUMNS:
        layers.add_column(name, justify="right" if name in COLUMNS[3:] else "left", overflow="fold")
    for layer in outcome.layers:
        layers.add_row(*(Text(cell) for cell in layer_cells(layer)))
    if outcome.layers:
        console.print(layers)
        console.print()
    facts = Table(box=None, pad_edge=False, show_header=False)
    for name, value in outcome.receipt.rows():
        facts.add_row(Text(name), Text(value))
    console.print(facts)
    for warning in outcome.receipt.warnings():
        print(f"note: {warning}")
