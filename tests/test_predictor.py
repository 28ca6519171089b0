"""The Python side: load a model, give it anything that is an image."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import denselab
from artifacts import tiny_artifact
from denselab import _load
from denselab.errors import InputError
from denselab.runtime.artifact import read_info
from denselab.runtime.predictor import Predictor, as_pixels

RED, BLUE = (250, 10, 10), (10, 10, 250)


@pytest.fixture
def predictor(tmp_path: Path) -> Predictor:
    return denselab.load(tiny_artifact(tmp_path / "tiny.onnx"), threads=1)


@pytest.fixture
def half_red() -> np.ndarray:
    """Left third red, else blue; 6 rows, 9 columns."""
    image = np.empty((6, 9, 3), np.uint8)
    image[:], image[:, :3] = BLUE, RED
    return image


def test_array_path_and_picture_agree(predictor: Predictor, half_red: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(half_red).save(path)
    for image in (half_red, path, str(path), Image.open(path)):
        result = predictor(image)
        assert np.array_equal(result.class_ids, half_red[:, :, 0] >= 128)
        assert result.model == "tiny"
        assert result.classes.names == ("other", "red")
        assert result.pixel_counts().tolist() == [36, 18]


def test_timing(predictor: Predictor, half_red: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(half_red).save(path)
    assert list(predictor(half_red).timing_ms) == ["engine", "total"]
    timing_ms = predictor(path).timing_ms
    assert list(timing_ms) == ["decode", "engine", "total"]
    assert timing_ms["total"] == pytest.approx(timing_ms["decode"] + timing_ms["engine"])


def test_tiles_can_be_forced(predictor: Predictor) -> None:
    image = np.random.default_rng(0).integers(0, 256, (20, 900, 3), dtype=np.uint8)
    tiled = Predictor(predictor.session, predictor.info, tile_px=400)
    assert np.array_equal(tiled(image).class_ids, predictor(image).class_ids)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright_like_files(half_red: np.ndarray, tmp_path: Path, orientation: int) -> None:
    path = tmp_path / "turned.png"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(half_red).save(path, exif=exif)
    assert np.array_equal(as_pixels(Image.open(path)), as_pixels(path))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK"])
def test_pictures_of_any_8_bit_mode_are_read_like_files(half_red: np.ndarray, tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    picture = Image.fromarray(half_red).convert(mode)
    if "A" in mode:
        picture.putalpha(100)
    picture.save(path)
    assert np.array_equal(as_pixels(Image.open(path)), as_pixels(path))


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_deep_pictures_are_refused(mode: str) -> None:
    with pytest.raises(InputError, match=f"8 bits a channel, got mode {mode}; give the path of its file"):
        as_pixels(Image.new(mode, (4, 4)))


def test_damaged_picture(half_red: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "cut.png"
    Image.fromarray(np.tile(half_red, (50, 50, 1))).save(path, compress_level=0)
    path.write_bytes(path.read_bytes()[:5000])
    with Image.open(path) as picture, pytest.raises(InputError, match=r"PIL cannot read it .*copy or export it again"):
        as_pixels(picture)


@pytest.mark.parametrize(
    ("shape", "dtype", "got", "mend"),
    [
        ((4, 5, 3), np.float32, r"float32 \[4, 5, 3\]", r"\(255 \* image\)\.round\(\)"),
        ((4, 5, 3), np.uint16, r"uint16 \[4, 5, 3\]", "image // 257"),
        ((4, 5, 3), np.int64, r"int64 \[4, 5, 3\]", r'image\.astype\("uint8"\)'),
        ((4, 5), np.uint8, r"uint8 \[4, 5\]", r"numpy\.stack\(\[image\] \* 3"),
        ((4, 5, 4), np.uint8, r"uint8 \[4, 5, 4\]", r"image\[:, :, :3\]"),
        ((3, 4, 5), np.uint8, r"uint8 \[3, 4, 5\]", r"image\.transpose\(1, 2, 0\)"),
        ((1, 4, 5, 3), np.uint8, r"uint8 \[1, 4, 5, 3\]", r"one image at a time: image\[0\]"),
        ((0, 5, 3), np.uint8, r"uint8 \[0, 5, 3\]", "at least one pixel"),
        ((5,), np.uint8, r"uint8 \[5\]", "at least one pixel"),
    ],
)
def test_wrong_arrays_say_how_to_convert(shape: tuple[int, ...], dtype: Any, got: str, mend: str) -> None:
    with pytest.raises(InputError, match=rf"wanted uint8 \[H, W, 3\] RGB, got {got}; .*{mend}"):
        as_pixels(np.zeros(shape, dtype))


def test_other_things_are_refused() -> None:
    with pytest.raises(InputError, match=r"wanted a path, a PIL image or a numpy array .*, got list"):
        as_pixels([[0]])


@pytest.mark.parametrize("model", ["streets", "model.pt", "a/b", ""])
def test_load_lists_what_it_takes(model: str) -> None:
    with pytest.raises(
        InputError, match=r"wanted street, an artifact \(FILE.onnx\), a checkpoint \(FILE.ckpt\), hf:NAME or kmax:FILE"
    ):
        denselab.load(model)


def test_load_missing_files() -> None:
    for name in ("none.onnx", "none.ckpt"):
        with pytest.raises(InputError, match=f"{name}: no such model file"):
            denselab.load(name)


def test_a_checkpoint_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "best.ckpt").write_bytes(b"")
    monkeypatch.setattr(_load, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'needs PyTorch; install it with: pip install "denselab\[train\]"'):
        denselab.load(tmp_path / "best.ckpt")


def test_import_is_light_and_predicting_needs_no_torch(tmp_path: Path) -> None:
    path = tiny_artifact(tmp_path / "tiny.onnx")
    code = f"""
import sys, denselab
slow = {{"numpy", "PIL", "torch", "openvino", "typer"}} & sys.modules.keys()
assert not slow, slow
import numpy
result = denselab.load({str(path)!r}, engine="openvino")(numpy.zeros((5, 6, 3), numpy.uint8))
assert isinstance(result, denselab.SemanticMap) and result.class_ids.shape == (5, 6)
heavy = {{"torch", "torchvision", "onnx", "lightning"}} & sys.modules.keys()
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names() -> None:
    assert all(getattr(denselab, name) is not None for name in denselab.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = denselab.nonsense


@pytest.mark.parametrize(
    ("long_side", "source_hw", "seen_hw"),
    [
        ("auto", (360, 480), (360, 480)),
        ("auto", (720, 960), (720, 960)),
        ("auto", (721, 961), (360, 480)),
        ("auto", (4000, 3000), (480, 360)),
        ("native", (4000, 3000), (4000, 3000)),
        (100, (50, 200), (25, 100)),
        (100, (50, 80), (50, 80)),
        (100, (1, 5000), (1, 100)),
    ],
)
def test_the_size_a_model_sees(tmp_path, long_side, source_hw, seen_hw):
    info = read_info(tiny_artifact(tmp_path / "a.onnx"))
    assert info.train_hw == (360, 480)
    assert Predictor(None, info, long_side=long_side).seen_hw(source_hw) == seen_hw
