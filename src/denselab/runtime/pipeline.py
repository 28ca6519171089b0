"""Many files through one model: the next images are read and the last ones written while the engine runs."""

import errno
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from threading import Condition

import numpy as np
from numpy.typing import NDArray

from denselab.errors import InputError
from denselab.files import atomic_path, write_json
from denselab.results import JointResult, Result
from denselab.runtime.images import open_image, read_size

Predict = Callable[[NDArray[np.uint8]], Result | JointResult]

_MAX_IMAGES = 8
# A pixel under way costs about 8 bytes (image, overlay, ids), so this is 320 MB; a larger image travels alone.
_MAX_PIXELS = 40_000_000


class Output(Enum):
    """What can be written for an image, by the ending of its file."""

    OVERLAY = ".overlay.png"
    LABELS = ".labels.png"
    JSON = ".json"


@dataclass(frozen=True)
class Job:
    """An image to label, and where to write what of which task."""

    source: Path
    outputs: Mapping[tuple[str, Output], Path]


@dataclass(frozen=True)
class Outcome:
    """What became of a job: its image's height and width in px (if read), and what went wrong (if anything)."""

    job: Job
    source_hw: tuple[int, int] | None = None
    error: Exception | None = None

    @property
    def disk_full(self) -> bool:
        """Whether there was no room for the outputs, which no later job will find either."""
        return isinstance(self.error, OSError) and self.error.errno in (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class _Image:
    pixels: NDArray[np.uint8]
    decode_ms: float

    @property
    def hw(self) -> tuple[int, int]:
        return self.pixels.shape[:2]


def ending(task: str, output: Output, joint: bool) -> str:
    """How the name of a result ends: ".labels.png", or ".depth.labels.png" where one of several tasks wrote it."""
    return f".{task}{output.value}" if joint else output.value


def label_files(predict: Predict, jobs: Sequence[Job]) -> Generator[Outcome]:
    """Label and write every job, and yield an Outcome for each; a full disk ends the run after the jobs under way."""
    room = _Room()
    # One reader, in order: an image that waits for room waits for earlier ones only, so none waits for ever.
    with ThreadPoolExecutor(1, "read") as reader, ThreadPoolExecutor(2, "write") as writers:
        reading = deque((job, reader.submit(_read, job, room)) for job in jobs)
        writing: deque[Future[Outcome]] = deque()

        def label_next() -> Future[Outcome]:
            job, read = reading.popleft()
            try:
                image = read.result()
            except InputError as error:
                return writers.submit(Outcome, job, error=error)
            try:
                result = _label(image, predict)
            except Exception as error:
                room.give_back(image.hw)
                text = f"{job.source}: the model failed on it ({type(error).__name__}: {error})"
                return writers.submit(Outcome, job, image.hw, InputError(text))
            return writers.submit(_write, job, image, result, room)

        try:
            while reading or writing:
                if reading:
                    writing.append(label_next())
                while writing and (writing[0].done() or not reading):
                    outcome = writing.popleft().result()
                    if outcome.disk_full:
                        reading.clear()
                    yield outcome
        finally:
            reader.shutdown(wait=False, cancel_futures=True)
            room.close()


def _read(job: Job, room: "_Room") -> _Image:
    header_hw = read_size(job.source)
    room.take(header_hw)
    try:
        start = time.perf_counter()
        pixels = open_image(job.source)
        decode_ms = 1000 * (time.perf_counter() - start)
    except Exception:
        room.give_back(header_hw)
        raise
    return _Image(pixels, decode_ms)


def _label(image: _Image, predict: Predict) -> Result | JointResult:
    result = predict(image.pixels)
    timing_ms = {"decode": image.decode_ms, **result.timing_ms}
    timing_ms["total"] = image.decode_ms + timing_ms.get("total", 0)
    return result.with_timing(timing_ms)


def _write(job: Job, image: _Image, result: Result | JointResult, room: "_Room") -> Outcome:
    parts = result if isinstance(result, JointResult) else {result.task: result}
    try:
        for (task, output), path in job.outputs.items():
            part = parts[task]
            path.parent.mkdir(parents=True, exist_ok=True)
            match output:
                case Output.OVERLAY:
                    with atomic_path(path) as partial:
                        part.overlay(image.pixels).save(partial, compress_level=2)
                case Output.LABELS:
                    part.save(path)
                case Output.JSON:
                    write_json(path, {"image": str(job.source), **part.to_dict()})
    except Exception as error:
        return Outcome(job, image.hw, error)
    finally:
        room.give_back(image.hw)
    return Outcome(job, image.hw)


class _Room:
    """Bounds how many images and pixels are under way, between reading and writing."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._images = 0
        self._pixels = 0
        self._closed = False

    def take(self, hw: tuple[int, int]) -> None:
        pixels = hw[0] * hw[1]
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._fits(pixels))
            self._images += 1
            self._pixels += pixels

    def give_back(self, hw: tuple[int, int]) -> None:
        with self._changed:
            self._images -= 1
            self._pixels -= hw[0] * hw[1]
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _fits(self, pixels: int) -> bool:
        return not self._images or (self._images < _MAX_IMAGES and self._pixels + pixels <= _MAX_PIXELS)
