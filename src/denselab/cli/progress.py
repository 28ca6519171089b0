"""How far along, how fast, how long still: a bar on a terminal, plain lines elsewhere (standard error, both)."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

_SECONDS_PER_LINE = 5.0

Item = TypeVar("Item")


def track(items: Iterable[Item], total: int, label: str) -> Iterator[Item]:
    """Yield the items while showing progress; nothing is shown for a single one."""
    if total <= 1:
        return iter(items)
    return _bar(items, total, label) if sys.stderr.isatty() else _lines(items, total, label)


def _bar(items: Iterable[Item], total: int, label: str) -> Iterator[Item]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn(label),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    start = time.perf_counter()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(label, total=total, rate="")
        for done, item in enumerate(items, 1):
            progress.update(task, completed=done, rate=f"{_rate(done, start):.1f}/s")
            yield item


def _lines(items: Iterable[Item], total: int, label: str) -> Iterator[Item]:
    start = shown = time.perf_counter()
    for done, item in enumerate(items, 1):
        now = time.perf_counter()
        if done == total or now - shown >= _SECONDS_PER_LINE:
            shown = now
            rate = _rate(done, start)
            left = f", {(total - done) / rate:.0f} s left" if done < total else ""
            print(f"{label} {done}/{total}, {rate:.1f}/s{left}", file=sys.stderr, flush=True)
        yield item


def _rate(done: int, start: float) -> float:
    return done / max(time.perf_counter() - start, 1e-9)
