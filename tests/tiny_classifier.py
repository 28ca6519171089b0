"""A classifier of timm's that tells four colours apart, saved as timm saves models, and photos of these colours."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from denselab import _vision as _vision

# isort: split
import timm

NAMES = ("blue", "green", "grey", "red")
COLOURS = np.array([[30, 40, 200], [40, 190, 60], [120, 120, 120], [210, 50, 40]], float)
SIDE_PX = 16
MODEL = "vit_tiny_patch16_224"
ARGS: dict[str, Any] = {"img_size": SIDE_PX, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}


def photo(class_id: int, seed: int, side_px: int = SIDE_PX) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.clip(COLOURS[class_id] + rng.normal(0, 25, (side_px, side_px, 3)), 0, 255).astype(np.uint8)


def write_photos(root: Path, per_class: int = 4, names: tuple[str, ...] = NAMES, seed: int = 0) -> Path:
    """One folder per class."""
    for class_id, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for number in range(per_class):
            picture = Image.fromarray(photo(class_id % len(NAMES), seed + 100 * class_id + number))
            picture.save(root / name / f"{number}.png")
    return root


def trained() -> nn.Module:
    """In a few steps, so that what it says has margins."""
    torch.manual_seed(0)
    model = timm.create_model(MODEL, num_classes=len(NAMES), **ARGS)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for step in range(40):
        class_ids = torch.arange(32) % len(NAMES)
        photos = torch.from_numpy(np.stack([photo(int(each), 32 * step + i) for i, each in enumerate(class_ids)]))
        pixels = (photos.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
        loss = nn.functional.cross_entropy(model(pixels), class_ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def save(model: nn.Module, folder: Path) -> Path:
    """As `timm.create_model("local-dir:...")` reads it."""
    folder.mkdir(parents=True)
    described = {
        "architecture": MODEL,
        "num_classes": len(NAMES),
        "model_args": ARGS,
        "pretrained_cfg": {
            "input_size": [3, SIDE_PX, SIDE_PX],
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
            "crop_pct": 1.0,
            "interpolation": "bilinear",
            "label_names": list(NAMES),
        },
    }
    (folder / "config.json").write_text(json.dumps(described))
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder
