"""Numbers for people and for JSON: nan is "-" or None, columns are aligned."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from denselab.errors import InputError

Counts = NDArray[np.int64]
Floats = NDArray[np.float64]

_NARROWEST = 6


def ratio(part: NDArray[Any] | np.number[Any], whole: NDArray[Any] | np.number[Any]) -> Floats:
    """part / whole, nan where whole is 0."""
    return np.divide(part, whole, out=np.full(np.shape(part), np.nan), where=np.asarray(whole) > 0)


def mean_of_known(values: Floats) -> float:
    """Mean of what is not nan; nan of nothing."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else math.nan


def or_none(value: float) -> float | None:
    """The value for JSON, which has no nan."""
    return None if math.isnan(value) else float(value)


def percent(value: float) -> str:
    """100 times the value with two digits."""
    return number(100 * value, 2)


def number(value: float, digits: int) -> str:
    """The value with so many digits after the point."""
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def names_or_numbers(class_names: Sequence[str] | None, num_classes: int) -> Sequence[str]:
    """The given names, or 0..K-1. Raises InputError for another number of names."""
    names = class_names if class_names is not None else [str(i) for i in range(num_classes)]
    if len(names) != num_classes:
        raise InputError(f"class_names: wanted {num_classes}, got {len(names)}")
    return names


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines: the first column to the left, the others to the right, two spaces between."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    widths[1:] = [max(width, _NARROWEST) for width in widths[1:]]

    def line(row: Sequence[str]) -> str:
        others = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        return "  ".join((row[0].ljust(widths[0]), *others)).rstrip()

    return "\n".join(map(line, rows))
