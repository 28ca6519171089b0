"""Rendered scenes as a data set on disk, with every truth beside the labels."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image

from denselab.classes import STREET
from denselab.data.scenes.render import Scene, clip_frames
from denselab.data.scenes.world import FRAME_S, Mount
from denselab.errors import InputError
from denselab.files import atomic_path

SEEDS_PER_SET = 1_000_000
DEPTH_LIMIT_M = 65.535
SMALLEST_INSTANCE_PX = 64
KINDS = ("images", "labels", "instances", "depth", "normals")
_README = f"""Street scenes rendered by DenseLab, with exact truth.

KIND/SPLIT/NAME.png, the same NAME for every kind; pixel centres lie on whole numbers, x right, y down.
images     8-bit RGB.
labels     8-bit class ids, names, colours and things in dataset.yaml (CamVid's eleven classes).
instances  16-bit ids, 0 = none; cars, pedestrians, bicyclists, poles, signs, trees. In a clip an id is a track.
           Where less than {SMALLEST_INSTANCE_PX} px of an object are seen its id is 0: nobody could tell it apart.
depth      16-bit millimetres along the camera's z axis, at most {DEPTH_LIMIT_M} m; 0 = unknown: farther, or sky.
normals    8-bit RGB, camera axes (x right, y down, z forward, so what faces the camera has z < 0):
           n = rgb / 127.5 - 1, then normalise (exact to 0.4 degrees); (0, 0, 0) = sky.

scenes.json lists for every NAME its split, scene, frame, seed, size, intrinsics [3, 3], world_from_camera [4, 4]
(world: y down, the road at y = 0) and visible instances (id, class_id, box x0 y0 x1 y1 in px, x1 and y1 exclusive).
Frames of a clip are {FRAME_S} s apart. All frames of a scene are in one split.
"""

_DESCRIPTION = STREET.to_dict() | {
    "things": ["car", "pedestrian", "bicyclist"],  # as in Cityscapes; poles, trees and signs have ids all the same
    "masks": "labels",
    "instances": "instances",
    "depth": "depth",
    "scale": 0.001,
    "normals": "normals",
    "intrinsics": "scenes.json",
}

Progress = Callable[[Iterable[Scene], int, str], Iterable[Scene]]


def _silently(items: Iterable[Scene], total: int, label: str) -> Iterable[Scene]:
    del total, label
    return items


def write_scenes(
    folder: Path,
    count: int,
    size_hw: tuple[int, int] = (360, 480),
    seed: int = 0,
    clip_frames: int = 0,
    mount: Mount | None = None,
    progress: Progress = _silently,
) -> None:
    """Render `count` scenes into a data folder that `open_dataset` opens; README.txt there explains the files.

    Scene i has the seed `seed * SEEDS_PER_SET + i`, so different seeds share no scene. The first 80 % are train, then
    10 % val and 10 % test (from 2 and 3 scenes on, at least one each). clip_frames: 0 for single images, otherwise
    every scene is a clip of so many. mount: of the camera that took all; None: every scene has one of its own.
    progress: wraps the work, called as progress(items, total, label).
    Scenes that an earlier call wrote there are removed first. Raises InputError for a count below 1 or too large.
    """
    if not 1 <= count <= SEEDS_PER_SET:
        raise InputError(f"count: wanted 1 to {SEEDS_PER_SET} scenes, got {count}; use several seeds for more")
    if clip_frames < 0:
        raise InputError(f"clip_frames: wanted 0 (single images) or more, got {clip_frames}")
    plan = [
        (scene, frame, _split(scene, count), _name(scene, frame, clip_frames))
        for scene in range(count)
        for frame in range(clip_frames or 1)
    ]
    for kind in KINDS:
        for split in sorted({split for _, _, split, _ in plan} | {"train", "val", "test"}):
            _clear(folder / kind / split)
    for split in {split for _, _, split, _ in plan}:
        for kind in KINDS:
            (folder / kind / split).mkdir(parents=True, exist_ok=True)
    _write_text(folder / "README.txt", _README)
    _write_text(folder / "dataset.yaml", yaml.safe_dump(_DESCRIPTION, sort_keys=False, default_flow_style=None))
    records: list[dict[str, Any]] = []
    rendered = _render_all(count, clip_frames or 1, size_hw, seed, mount)
    for (scene_index, frame, split, name), scene in zip(plan, progress(rendered, len(plan), "rendering"), strict=True):
        for kind, picture in _pictures(scene).items():
            with atomic_path(folder / kind / split / f"{name}.png") as partial:
                picture.save(partial, compress_level=3)
        place = {"name": name, "split": split, "scene": scene_index, "frame": frame, "seed": _seed(seed, scene_index)}
        records.append(place | _record(scene))
    _write_text(folder / "scenes.json", json.dumps({"frame_s": FRAME_S, "scenes": records}) + "\n")


def _render_all(count: int, frames: int, size_hw: tuple[int, int], seed: int, mount: Mount | None) -> Iterator[Scene]:
    for index in range(count):
        yield from clip_frames(_seed(seed, index), frames, size_hw, mount)


def _seed(seed: int, index: int) -> int:
    return seed * SEEDS_PER_SET + index


def _split(index: int, count: int) -> str:
    test = max(count // 10, int(count >= 3))
    val = max(count // 10, int(count >= 2))
    if index >= count - test:
        return "test"
    return "val" if index >= count - test - val else "train"


def _name(index: int, frame: int, clip_frames: int) -> str:
    return f"scene_{index:06d}_{frame:04d}" if clip_frames else f"scene_{index:06d}"


def _clear(folder: Path) -> None:
    """Remove what an earlier call wrote, or its scenes would mix with the new ones."""
    for path in folder.glob("scene_[0-9]*.png"):
        path.unlink()


def _write_text(path: Path, text: str) -> None:
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _pictures(scene: Scene) -> dict[str, Image.Image]:
    """One picture per kind, coded as README.txt says."""
    arrays = (scene.image, scene.class_ids, _told_apart(scene), _millimetres(scene), _normal_colours(scene))
    return {kind: Image.fromarray(array) for kind, array in zip(KINDS, arrays, strict=True)}


def _told_apart(scene: Scene) -> NDArray[np.uint16]:
    """Ids of the objects of which enough is seen."""
    areas_px = np.bincount(scene.instance_ids.ravel())
    return np.where(areas_px[scene.instance_ids] < SMALLEST_INSTANCE_PX, 0, scene.instance_ids).astype(np.uint16)


def _millimetres(scene: Scene) -> NDArray[np.uint16]:
    return np.where(scene.depth_m <= DEPTH_LIMIT_M, np.rint(scene.depth_m * 1000), 0).astype(np.uint16)


def _normal_colours(scene: Scene) -> NDArray[np.uint8]:
    return np.where(scene.valid[..., None], np.rint((scene.normals + 1) * 127.5), 0).astype(np.uint8)


def _record(scene: Scene) -> dict[str, Any]:
    height, width = scene.class_ids.shape
    return {
        "size_hw": [height, width],
        "intrinsics": scene.intrinsics.tolist(),
        "world_from_camera": scene.world_from_camera.tolist(),
        "instances": [
            {"id": instance.id, "class_id": instance.class_id, "box_xyxy": list(instance.box_xyxy)}
            for instance in scene.instances
        ],
    }
