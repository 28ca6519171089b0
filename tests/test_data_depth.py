"""Depth, cameras and normals: exact on planes, real sensors as their README says, and every mistake by name."""

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from denselab.data.check import check
from denselab.data.dataset import Dataset
from denselab.data.depth import DepthFile, NormalFile, as_intrinsics, camera, read_intrinsics
from denselab.data.descriptor import open_dataset
from denselab.data.normals import normals_from_depth
from denselab.data.scenes import render_scene, write_scenes
from denselab.data.truth import SizeMismatchError, Truth
from denselab.errors import InputError
from tiny_data import photo, save


def depth_data(root: Path, text: str = "", values: NDArray[np.uint16] | None = None) -> Path:
    """One photo of 3 x 2 px with its depth map."""
    values = np.array([[0, 1000, 2500], [65535, 500, 1]], np.uint16) if values is None else values
    photo(root / "images/a.png", (2, 3))
    save(root / "depth/a.png", values)
    (root / "dataset.yaml").write_text(text)
    return root


def first(dataset: Dataset, *tasks: str) -> Truth:
    return dataset.read(next(iter(dataset.splits.values()))[0], tasks)[1]


def plane_depth(normal: NDArray[np.float64], distance_m: float, k: NDArray[np.float64], hw: tuple[int, int]):
    """Depth float64 [H, W] of the plane n . P = -distance, and n made unit."""
    unit = normal / np.linalg.norm(normal)
    rows, columns = np.mgrid[: hw[0], : hw[1]]
    rays = np.stack([columns, rows, np.ones(hw)], axis=-1) @ np.linalg.inv(k).T
    return -distance_m / (rays @ unit), unit


def test_units_invalid_values_and_camera(tmp_path: Path) -> None:
    text = "scale: 1/1000\ninvalid: [0, 65535]\nintrinsics: [100, 90, 1, 0.5]\n"
    dataset = open_dataset(depth_data(tmp_path, text))
    assert dataset.classes is None
    assert dataset.tasks == {"depth", "normals"}
    truth = first(dataset, "depth")
    assert truth.depth_m is not None
    assert truth.depth_m.tolist() == pytest.approx(np.float32([[0, 1, 2.5], [0, 0.5, 0.001]]))
    assert truth.intrinsics is not None
    assert truth.intrinsics.tolist() == [[100, 0, 1], [0, 90, 0.5], [0, 0, 1]]
    assert truth.normals is None
    assert first(dataset, "normals").depth_m is None


def test_without_scale_millimetres_are_assumed_and_said(tmp_path: Path) -> None:
    dataset = open_dataset(depth_data(tmp_path))
    assert dataset.tasks == {"depth"}
    assert "depth without scale: taken as 0.001 m per unit; dataset.yaml can say scale:" in dataset.notes


def test_arrays_in_metres(tmp_path: Path) -> None:
    depth_data(tmp_path, "scale: 1\n")
    (tmp_path / "depth/a.png").unlink()
    np.save(tmp_path / "depth/a.npy", np.array([[1.5, np.nan, -1], [np.inf, 0, 2]], np.float32))
    truth = first(open_dataset(tmp_path), "depth")
    assert truth.depth_m is not None
    assert truth.depth_m.tolist() == [[1.5, 0, 0], [0, 0, 2]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scale: 0", r"scale: wanted a number above 0, such as 0\.001 or 1/256, got 0"),
        ("scale: 1/0", r"scale: wanted a number above 0"),
        ("invalid: none", r"invalid: wanted numbers, such as \[0, 65535\], got 'none'"),
        ("intrinsics: [1, 2, 3]", r"intrinsics: wanted fx, fy, cx, cy in px, or a 3 x 3 matrix .* got \[1, 2, 3\]"),
        ("intrinsics: [-1, 2, 3, 4]", r"intrinsics: wanted fx, fy, cx, cy in px"),
        ("intrinsics: gone.txt", r"intrinsics: wanted a path in .*, got 'gone\.txt'"),
        ("normals: from depth", r"normals: from depth needs a depth folder and the camera; add intrinsics: \[fx"),
        ("normal_signs: [1, 2, 3]", r"normal_signs: wanted 1 or -1 for x, y and z"),
        ("depth: gone", r"wanted a folder of depth \(gone/, .* name the folder in .*dataset\.yaml"),
    ],
)
def test_descriptor_mistakes(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_dataset(depth_data(tmp_path, text))


def test_nothing_known_in_a_file(tmp_path: Path) -> None:
    root = depth_data(tmp_path, "invalid: [0, 7]", np.full((2, 3), 7, np.uint16))
    with pytest.raises(InputError, match=r"a\.png: wanted some known depth, got none in 6 px \(7 to 7; unknown"):
        first(open_dataset(root), "depth")
    assert len(check(root).problems) == 1


def test_depth_files_that_cannot_be_used(tmp_path: Path) -> None:
    image = photo(tmp_path / "a.png", (2, 3))
    with pytest.raises(InputError, match=r"c\.png: wanted depth as one grey channel \(16-bit PNG\), got: "):
        DepthFile(photo(tmp_path / "c.png", (2, 3), 5), 1.0).read(image, (2, 3))
    with pytest.raises(SizeMismatchError, match=r"d\.png: wanted the size of its image .*a\.png, 3x2 px, got 1x1 px"):
        DepthFile(save(tmp_path / "d.png", np.ones((1, 1), np.uint16)), 1.0).read(image, (2, 3))
    (tmp_path / "e.npy").write_bytes(b"no array")
    with pytest.raises(InputError, match=r"e\.npy: wanted a \.npy array of numbers"):
        DepthFile(tmp_path / "e.npy", 1.0).read(image, (2, 3))
    np.save(tmp_path / "f.npy", np.ones((2, 3, 1)))
    with pytest.raises(InputError, match=r"f\.npy: wanted depth \[H, W\], got \[2, 3, 1\]"):
        DepthFile(tmp_path / "f.npy", 1.0).read(image, (2, 3))
    with pytest.raises(InputError, match=r"f\.npy: wanted normals \[H, W, 3\], got \[2, 3, 1\]"):
        NormalFile(tmp_path / "f.npy").read(image, (2, 3))


def test_cameras_in_files(tmp_path: Path) -> None:
    path = tmp_path / "k.txt"
    path.write_text("585, 580 320 240")
    assert np.array_equal(np.asarray(read_intrinsics(path)), camera(585, 580, 320, 240))
    path.write_text("585 0 320\n0 580 240\n0 0 1")
    assert np.array_equal(np.asarray(read_intrinsics(path)), camera(585, 580, 320, 240))
    path.write_text("585 0 320")
    with pytest.raises(InputError, match=r"k\.txt: wanted fx, fy, cx, cy in px"):
        read_intrinsics(path)
    path.write_text("f = 585")
    with pytest.raises(InputError, match=r"k\.txt: wanted the numbers of a camera"):
        read_intrinsics(path)
    with pytest.raises(InputError, match=r"x: wanted fx"):
        as_intrinsics([[1, 0, 0], [0, 1, 0], [0, 0, 2]], "x")


def test_cameras_by_name(tmp_path: Path) -> None:
    depth_data(tmp_path, "intrinsics: k.json")
    (tmp_path / "k.json").write_text(json.dumps({"a": [1, 2, 3, 4]}))
    truth = first(open_dataset(tmp_path), "depth")
    assert truth.intrinsics is not None
    assert np.array_equal(truth.intrinsics, camera(1, 2, 3, 4))
    (tmp_path / "k.json").write_text(json.dumps({"b": [1, 2, 3, 4]}))
    with pytest.raises(InputError, match=r"k\.json: wanted intrinsics of a, got those of 1 others; add them"):
        open_dataset(tmp_path)


@pytest.mark.parametrize("normal", [(0, 0, -1), (0, -1, -0.2), (0.5, -0.6, -0.6), (-0.9, 0.1, -0.5)])
def test_normals_are_exact_on_planes(normal: tuple[float, float, float]) -> None:
    k = camera(40, 44, 23.5, 17)
    depth_m, unit = plane_depth(np.array(normal, float), 2.0, k, (36, 48))
    seen = (depth_m > 0) & (depth_m < 50)
    normals = normals_from_depth(np.where(seen, depth_m, 0).astype(np.float32), k)
    known = normals.any(axis=-1)
    assert known.sum() > 200
    assert np.abs(normals[known] - unit).max() < 1e-4
    rows, columns = np.nonzero(known)
    rays = np.stack([(columns - 23.5) / 40, (rows - 17) / 44, np.ones(len(rows))], axis=-1)
    assert (np.einsum("nc,nc->n", rays, normals[known]) < 0).all(), "all face the camera"


def test_a_floor_by_hand() -> None:
    """One metre below a camera that looks ahead: z = f / (v - cy), normal straight up."""
    depth_m = np.repeat(10 / np.arange(1.0, 12)[:, None], 9, axis=1).astype(np.float32)
    normals = normals_from_depth(depth_m, camera(10, 10, 4, -1), radius_px=1)
    assert normals[1:-1, 1:-1].reshape(-1, 3) == pytest.approx(np.tile([0, -1, 0], (63, 1)), abs=1e-5)
    assert not normals[0].any()
    assert not normals[:, -1].any()


def test_normals_are_unknown_at_holes_and_jumps() -> None:
    depth_m = np.full((20, 30), 2, np.float32)
    depth_m[:, 15:] = 3
    depth_m[5, 5] = 0
    known = normals_from_depth(depth_m, camera(20, 20, 15, 10), radius_px=2).any(axis=-1)
    expected = np.zeros((20, 30), bool)
    expected[2:-2, 2:-2] = True
    expected[:, 13:17] = False  # windows of 5 px that hold columns on both sides
    expected[3:8, 3:8] = False
    assert np.array_equal(known, expected)
    assert not normals_from_depth(np.ones((3, 30), np.float32), camera(1, 1, 1, 1)).any(), "smaller than a window"
    assert not normals_from_depth(np.zeros((20, 30), np.float32), camera(1, 1, 1, 1)).any()


def test_normals_of_a_rendered_street(tmp_path: Path) -> None:
    """Independent reference: the renderer knows the normal of every surface; curved and thin ones spoil a few."""
    scene = render_scene(3, (120, 160))
    depth_m = np.where(np.isfinite(scene.depth_m), scene.depth_m, 0).astype(np.float32)
    normals = normals_from_depth(depth_m, scene.intrinsics, radius_px=1)
    known = normals.any(axis=-1) & scene.valid
    cosine = np.einsum("nc,nc->n", normals[known], scene.normals[known]).clip(-1, 1)
    assert known.mean() > 0.3
    assert np.degrees(np.arccos(np.median(cosine))) < 0.5
    write_scenes(tmp_path, 3, (48, 64))
    dataset = open_dataset(tmp_path)
    truth = first(dataset, *dataset.tasks)
    assert truth.intrinsics is not None
    assert truth.normals is not None
    assert truth.depth_m is not None
    first_scene = render_scene(0, (48, 64))
    seen = first_scene.valid
    assert np.abs(truth.normals[seen] - first_scene.normals[seen]).max() < 0.01
    near = first_scene.depth_m < 65
    assert np.abs(truth.depth_m[near] - first_scene.depth_m[near]).max() < 0.00051
    assert np.allclose(truth.intrinsics, first_scene.intrinsics)


def test_normal_maps_and_their_signs(tmp_path: Path) -> None:
    photo(tmp_path / "images/a.png", (1, 3))
    save(tmp_path / "normals/a.png", np.array([[[0, 0, 0], [128, 255, 128], [128, 128, 0]]], np.uint8))
    dataset = open_dataset(tmp_path)
    assert dataset.tasks == {"normals"}
    normals = first(dataset, "normals").normals
    assert normals is not None
    assert normals[0] == pytest.approx(np.array([[0, 0, 0], [0, 1, 0], [0, 0, -1]]), abs=0.01)
    (tmp_path / "dataset.yaml").write_text("normal_signs: [1, -1, -1]")
    turned = first(open_dataset(tmp_path), "normals").normals
    assert turned is not None
    assert turned[0] == pytest.approx(np.array([[0, 0, 0], [0, -1, 0], [0, 0, 1]]), abs=0.01)


def test_frames_named_as_in_7_scenes(tmp_path: Path) -> None:
    for number in range(20):
        photo(tmp_path / f"seq-01/frame-{number:06d}.color.png", (2, 3))
        save(tmp_path / f"seq-01/frame-{number:06d}.depth.png", np.full((2, 3), 65535 - number, np.uint16))
    (tmp_path / "seq-01/frame-000001.depth.png").unlink()
    dataset = open_dataset(tmp_path)
    assert dataset.tasks == {"depth"}
    assert [item.name for item in dataset.split("val")] == ["seq-01/frame-000018", "seq-01/frame-000019"]
    assert len(dataset.split("train")) == 17
    assert dataset.left_out[0].missing == "depth map"
    with pytest.raises(InputError, match=r"frame-000000\.depth\.png: wanted some known depth"):
        first(dataset, "depth")


def test_7_scenes_is_as_its_readme_says(shared_data: Path) -> None:
    dataset = open_dataset(shared_data / "rgbd_7scenes")
    assert dataset.tasks == {"depth", "normals"}
    items = [item for part in dataset.splits.values() for item in part]
    assert len(items) == 200
    depths = [dataset.read(item, {"depth"})[1].depth_m for item in items[::8]]
    values = np.stack([depth for depth in depths if depth is not None])
    known = values[values > 0]
    assert 0.79 < known.min() < 0.95
    assert 3.5 < known.max() <= 3.981
    assert np.median(known) == pytest.approx(1.83, abs=0.05)
    assert (values > 0).mean() == pytest.approx(0.89, abs=0.01)
    truth = dataset.read(items[0], {"normals"})[1]
    assert truth.intrinsics is not None
    assert np.array_equal(truth.intrinsics, camera(585, 585, 320, 240))
    assert truth.normals is not None
    known_normals = truth.normals[truth.normals.any(axis=-1)]
    assert len(known_normals) > 0.6 * 640 * 480
    assert (known_normals[:, 2] < 0).mean() > 0.95


def test_depth_lists_of_kitti_and_nyu(shared_data: Path) -> None:
    dataset = open_dataset(shared_data / "depth_samples")
    assert {split: len(items) for split, items in dataset.splits.items()} == {"test": 6}
    by_name = {item.name: dataset.read(item, {"depth"})[1] for item in dataset.split("test")}
    kitti, nyu = by_name["kitti_demo/rgb/0000000005"], by_name["nyu_demo/rgb/rgb_00000"]
    assert kitti.depth_m is not None
    assert nyu.depth_m is not None
    assert 0.15 < (kitti.depth_m > 0).mean() < 0.25
    assert 60 < kitti.depth_m.max() < 90
    assert 2 < nyu.depth_m.max() < 10
    assert nyu.intrinsics is not None
    assert np.array_equal(nyu.intrinsics, camera(518.8579, 519.46961, 325.58245, 253.73617))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{", r"test_annotations\.json: wanted a list of depth samples in JSON"),
        ('{"images": []}', r'wanted \{"files": \[\{"rgb": '),
        ('{"files": []}', r"wanted entries under files, got none"),
        ('{"files": [{"rgb": "a.png"}]}', r"wanted rgb, depth and depth_scale \(units per metre\) of a sample"),
        (
            '{"files": [{"rgb": "a.png", "depth": "b.png", "depth_scale": 1}]}',
            r"wanted the file b\.png in .*, got none",
        ),
        (
            '{"files": [{"rgb": "a.png", "depth": "a.png", "depth_scale": 1, "cam_in": 3}]}',
            r"a\.png: cam_in: wanted fx",
        ),
    ],
)
def test_depth_lists_that_cannot_be_used(tmp_path: Path, data: str, message: str) -> None:
    photo(tmp_path / "a.png", (2, 2))
    (tmp_path / "test_annotations.json").write_text(data)
    with pytest.raises(InputError, match=message):
        open_dataset(tmp_path)


def test_patterns_name_files_of_one_folder(tmp_path: Path) -> None:
    for name in "ab":
        photo(tmp_path / f"data/{name}_rgb.png", (2, 2))
        save(tmp_path / f"data/{name}_d.png", np.full((2, 2), 256, np.uint16))
    (tmp_path / "my.yaml").write_text("images: data/*_rgb.png\ndepth: data/*_d.png\nscale: 1/256\n")
    dataset = open_dataset(tmp_path / "my.yaml")
    assert sorted(item.name for part in dataset.splits.values() for item in part) == ["a", "b"]
    truth = first(dataset, "depth")
    assert truth.depth_m is not None
    assert truth.depth_m.tolist() == [[1, 1], [1, 1]]
