"""A data set small enough to learn in seconds: sky over ground, and a block in front of both; colour tells class."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
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
