"""Counting many files: side by side, in order, and without stopping at a bad one."""

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol, Self, TypeVar

import numpy as np

from denselab.metrics.calibration import CalibrationFigures
from denselab.metrics.headline import Figures

Item = TypeVar("Item")

_THREADS = 4
_AHEAD = 4


class Score(Protocol):
    """What a metric keeps between images."""

    def merge(self, other: Self) -> None:
        """Add what another score has counted."""
        ...


ScoreT = TypeVar("ScoreT", bound=Score)

Track = Callable[[Iterable[Any], int, str], Iterable[Any]]
"""track(items, total, label) shows progress."""


@dataclass(frozen=True)
class Failure:
    """A file or image that could not be scored, and why."""

    name: str
    error: str


@dataclass(frozen=True)
class Scored:
    """Figures of the files that could be scored. counted: how many; unmatched: files or images without a partner;
    settings: what the report repeats of the options; calibration: where confidences were given."""

    figures: Figures
    class_names: Sequence[str] | None
    counted: int
    failures: Sequence[Failure] = ()
    unmatched: Sequence[str] = ()
    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    calibration: CalibrationFigures | None = None


def count(
    named: Sequence[tuple[str, Item]],
    counting: Callable[[Item], ScoreT | str],
    total: ScoreT,
    jobs: int,
    track: Track,
) -> list[Failure]:
    """Add the score of every item to `total`; returns those that could not be counted.

    counting: gives the score of one item, or says what is wrong with it. jobs: processes; a single one reads ahead in
    threads, as decoding pictures leaves the interpreter free.
    """
    failures: list[Failure] = []
    results = track(_results(counting, [item for _, item in named], jobs), len(named), "score")
    for (name, _), result in zip(named, results, strict=True):
        if isinstance(result, str):
            failures.append(Failure(name, result))
        else:
            total.merge(result)
    return failures


def _results(counting: Callable[[Item], ScoreT | str], items: Sequence[Item], jobs: int) -> Iterator[ScoreT | str]:
    """The result of every item, in order."""
    if jobs == 1:
        keep_freed_memory()
        workers = min(_THREADS, os.cpu_count() or 1)
        with ThreadPoolExecutor(workers, "score") as pool:
            yield from _in_order(pool, workers, counting, items)
    else:
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), keep_freed_memory) as pool:
            yield from _in_order(pool, jobs, counting, items)


def keep_freed_memory() -> None:
    """Have the memory of one picture used for the next: faults of fresh pages else take a third of the time.

    glibc returns freed memory to the system above limits that follow the largest block it has seen freed; elsewhere
    this does nothing.
    """
    np.empty(1 << 24, np.uint8)


def _in_order(
    pool: Executor, workers: int, counting: Callable[[Item], ScoreT | str], items: Sequence[Item]
) -> Iterator[ScoreT | str]:
    """Never many more items in work than there are workers, so that an interrupt does not wait for all of them."""
    rest = iter(items)
    waiting: deque[Future[ScoreT | str]] = deque(pool.submit(counting, item) for item in islice(rest, _AHEAD * workers))
    while waiting:
        result = waiting.popleft().result()
        waiting.extend(pool.submit(counting, item) for item in islice(rest, 1))
        yield result
