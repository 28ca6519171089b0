"""denselab catalog: the published systems that can be run."""

import json
from dataclasses import asdict
from typing import Annotated

import typer

from denselab.catalog import ROWS


def catalog(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False) -> None:
    """List every published system that DenseLab implements, and how to run it."""
    if as_json:
        print(json.dumps([asdict(row) | {"run": row.run} for row in ROWS], indent=2))
        return
    for row in ROWS:
        print(f"{row.id}  {row.part:<9} {row.name:<24} {row.paper:<32} {row.run}")
