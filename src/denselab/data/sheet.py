"""A contact sheet of a data set: image and truths side by side."""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from denselab.classes import VOID, Classes
from denselab.data.check import class_ids_of, pixel_counts
from denselab.data.dataset import Dataset, Item
from denselab.data.segment_maps import by_id
from denselab.data.truth import Truth
from denselab.drawing import blend, contact_sheet, depth_overlay, legend, normals_overlay, segments_overlay, shades
from denselab.errors import InputError
from denselab.segments import Segments

TILE_PX = 640
COLUMNS = 3
OPACITY = 0.6
_DEPTH_QUANTILES = (0.02, 0.98)

Track = Callable[[Iterable[Item], int, str], Iterable[Item]]


@dataclass(frozen=True)
class Sheet:
    """The picture, and why some images are missing in it."""

    picture: Image.Image
    failures: tuple[InputError, ...]


def choose_items(items: Sequence[Item], count: int, seed: int) -> tuple[Item, ...]:
    """At most `count` items at random, in their order in `items`; a seed chooses the same ones every time."""
    chosen = random.Random(seed).sample(range(len(items)), min(count, len(items)))
    return tuple(items[index] for index in sorted(chosen))


def draw_sheet(
    dataset: Dataset,
    items: Sequence[Item],
    track: Track = lambda items, _total, _label: items,
    opacity: float = OPACITY,
) -> Sheet:
    """Every image beside its truths in colour, with its name, and the classes with their share of all shown pixels.

    Labels are drawn as outlined segments where there are any, depth and normals in colours of their own. Images that
    cannot be read are left out; raises the first one's InputError where none can.
    """
    tiles: list[tuple[Image.Image, str]] = []
    failures: list[InputError] = []
    counts = np.zeros(256, np.int64)
    for item in track(items, len(items), "draw"):
        try:
            image, truth = dataset.read(item, dataset.tasks)
        except InputError as error:
            failures.append(error)
            continue
        class_ids = class_ids_of(truth)
        if class_ids is not None:
            counts += pixel_counts(class_ids)
        panels = [Image.fromarray(image), *truth_pictures(image, truth, dataset.classes, opacity)]
        tiles.append((_side_by_side(panels), item.name))
    if not tiles:
        raise failures[0]
    grid = contact_sheet(tiles, COLUMNS, TILE_PX)
    if dataset.classes is None:
        return Sheet(grid, tuple(failures))
    shares = counts[: len(dataset.classes)] / max(counts.sum(), 1)
    panel = legend(dataset.classes, shares, grid.width, TILE_PX // 32)
    picture = Image.new("RGB", (max(grid.width, panel.width), grid.height + panel.height), "white")
    picture.paste(grid, (0, 0))
    picture.paste(panel, (0, grid.height))
    return Sheet(picture, tuple(failures))


def truth_pictures(
    image: NDArray[np.uint8], truth: Truth, classes: Classes | None, opacity: float = OPACITY
) -> list[Image.Image]:
    """The labels, the depth and the normals that are known, each laid over the image."""
    hw = (image.shape[0], image.shape[1])
    pictures: list[Image.Image] = []
    if truth.segments is not None and classes:
        pictures.append(_segments_picture(image, truth.segments, classes, opacity))
    elif truth.class_ids is not None and classes:
        pictures.append(Image.fromarray(blend(image, truth.class_ids, classes, VOID, opacity)))
    if truth.depth_m is not None:
        depth_m = truth.depth_m
        near, far = np.quantile(depth_m[depth_m > 0], _DEPTH_QUANTILES).tolist()
        range_m = (near, max(far, 1.01 * near))
        pictures.append(depth_overlay(image, hw, lambda rows: depth_m[rows], range_m, legend=False, opacity=1.0))
    if truth.normals is not None:
        normals = truth.normals
        pictures.append(normals_overlay(image, hw, lambda rows: normals[rows], legend=False, opacity=1.0))
    return pictures


def _segments_picture(image: NDArray[np.uint8], segments: Segments, classes: Classes, opacity: float) -> Image.Image:
    places = range(1, len(segments.segments) + 1)
    layers = by_id(segments.layers, segments.segments, list(places), 0)
    slots: NDArray[np.int64] = layers[0]
    for layer in layers[1:]:
        slots = np.where(layer > 0, layer, slots)
    colours = shades([segment.class_id for segment in segments.segments], classes)
    return segments_overlay(image, segments.hw, lambda rows: slots[rows], colours, opacity=opacity)


def _side_by_side(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one size, shrunk so that all fit a tile."""
    for picture in pictures:
        picture.thumbnail((TILE_PX // len(pictures), TILE_PX))
    width, height = pictures[0].size
    row = Image.new("RGB", (width * len(pictures), height))
    for place, picture in enumerate(pictures):
        row.paste(picture, (place * width, 0))
    return row
