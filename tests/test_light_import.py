"""The runtime half imports, and labels, where PyTorch is not installed."""

import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from artifacts import tiny_artifact

BLOCKED = """
import sys
for name in ("torch", "torchvision", "timm", "lightning", "onnx", "scipy", "matplotlib", "cv2"):
    sys.modules[name] = None
"""


def run(program: str, *arguments: str) -> None:
    done = subprocess.run([sys.executable, "-c", BLOCKED + program, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_runtime_module_imports() -> None:
    run(
        """
import importlib, pkgutil
import denselab, denselab.cli, denselab.data, denselab.evaluate, denselab.catalog, denselab.bench
for package in ("runtime", "metrics", "data.scenes"):
    found = importlib.import_module(f"denselab.{package}")
    for module in pkgutil.iter_modules(found.__path__, found.__name__ + "."):
        importlib.import_module(module.name)
from denselab import results, load
"""
    )


def test_predict_and_score(tmp_path: Path) -> None:
    model = tiny_artifact(tmp_path / "tiny.onnx")
    for split in ("images", "masks"):
        (tmp_path / "data" / split).mkdir(parents=True)
    pixels = np.zeros((9, 12, 3), np.uint8)
    pixels[:, :5, 0] = 255
    Image.fromarray(pixels).save(tmp_path / "data/images/a.png")
    Image.fromarray((pixels[:, :, 0] > 0).astype(np.uint8)).save(tmp_path / "data/masks/a.png")
    command = "import denselab.cli; denselab.cli.main()"
    run(command, "predict", str(tmp_path / "data/images"), "-o", str(tmp_path / "out"), "--model", str(model))
    truth = ["--gt", str(tmp_path / "data/masks"), "--num-classes", "2"]
    run(command, "score", "--task", "semantic", "--pred", str(tmp_path / "out"), *truth)
    run(command, "data", "check", str(tmp_path / "data"))
