"""A seed in, pictures with exact truth out."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from denselab.data.scenes.layout import build_world
from denselab.data.scenes.shade import Surface, shade, surface
from denselab.data.scenes.solids import Batch, Floats, stack
from denselab.data.scenes.trace import trace
from denselab.data.scenes.views import Camera
from denselab.data.scenes.world import FRAME_S, Mount, World
from denselab.errors import InputError

FAR_M = 400.0
"""What is farther counts as sky."""


@dataclass(frozen=True)
class Instance:
    """A visible thing. box_xyxy: tight around its visible pixels, in px; x1 and y1 are exclusive."""

    id: int
    class_id: int
    box_xyxy: tuple[int, int, int, int]


@dataclass(frozen=True)
class Scene:
    """A rendered street and its truth; H x W px, pixel centres on whole numbers.

    image: uint8 [H, W, 3] RGB. class_ids: uint8 [H, W], ids of `denselab.classes.STREET`.
    instance_ids: uint16 [H, W], 0 = none; cars, pedestrians, bicyclists, poles, signs and trees (not hedges) have one,
    the same in all frames of a clip. depth_m: float32 [H, W] along the camera's z axis, 0 = sky (see `valid`).
    normals: float32 [H, W, 3], unit, camera axes (x right, y down, z forward), 0 on sky.
    intrinsics: float64 [3, 3]. world_from_camera: float64 [4, 4]; in the world y is down and the road lies at y = 0.
    instances: those with at least one visible pixel, by id.
    """

    image: NDArray[np.uint8]
    class_ids: NDArray[np.uint8]
    instance_ids: NDArray[np.uint16]
    depth_m: NDArray[np.float32]
    normals: NDArray[np.float32]
    intrinsics: Floats
    world_from_camera: Floats
    instances: tuple[Instance, ...]

    @property
    def valid(self) -> NDArray[np.bool_]:
        """[H, W]: where depth and normals mean something (everywhere but in the sky)."""
        return self.depth_m > 0


def render_scene(seed: int, size_hw: tuple[int, int] = (360, 480)) -> Scene:
    """The street of a seed at its first moment; the same arrays every time.

    Raises InputError for a size below 1x1 or a negative seed.
    """
    return render_clip(seed, 1, size_hw)[0]


def render_clip(seed: int, frames: int, size_hw: tuple[int, int] = (360, 480)) -> list[Scene]:
    """`frames` pictures FRAME_S apart of the street of a seed, in which camera, people and traffic move.

    A frame does not depend on how many follow. Raises InputError as `render_scene`, and for fewer than one frame.
    """
    return list(clip_frames(seed, frames, size_hw))


def clip_frames(seed: int, frames: int, size_hw: tuple[int, int], mount: Mount | None = None) -> Iterator[Scene]:
    """`render_clip` frame by frame, for clips that are too long to hold. mount: of the camera, None: random."""
    if min(size_hw) < 1:
        raise InputError(f"size_hw: wanted at least 1x1 px, got {size_hw[1]}x{size_hw[0]}; name a positive size")
    if seed < 0:
        raise InputError(f"seed: wanted 0 or more, got {seed}; choose another")
    if frames < 1:
        raise InputError(f"frames: wanted 1 or more, got {frames}; ask for at least one")
    world = build_world(seed, mount)
    return (_render(world, seed, frame, size_hw) for frame in range(frames))


def _render(world: World, seed: int, frame: int, size_hw: tuple[int, int]) -> Scene:
    camera = world.drive.camera_at(frame * FRAME_S, size_hw)
    batch = stack(world.solids_at(frame * FRAME_S))
    hits = trace(batch, camera, 1 / FAR_M)
    pixels, seen = surface(batch, camera, hits)
    rng = np.random.default_rng([seed, 2, frame])
    image = shade(batch, camera, pixels, seen, world.weather, world.road, rng)
    return _scene(image, batch, camera, pixels, seen)


def _scene(image: NDArray[np.uint8], batch: Batch, camera: Camera, pixels: NDArray[np.int64], seen: Surface) -> Scene:
    height, width = camera.size_hw
    classes_of = np.array([solid.class_id for solid in batch.solids], np.uint8)
    ids_of = np.array([solid.instance_id for solid in batch.solids], np.uint16)
    class_ids = np.zeros(height * width, np.uint8)
    class_ids[pixels] = classes_of[seen.solid]
    instance_ids = np.zeros(height * width, np.uint16)
    instance_ids[pixels] = ids_of[seen.solid]
    depth_m = np.zeros(height * width, np.float32)
    depth_m[pixels] = seen.depth_m
    normals = np.zeros((height * width, 3), np.float32)
    for axis in range(3):
        normals[pixels, axis] = seen.normal[axis]
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = camera.rotation, camera.position_m
    return Scene(
        image,
        class_ids.reshape(height, width),
        instance_ids.reshape(height, width),
        depth_m.reshape(height, width),
        normals.reshape(height, width, 3),
        camera.intrinsics,
        pose,
        _instances(instance_ids, class_ids, width),
    )


def _instances(instance_ids: NDArray[np.uint16], class_ids: NDArray[np.uint8], width: int) -> tuple[Instance, ...]:
    """Tight boxes of all ids of a flat map."""
    pixels = np.flatnonzero(instance_ids)
    pixels = pixels[np.argsort(instance_ids[pixels], kind="stable")]
    ids = instance_ids[pixels]
    first = np.flatnonzero(np.diff(ids, prepend=np.uint16(0)))
    if not len(first):
        return ()
    row, column = np.divmod(pixels, width)
    bounds = np.stack(
        [
            np.minimum.reduceat(column, first),
            np.minimum.reduceat(row, first),
            np.maximum.reduceat(column, first) + 1,
            np.maximum.reduceat(row, first) + 1,
        ],
        axis=1,
    )
    return tuple(
        Instance(int(ids[at]), int(class_ids[pixels[at]]), (x0, y0, x1, y1))
        for at, (x0, y0, x1, y1) in zip(first, bounds.tolist(), strict=True)
    )
