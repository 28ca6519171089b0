"""The commands and programs in docs/ run as written, in an empty folder."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [page for page in sorted((ROOT / "docs").glob("*.md")) if page.stem != "street"]  # street: hours of training


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page(page: Path, tmp_path: Path) -> None:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    commands = [
        line
        for block in blocks(page, "bash")
        for line in block.splitlines()
        if line.strip() and not line.startswith(("pip install", "make "))
    ]
    programs = blocks(page, "python")
    assert commands or programs, f"{page.name} shows nothing that runs"
    for line in commands:
        folder = ROOT if line.startswith("python -m pytest") else tmp_path
        done = subprocess.run(["bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{page.name}: {line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    if any("photo.jpg" in program or "street.onnx" in program for program in programs):
        _photo_and_model(tmp_path)
    for program in programs:
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{page.name}: {program}\n{done.stderr[-2000:]}"


def test_readme_program(tmp_path: Path) -> None:
    (program,) = blocks(ROOT / "README.md", "python")
    _photo_and_model(tmp_path)
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "'road'" in done.stdout
    assert (tmp_path / "labels.png").is_file()


def _photo_and_model(folder: Path) -> None:
    from PIL import Image

    from denselab.data.scenes import render_scene

    Image.fromarray(render_scene(seed=1, size_hw=(120, 160)).image).save(folder / "photo.jpg")
    shutil.copy(ROOT / "src/denselab/assets/street.onnx", folder / "street.onnx")
