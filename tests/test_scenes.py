"""Rendered scenes: the truth is checked against geometry computed another way."""

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from denselab.classes import STREET
from denselab.data.descriptor import open_dataset
from denselab.data.scenes import Mount, Scene, render_clip, render_scene, write_scenes
from denselab.data.scenes.shade import surface
from denselab.data.scenes.solids import Look, Solid, Street, box, ellipsoid, extrude, limb, placed, rod, stack
from denselab.data.scenes.trace import trace
from denselab.data.scenes.views import Camera, Sun
from denselab.data.scenes.world import glide
from denselab.data.scenes.write import SMALLEST_INSTANCE_PX
from denselab.errors import InputError

SMALL = (90, 120)
GREY = Look(Street.BUILDING, (0.5, 0.5, 0.5))
ID = {name: index for index, name in enumerate(STREET.names)}


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [render_scene(seed, (180, 240)) for seed in range(6)]


@pytest.fixture(scope="module")
def clip() -> list[Scene]:
    return render_clip(6, 4, (180, 240))


def pinhole(size_hw: tuple[int, int], focal_px: float, height_m: float = 0.0) -> Camera:
    """At the origin's (0, -height, 0), looking along z; the principal point is the middle pixel of an odd size."""
    height, width = size_hw
    intrinsics = np.array([[focal_px, 0, (width - 1) / 2], [0, focal_px, (height - 1) / 2], [0, 0, 1]])
    return Camera(np.array([0, -height_m, 0]), np.eye(3), intrinsics, size_hw)


def look_at(camera: Camera, *solids: Solid) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Depth [H, W] (0 = nothing) and normals [H, W, 3]."""
    batch = stack(solids)
    pixels, seen = surface(batch, camera, trace(batch, camera, 1e-3))
    depth_m, normals = np.zeros(camera.size_hw, np.float32), np.zeros((*camera.size_hw, 3), np.float32)
    depth_m.ravel()[pixels] = seen.depth_m
    normals.reshape(-1, 3)[pixels] = np.stack(seen.normal, axis=1)
    return depth_m, normals


def rays(scene: Scene) -> NDArray[np.float64]:
    """[H, W, 3] in camera axes, z = 1."""
    height, width = scene.depth_m.shape
    row, column = np.mgrid[:height, :width]
    return np.stack([column, row, np.ones_like(row)], axis=-1) @ np.linalg.inv(scene.intrinsics).T


def world_points(scene: Scene) -> NDArray[np.float64]:
    """[H, W, 3], back-projected from depth."""
    local = rays(scene) * scene.depth_m[..., None]
    return local @ scene.world_from_camera[:3, :3].T + scene.world_from_camera[:3, 3]


def test_sphere_straight_ahead() -> None:
    depth_m, normals = look_at(pinhole((41, 61), 50.0), ellipsoid((0, 0, 10), (2, 2, 2), GREY))
    assert depth_m[20, 30] == pytest.approx(8.0)
    assert normals[20, 30] == pytest.approx([0, 0, -1])
    # The silhouette: sin(angle) = 2 / 10, so tan(angle) * 50 px = 10.2 px.
    assert np.flatnonzero(depth_m[20]).tolist() == list(range(20, 41))


def test_box_straight_ahead() -> None:
    depth_m, normals = look_at(pinhole((41, 61), 50.0), box((-1.01, -0.51, 5), (1.01, 0.51, 7), GREY))
    face = depth_m > 0
    rows, columns = np.nonzero(face)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (15, 25, 20, 40)  # 50 px * 0.51 m / 5 m = 5.1 px
    np.testing.assert_allclose(depth_m[face], 5.0, rtol=1e-6)
    np.testing.assert_allclose(normals[face], np.tile([0, 0, -1], (face.sum(), 1)))


def test_nearer_thing_hides_farther() -> None:
    far, near = box((-9, -9, 8), (9, 9, 9), GREY), ellipsoid((0, 0, 4), (1, 1, 1), GREY)
    for order in ((far, near), (near, far)):
        depth_m, _ = look_at(pinhole((41, 61), 50.0), *order)
        assert depth_m[20, 30] == pytest.approx(3.0)
        assert depth_m[0, 0] == pytest.approx(8.0)


SOLIDS = {
    "box": placed([box((-1, -2, -1), (1, 0.5, 2), GREY)], 0.5, 7, 0.6),
    "prism": placed([extrude([(1.5, 0.13), (1, -1), (-1, -1.3), (-1.5, 0.13)], 0.8, GREY, lean=0.2)], -0.4, 6, -0.8),
    "ellipsoid": placed([ellipsoid((0.3, -0.2, 0), (1.5, 0.7, 0.4), GREY)], 0, 5, 0.5),
    "limb": placed([limb((0, 0.5, 0), (0.6, -1, 0.8), 0.3, GREY)], 0.2, 4, 0.3),
    "rod": placed([rod((-0.5, 0.8, 0), (0.7, -0.8, 0.5), 0.4, GREY)], 0, 4, 0.2),
    "behind": [ellipsoid((0, 0, -5), (1, 1, 1), GREY)],
    "around": [box((-9, -9, -9), (9, 9, 9), GREY)],
    "beside": [box((1, -1.03, -3), (2, 1.07, 30), GREY)],
}


@pytest.mark.parametrize("name", SOLIDS)
def test_hits_agree_with_marching_along_the_rays(name: str) -> None:
    """An independent reference: small steps, inside or outside by the definition of `Solid`."""
    (solid,) = SOLIDS[name]
    camera = pinhole((13, 17), 12.0)
    depth_m, normals = look_at(camera, solid)
    step_m = 0.002
    steps = np.arange(0.05, 16, step_m)
    for row, column in np.ndindex(13, 17):
        points = steps[:, None] * (camera.ray_matrix @ [column, row, 1])
        inside = _inside(points, solid)
        if name == "around" or not inside.any():
            assert depth_m[row, column] == 0
            continue
        assert depth_m[row, column] == pytest.approx(steps[inside.argmax()], abs=1.01 * step_m)
        hit, normal = points[inside.argmax()], normals[row, column]
        assert _inside(hit - 0.01 * normal, solid) or inside.sum() < 20
        assert not _inside(hit + 0.01 * normal, solid)
        assert normal @ hit < 0


def _inside(points: NDArray[np.float64], solid: Solid) -> NDArray[np.bool_]:
    inside = (points @ solid.planes[:, :3].T <= solid.planes[:, 3]).all(axis=-1)
    if solid.quadric is not None:
        offset = points - solid.centre
        inside &= np.sum(offset @ solid.quadric * offset, axis=-1) <= 1
    return inside


def test_sun_sees_the_side_that_it_lights() -> None:
    to_sun = np.array([0.6, -0.8, 0.0])
    sun = Sun(to_sun, np.zeros(3), 4.0, 65)
    (solid,) = placed([rod((0, 0, 0), (0, -2, 0.5), 0.5, GREY)], 0.3, 0.2, 0.4)
    hits = trace(stack([solid]), sun, -100.0)
    row, column = np.nonzero(hits.face >= 0)
    points = np.stack(sun.points(column, row, hits.key[row, column]), axis=1)
    assert len(points) > 140
    assert _inside(points - 1e-3 * to_sun, solid).mean() > 0.97  # at the rim the rod is thinner than this
    assert not _inside(points + 1e-3 * to_sun, solid).any()


def test_same_seed_same_arrays() -> None:
    first, again = render_scene(3, SMALL), render_scene(3, SMALL)
    for name in ("image", "class_ids", "instance_ids", "depth_m", "normals", "intrinsics", "world_from_camera"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    assert first.instances == again.instances
    assert (render_scene(4, SMALL).class_ids != first.class_ids).any()


def test_a_frame_does_not_depend_on_how_many_follow() -> None:
    longer, shorter = render_clip(3, 3, SMALL), render_clip(3, 2, SMALL)
    for frame in range(2):
        np.testing.assert_array_equal(longer[frame].image, shorter[frame].image)
    np.testing.assert_array_equal(longer[0].image, render_scene(3, SMALL).image)


@pytest.mark.parametrize("size_hw", [(1, 1), (1, 7), (5, 1), (97, 131), (200, 50)])
def test_any_size(size_hw: tuple[int, int]) -> None:
    scene = render_scene(1, size_hw)
    assert scene.image.shape == (*size_hw, 3)
    assert scene.class_ids.shape == scene.instance_ids.shape == scene.depth_m.shape == size_hw
    assert scene.normals.shape == (*size_hw, 3)
    assert (scene.image.dtype, scene.class_ids.dtype, scene.instance_ids.dtype) == (np.uint8, np.uint8, np.uint16)
    assert (scene.depth_m.dtype, scene.normals.dtype) == (np.float32, np.float32)
    assert np.isfinite(scene.depth_m).all()
    assert np.isfinite(scene.normals).all()


def test_all_classes_occur(scenes: list[Scene]) -> None:
    assert set(np.unique([scene.class_ids for scene in scenes])) == set(range(len(STREET)))
    assert [kind.name.lower() for kind in Street] == list(STREET.names)


def test_sky_is_where_nothing_is_known(scenes: list[Scene]) -> None:
    for scene in scenes:
        np.testing.assert_array_equal(scene.valid, scene.class_ids != ID["sky"])
        np.testing.assert_array_equal(scene.valid, scene.normals.any(axis=-1))


def test_road_is_a_plane_at_the_height_of_the_camera(scenes: list[Scene]) -> None:
    for scene in scenes:
        local = (rays(scene) * scene.depth_m[..., None])[scene.class_ids == ID["road"]]
        # Fitted without the pose: n.p = 1, so the plane is 1 / |n| away.
        normal = np.linalg.lstsq(local, np.ones(len(local)), rcond=None)[0]
        height_m = -scene.world_from_camera[1, 3]
        assert 1 / np.linalg.norm(normal) == pytest.approx(height_m, rel=1e-4)
        # The world's y axis points down, as the road's inward normal does: tilt and roll agree with the pose.
        np.testing.assert_allclose(normal * height_m, scene.world_from_camera[1, :3], atol=1e-4)
        assert np.abs(local @ normal - 1).max() * height_m < 2e-3


def test_pavement_lies_a_kerb_above_the_road(scenes: list[Scene]) -> None:
    for scene in scenes:
        up = scene.normals @ scene.world_from_camera[1, :3].astype(np.float32) < -0.99
        y = world_points(scene)[..., 1][(scene.class_ids == ID["pavement"]) & up]
        assert np.abs(y + 0.12).max() < 6e-3


def test_normals_are_unit_and_face_the_camera(scenes: list[Scene]) -> None:
    for scene in scenes:
        normals = scene.normals[scene.valid]
        np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1, atol=1e-5)
        assert np.sum(normals * rays(scene)[scene.valid], axis=1).max() < 1e-4


def test_normals_agree_with_slopes_of_depth(scenes: list[Scene]) -> None:
    for scene in scenes:
        points = rays(scene) * scene.depth_m[..., None]
        across, down = points[1:-1, 2:] - points[1:-1, :-2], points[2:, 1:-1] - points[:-2, 1:-1]
        slopes = np.cross(down, across)
        slopes /= np.linalg.norm(slopes, axis=-1, keepdims=True) + 1e-12
        inner = scene.normals[1:-1, 1:-1]
        flat = np.isin(scene.class_ids, [ID["road"], ID["pavement"], ID["building"]])
        around = np.stack([flat[1:-1, 1:-1], flat[1:-1, 2:], flat[1:-1, :-2], flat[2:, 1:-1], flat[:-2, 1:-1]])
        angle_deg = np.rad2deg(np.arccos(np.clip(np.sum(slopes * inner, axis=-1), -1, 1)))[around.all(axis=0)]
        assert np.median(angle_deg) < 0.1
        assert np.percentile(angle_deg, 85) < 2


def test_instances_are_what_the_map_holds(scenes: list[Scene]) -> None:
    with_ids = {ID[name] for name in ("pole", "tree", "sign", "car", "pedestrian", "bicyclist")}
    for scene in scenes:
        assert [instance.id for instance in scene.instances] == np.unique(scene.instance_ids)[1:].tolist()
        for instance in scene.instances:
            rows, columns = np.nonzero(scene.instance_ids == instance.id)
            assert instance.box_xyxy == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert set(scene.class_ids[rows, columns]) == {instance.class_id}
        assert {instance.class_id for instance in scene.instances} <= with_ids
        always = list(with_ids - {ID["tree"]})  # a hedge is of class tree, but no instance
        assert (scene.instance_ids[np.isin(scene.class_ids, always)] > 0).all()


def test_still_points_move_as_the_camera_says(clip: list[Scene]) -> None:
    first, last = clip[0], clip[-1]
    assert np.linalg.norm((last.world_from_camera - first.world_from_camera)[:3, 3]) > 0.5
    still = np.isin(first.class_ids, [ID["road"], ID["pavement"], ID["building"]])
    camera_from_world = np.linalg.inv(last.world_from_camera)
    local = world_points(first)[still] @ camera_from_world[:3, :3].T + camera_from_world[:3, 3]
    pixels = local @ last.intrinsics.T
    height, width = last.depth_m.shape
    seen = local[:, 2] > 0.5
    column, row = np.rint(pixels[seen, :2] / pixels[seen, 2:]).astype(int).T
    inside = (column >= 0) & (row >= 0) & (column < width) & (row < height)
    expected_m, found_m = local[seen, 2][inside], last.depth_m[row[inside], column[inside]]
    off = np.abs(found_m - expected_m) / expected_m
    assert np.median(off) < 0.01  # half a pixel of a steep road
    assert (off < 0.05).mean() > 0.8  # the rest is hidden by what moved
    same = first.class_ids[still][seen][inside] == last.class_ids[row[inside], column[inside]]
    assert same.mean() > 0.85


def test_tracks_keep_their_class_and_some_move(clip: list[Scene]) -> None:
    class_of = {instance.id: instance.class_id for scene in clip for instance in scene.instances}
    for scene in clip:
        for instance in scene.instances:
            assert class_of[instance.id] == instance.class_id
    shared = set.intersection(*({instance.id for instance in scene.instances} for scene in clip))
    assert len(shared) > 5
    places = {
        track: [np.median(world_points(scene)[scene.instance_ids == track], axis=0) for scene in (clip[0], clip[-1])]
        for track in shared
    }
    along = {track: abs(end[2] - start[2]) for track, (start, end) in places.items()}
    assert max(along[track] for track in shared if class_of[track] == ID["car"]) > 0.5
    # Of a post another part may be visible, but it stands on the same line.
    across = [abs(end[0] - start[0]) for track, (start, end) in places.items() if class_of[track] == ID["pole"]]
    assert np.median(across) < 0.05


def test_glide_starts_at_its_speed_and_never_passes_its_range() -> None:
    assert glide(10, 50, 1e-6) == pytest.approx(1e-5, rel=1e-3)
    assert glide(10, 50, 1e6) == pytest.approx(50)
    assert glide(0, 50, 10) == 0


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: render_scene(0, (0, 5)), "size_hw: wanted at least 1x1 px, got 5x0"),
        (lambda: render_scene(-1), "seed: wanted 0 or more, got -1"),
        (lambda: render_clip(0, 0), "frames: wanted 1 or more, got 0"),
        (lambda: write_scenes(Path("unused"), 0), "count: wanted 1 to 1000000 scenes, got 0"),
        (lambda: write_scenes(Path("unused"), 1, clip_frames=-1), "clip_frames: wanted 0"),
    ],
)
def test_misuse_is_named(call, text: str) -> None:
    with pytest.raises(InputError, match=text):
        call()


def test_written_scenes_open_as_a_data_set(tmp_path: Path) -> None:
    shown: list[tuple[int, str]] = []

    def progress(items, total, label):
        shown.append((total, label))
        return items

    write_scenes(tmp_path, 10, SMALL, seed=2, progress=progress)
    assert shown == [(10, "rendering")]
    dataset = open_dataset(tmp_path)
    assert dataset.classes
    assert (dataset.classes.names, dataset.classes.colours) == (STREET.names, STREET.colours)
    assert {split: len(items) for split, items in dataset.splits.items()} == {"train": 8, "val": 1, "test": 1}
    records = json.loads((tmp_path / "scenes.json").read_text())["scenes"]
    assert [record["seed"] for record in records] == list(range(2_000_000, 2_000_010))
    record, item = records[9], dataset.split("test")[0]
    assert item.name == record["name"] == "scene_000009"
    scene = render_scene(record["seed"], SMALL)
    image, truth = dataset.read(item, {"semantic", "instance"})
    np.testing.assert_array_equal(image, scene.image)
    np.testing.assert_array_equal(truth.class_ids, scene.class_ids)
    assert truth.segments is not None
    things = {STREET.names.index(name) for name in ("car", "pedestrian", "bicyclist")}
    areas = np.bincount(scene.instance_ids.ravel())
    seen = {i.id for i in scene.instances if areas[i.id] >= SMALLEST_INSTANCE_PX}
    assert {s.id for s in truth.segments.segments if not s.is_crowd} == {
        i.id for i in scene.instances if i.id in seen and i.class_id in things
    }

    def stored(kind: str) -> NDArray[np.generic]:
        return np.array(Image.open(tmp_path / kind / "test" / "scene_000009.png"))

    assert 0 < len(seen) < len(scene.instances)
    told_apart = np.where(np.isin(scene.instance_ids, sorted(seen)), scene.instance_ids, 0)
    np.testing.assert_array_equal(stored("instances"), told_apart)
    near = scene.valid & (scene.depth_m < 65.5)
    np.testing.assert_allclose(stored("depth")[near] / 1000, scene.depth_m[near], atol=5.1e-4)
    assert not stored("depth")[~scene.valid | (scene.depth_m > 65.6)].any()
    normals = stored("normals")[scene.valid] / 127.5 - 1
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    cosine = np.sum(normals * scene.normals[scene.valid], axis=1)
    assert np.rad2deg(np.arccos(np.clip(cosine, -1, 1))).max() < 0.4
    np.testing.assert_allclose(record["intrinsics"], scene.intrinsics)
    np.testing.assert_allclose(record["world_from_camera"], scene.world_from_camera)
    assert [tuple(instance["box_xyxy"]) for instance in record["instances"]] == [i.box_xyxy for i in scene.instances]
    assert not list(tmp_path.rglob("*.part*"))


def test_written_clips_stay_in_one_split_and_replace_earlier_scenes(tmp_path: Path) -> None:
    write_scenes(tmp_path, 4, (20, 30))
    write_scenes(tmp_path, 3, (20, 30), clip_frames=2)
    names = {split: sorted(path.name for path in (tmp_path / "images" / split).iterdir()) for split in ("train", "val")}
    assert names == {
        "train": ["scene_000000_0000.png", "scene_000000_0001.png"],
        "val": ["scene_000001_0000.png", "scene_000001_0001.png"],
    }
    records = json.loads((tmp_path / "scenes.json").read_text())["scenes"]
    assert [(record["scene"], record["frame"]) for record in records] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
        (2, 0),
        (2, 1),
    ]
    second = render_clip(1, 2, (20, 30))[1]
    labels = np.array(Image.open(tmp_path / "labels" / "val" / "scene_000001_0001.png"))
    np.testing.assert_array_equal(labels, second.class_ids)


def test_one_camera_for_all_scenes_and_the_same_streets(tmp_path: Path) -> None:
    write_scenes(tmp_path / "one", 3, (48, 64), seed=3, mount=Mount())
    write_scenes(tmp_path / "own", 3, (48, 64), seed=3)
    one, own = (json.loads((tmp_path / name / "scenes.json").read_text())["scenes"] for name in ("one", "own"))
    focal_px = 32 / np.tan(np.deg2rad(30))  # 60 degrees over 64 px
    for scene in one:
        assert scene["intrinsics"] == [
            [pytest.approx(focal_px), 0, 31.5],
            [0, pytest.approx(focal_px), 23.5],
            [0, 0, 1],
        ]
        assert scene["world_from_camera"][1][3] == pytest.approx(-1.5, abs=0.02)
    assert len({scene["intrinsics"][0][0] for scene in own}) == 3
    assert [scene["world_from_camera"][0][3] for scene in one] == [scene["world_from_camera"][0][3] for scene in own]
