"""A contact sheet of a data set: image and truth side by side."""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from denselab.classes import VOID
from denselab.data.check import pixel_counts
from denselab.data.descriptor import Dataset, read_pair
from denselab.data.folder import Pair
from denselab.drawing import blend, contact_sheet, legend
from denselab.errors import InputError

TILE_PX = 640
COLUMNS = 3

Track = Callable[[Iterable[Pair], int, str], Iterable[Pair]]


@dataclass(frozen=True)
class Sheet:
    """The picture, and why some pairs are missing in it."""

    picture: Image.Image
    failures: tuple[InputError, ...]


def choose_pairs(pairs: Sequence[Pair], count: int, seed: int) -> tuple[Pair, ...]:
    """At most `count` pairs at random, in their order in `pairs`; a seed chooses the same ones every time."""
    chosen = random.Random(seed).sample(range(len(pairs)), min(count, len(pairs)))
    return tuple(pairs[index] for index in sorted(chosen))


def draw_sheet(
    dataset: Dataset, pairs: Sequence[Pair], track: Track = lambda items, _total, _label: items, opacity: float = 0.6
) -> Sheet:
    """Image and overlay of every pair with the image's name, and the classes with their share of all shown pixels.

    Pairs that cannot be read are left out; raises the first one's InputError where none can.
    """
    tiles: list[tuple[Image.Image, str]] = []
    failures: list[InputError] = []
    counts = np.zeros(256, np.int64)
    for pair in track(pairs, len(pairs), "draw"):
        try:
            image, class_ids = read_pair(pair, dataset)
        except InputError as error:
            failures.append(error)
            continue
        counts += pixel_counts(class_ids)
        labelled = blend(image, class_ids, dataset.classes, VOID, opacity)
        tiles.append((_side_by_side(image, labelled), pair.image.relative_to(dataset.root).as_posix()))
    if not tiles:
        raise failures[0]
    grid = contact_sheet(tiles, COLUMNS, TILE_PX)
    shares = counts[: len(dataset.classes)] / counts.sum()
    panel = legend(dataset.classes, shares, grid.width, TILE_PX // 32)
    picture = Image.new("RGB", (max(grid.width, panel.width), grid.height + panel.height), "white")
    picture.paste(grid, (0, 0))
    picture.paste(panel, (0, grid.height))
    return Sheet(picture, tuple(failures))


def _side_by_side(left: NDArray[np.uint8], right: NDArray[np.uint8]) -> Image.Image:
    """Two pictures of one size, shrunk so that both fit a tile."""
    halves = [Image.fromarray(left), Image.fromarray(right)]
    for half in halves:
        half.thumbnail((TILE_PX // 2, TILE_PX))
    both = Image.new("RGB", (2 * halves[0].width, halves[0].height))
    both.paste(halves[0], (0, 0))
    both.paste(halves[1], (halves[0].width, 0))
    return both
