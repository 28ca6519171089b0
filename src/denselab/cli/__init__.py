"""The command line: one file per command, every slow import inside the command that needs it."""

import sys
from typing import Annotated

import typer

from denselab._version import __version__
from denselab.cli import data
from denselab.cli.bench import bench
from denselab.cli.catalog import catalog
from denselab.cli.compress import compress
from denselab.cli.evaluate import evaluate
from denselab.cli.explain import explain
from denselab.cli.export import export
from denselab.cli.fit import fit
from denselab.cli.predict import predict
from denselab.cli.score import score
from denselab.errors import InputError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
for command in (predict, fit, evaluate, score, explain, export, compress, bench, catalog):
    app.command()(command)
app.add_typer(data.app, name="data")


@app.callback(invoke_without_command=True)
def options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show a traceback on errors; works after a command too.")
    ] = False,
) -> None:
    """Label every pixel: predict, train on your images, score, and export one file that runs without PyTorch."""
    if version:
        print(f"denselab {__version__}")


def main() -> None:
    """Run the command line; a user's mistake costs one line, a traceback needs --debug."""
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    try:
        app([a for a in arguments if a != "--debug"])
    except InputError as error:
        if debug:
            raise
        sys.exit(_fail(f"error: {error}", 2))
    except SystemExit as leaving:
        # typer answers Ctrl-C by an exit that says nothing; a command that said something itself raises typer.Exit.
        if leaving.__context__ is not None and isinstance(leaving.__context__.__cause__, KeyboardInterrupt):
            _fail("interrupted", 130)
        raise
    except Exception as error:
        if debug:
            raise
        sys.exit(_fail(f"internal error: {type(error).__name__}: {error} (run again with --debug)", 1))


def _fail(text: str, code: int) -> int:
    print(text, file=sys.stderr)
    return code
