"""All there is to draw: what stands, what moves and how, the road, the light, and the camera's path."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from denselab.data.scenes.solids import Floats, Solid, placed
from denselab.data.scenes.views import Camera
from denselab.data.scenes.weather import Weather

FRAME_S = 0.1
"""Seconds between the frames of a clip."""

Body = Callable[[np.random.Generator, float], list[Solid]]


@dataclass(frozen=True)
class Road:
    """The carriageway: |x| <= half_width_m along z. keep: +1 traffic keeps right, -1 left.

    dash_m: period of the centre line, 0 none. edge: 0 plain, 1 one line, 2 double. cycle_lane: coloured strip.
    zebra_m: z where a crossing starts (then 3 m long), or None. side_streets: (side, z0, z1).
    """

    half_width_m: float
    pavement_m: float
    keep: int
    dash_m: float
    edge: int
    yellow: bool
    cycle_lane: bool
    zebra_m: float | None
    side_streets: tuple[tuple[int, float, float], ...]

    @property
    def has_parking(self) -> bool:
        """Wide enough for cars to stand along the kerb."""
        return self.half_width_m > 4.6

    @property
    def lane_m(self) -> float:
        """The middle of a lane, metres from the middle of the road."""
        return (self.half_width_m - 2.0 * self.has_parking) / 2


@dataclass(frozen=True)
class Actor:
    """Something that moves straight on: at most `range_m`, slowing down as it gets there.

    body: builds its solids from a generator (always freshly seeded with `seed`) and the metres it went.
    """

    body: Body
    seed: int
    instance_id: int
    x: float
    z: float
    yaw_rad: float
    speed_mps: float
    range_m: float

    def solids_at(self, seconds: float) -> list[Solid]:
        """Its solids, in the world."""
        went = glide(self.speed_mps, self.range_m, seconds)
        body = self.body(np.random.default_rng(self.seed), went)
        x, z = self.x + went * np.sin(self.yaw_rad), self.z + went * np.cos(self.yaw_rad)
        return placed(body, x, z, self.yaw_rad, self.instance_id)


@dataclass(frozen=True)
class Mount:
    """How a camera sits in its car, and its lens: height over the road, tilt, and the widest view angle."""

    height_m: float = 1.5
    pitch_rad: float = 0.02
    roll_rad: float = 0.0
    view_rad: float = float(np.deg2rad(60))


@dataclass(frozen=True)
class Drive:
    """The camera's path: lens and mount, then how it moves and sways."""

    x: float
    height_m: float
    yaw_rad: float
    pitch_rad: float
    roll_rad: float
    view_rad: float
    speed_mps: float
    range_m: float
    sway: float

    def camera_at(self, seconds: float, size_hw: tuple[int, int]) -> Camera:
        """The camera; its widest view angle is over the width, or 4/3 of the height if that is more."""
        height, width = size_hw
        went = glide(self.speed_mps, self.range_m, seconds)
        sway = self.sway * np.array([np.sin(0.5 * went), np.sin(1.7 * went + 1), np.sin(0.21 * went + 2)])
        rotation = _rotation(self.yaw_rad + 0.02 * sway[2], self.pitch_rad + 0.004 * sway[1], self.roll_rad)
        position = np.array([self.x + 0.15 * sway[2], -self.height_m + 0.01 * sway[1], went])
        focal = max(width, height * 4 / 3) / 2 / np.tan(self.view_rad / 2)
        intrinsics = np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]])
        return Camera(position, rotation, intrinsics, size_hw)


@dataclass(frozen=True)
class World:
    """All there is to draw."""

    fixed: tuple[Solid, ...]
    actors: tuple[Actor, ...]
    road: Road
    weather: Weather
    drive: Drive

    def solids_at(self, seconds: float) -> list[Solid]:
        """Everything, where it is at a time."""
        moving = [solid for actor in self.actors for solid in actor.solids_at(seconds)]
        return [*self.fixed, *moving]


def glide(speed_mps: float, range_m: float, seconds: float) -> float:
    """Metres gone: `speed_mps` at first, slowing so that `range_m` is never passed."""
    return float(range_m * -np.expm1(-speed_mps * seconds / range_m))


def _rotation(yaw: float, pitch: float, roll: float) -> Floats:
    """Camera axes in the world [3, 3]: yaw turns z towards x, pitch turns z down, roll turns x towards y."""
    cy, sy, cp, sp, cr, sr = np.cos(yaw), np.sin(yaw), np.cos(pitch), np.sin(pitch), np.cos(roll), np.sin(roll)
    turn = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    tilt = np.array([[1, 0, 0], [0, cp, sp], [0, -sp, cp]])
    spin = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    return turn @ tilt @ spin
