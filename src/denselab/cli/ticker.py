"""What long work says of itself: lines, and a bar for what counts ("block 3 of 12"); standard error, both."""

import re
import sys
import time
from types import TracebackType
from typing import Any, Self

_SECONDS_PER_LINE = 5.0


class Ticker:
    """Call it with a text. Texts that count and begin alike share one bar on a terminal, one line per 5 s elsewhere."""

    def __init__(self) -> None:
        self._label = ""
        self._bar: Any = None
        self._shown_s = -_SECONDS_PER_LINE

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def __call__(self, text: str) -> None:
        """Show a text."""
        counted = re.search(r"(\d+) (?:of|/) (\d+)", text)
        if not counted:
            self._close()
            print(text, file=sys.stderr, flush=True)
            return
        label, done, total = text[: counted.start()].rstrip(), int(counted[1]), int(counted[2])
        if label != self._label:
            self._close()
            self._label, self._shown_s = label, -_SECONDS_PER_LINE
        if sys.stderr.isatty():
            self._move(label, done, total)
        elif done == total or time.monotonic() - self._shown_s >= _SECONDS_PER_LINE:
            self._shown_s = time.monotonic()
            print(text, file=sys.stderr, flush=True)
        if done == total:
            self._close()

    def _move(self, label: str, done: int, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        if self._bar is None:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._bar.start()
            self._bar.add_task(label, total=total)
        self._bar.update(self._bar.task_ids[0], completed=done)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar, self._label = None, ""
