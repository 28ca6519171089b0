"""Data sets small enough to learn in seconds: sky over ground, and blocks in front of both; colour tells class."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

COLOURS = np.array([[40, 40, 200], [200, 60, 40], [60, 180, 60]], float)
NAMES = ("sky", "ground", "block")


def write_tiny(
    root: Path,
    counts: Mapping[str, int] | None = None,
    sizes: Sequence[tuple[int, int]] = ((64, 96),),
    names: Sequence[str] = NAMES,
) -> Path:
    """Images and masks in split folders, sizes (height, width) taking turns."""
    rng = np.random.default_rng(0)
    for split, count in (counts or {"train": 8, "val": 4}).items():
        for number in range(count):
            height, width = sizes[number % len(sizes)]
            ids = np.zeros((height, width), np.uint8)
            ids[height // 2 :] = 1
            top, left = rng.integers(2, height // 2), rng.integers(2, width // 2)
            ids[top : top + height // 2 - 4, left : left + width // 2 - 8] = 2
            pixels = np.clip(COLOURS[ids] + rng.normal(0, 8, (height, width, 3)), 0, 255).astype(np.uint8)
            ids[:2, :2] = 255
            for folder, array in (("images", pixels), ("masks", ids)):
                (root / folder / split).mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(root / folder / split / f"{number:03d}.png")
    (root / "dataset.yaml").write_text(f"names: [{', '.join(names)}]\n", "utf-8")
    return root


def save(path: Path, array: NDArray[np.generic]) -> Path:
    """A picture of 8 or 16 bits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def photo(path: Path, hw: tuple[int, int], value: int = 0) -> Path:
    """A grey photo."""
    return save(path, np.full((*hw, 3), value, np.uint8))


def write_coco(
    root: Path,
    kind: str,
    images: Mapping[str, Sequence[Mapping[str, Any]]],
    hw: tuple[int, int] = (6, 8),
    categories: Sequence[tuple[int, str, int]] = ((1, "cat", 1), (7, "grass", 0)),
    split: str = "train2017",
) -> Path:
    """COCO annotations of black images: for instances annotations by image, for panoptic segments_info by image."""
    entries: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (name, given) in enumerate(images.items(), start=1):
        if not (root / "images" / split / f"{name}.png").exists():
            photo(root / "images" / split / f"{name}.png", hw, number)
        entries.append({"id": number, "file_name": f"{name}.png", "height": hw[0], "width": hw[1]})
        if kind == "panoptic":
            annotations.append({"image_id": number, "file_name": f"{name}.png", "segments_info": list(given)})
        else:
            annotations += [{"id": 10 * number + i, "image_id": number, **each} for i, each in enumerate(given)]
    path = root / "annotations" / f"{kind}_{split}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    listed = [{"id": number, "name": name, "isthing": thing} for number, name, thing in categories]
    path.write_text(json.dumps({"images": entries, "annotations": annotations, "categories": listed}))
    return path


def write_ids(path: Path, ids: NDArray[np.int64]) -> Path:
    """Segment ids as COCO's panoptic PNG: id = red + 256 green + 65536 blue."""
    return save(path, np.stack([ids & 255, ids >> 8 & 255, ids >> 16], axis=-1).astype(np.uint8))
