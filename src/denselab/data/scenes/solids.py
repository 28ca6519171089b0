"""Convex solids: the intersection of half-spaces and at most one quadric. Everything in a scene is made of these.

Coordinates are right-handed metres: x right, y DOWN, z forward; the ground is y = 0, so heights are negative y.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Map = NDArray[np.floating[Any]]
"""Computed per pixel, in float32."""

Rgb = tuple[float, float, float]
"""Linear red, green, blue; 1 is white."""


_HIGH = (np.arange(8)[:, None] >> np.arange(3) & 1).astype(float)
_UNIT = np.eye(3)


class Street(IntEnum):
    """Class ids in the order of `denselab.classes.STREET` (CamVid's eleven)."""

    SKY = 0
    BUILDING = 1
    POLE = 2
    ROAD = 3
    PAVEMENT = 4
    TREE = 5
    SIGN = 6
    FENCE = 7
    CAR = 8
    PEDESTRIAN = 9
    BICYCLIST = 10


class Material(IntEnum):
    """How a surface is painted (`shade.py`)."""

    PLAIN = 0
    FACADE = 1
    ROAD = 2
    PAVING = 3
    PLANKS = 4
    FOLIAGE = 5
    GLASS = 6
    LAMP = 7
    WHEEL = 8
    ROOF = 9


class Cut(IntEnum):
    """Which part of a surface is open, so that one sees what is behind it (`trace.py`)."""

    NONE = 0
    LEAVES = 1
    BARE = 2
    RAILINGS = 3
    RIM = 4


@dataclass(frozen=True, slots=True)
class Solid:
    """A convex solid; its faces are its planes in order, then the quadric if it has one.

    planes: [N, 4], inside is n.p <= d with n the outward unit normal in columns 0..2 and d in column 3.
    quadric: [3, 3] A or None, inside is (p - centre)^T A (p - centre) <= 1.
    centre: [3], also the origin of its texture. corners: [8, 3] of a box that holds it, in the order of `_corners`.
    colours: linear RGB of all faces [3], or of each [faces, 3]. pitch_m: metres per texture cell, across and up.
    grain: strength of its noise. detail: 0..1, chooses among variants of its material. instance_id 0: none.
    """

    planes: Floats
    centre: Floats
    corners: Floats
    class_id: Street
    colours: Floats
    quadric: Floats | None = None
    material: Material = Material.PLAIN
    cut: Cut = Cut.NONE
    pitch_m: tuple[float, float] = (1.0, 1.0)
    grain: float = 0.15
    detail: float = 0.0
    instance_id: int = 0

    @property
    def faces(self) -> int:
        """How many faces."""
        return len(self.planes) + (self.quadric is not None)


@dataclass(frozen=True, slots=True)
class Look:
    """What a part is and how it is painted; the fields are those of `Solid`."""

    class_id: Street
    colours: Rgb | Sequence[Rgb]
    material: Material = Material.PLAIN
    cut: Cut = Cut.NONE
    pitch_m: tuple[float, float] = (1.0, 1.0)
    grain: float = 0.15
    detail: float = 0.0


def box(low: Sequence[float], high: Sequence[float], look: Look) -> Solid:
    """Axis-aligned box from corner `low` to corner `high`; faces -x, -y, -z, +x, +y, +z."""
    low_m, high_m = np.array(low, float), np.array(high, float)
    planes = np.zeros((6, 4))
    planes[:3, :3], planes[3:, :3] = -_UNIT, _UNIT
    planes[:3, 3], planes[3:, 3] = -low_m, high_m
    origin = np.array([low_m[0], high_m[1], low_m[2]])
    return _solid(planes, origin, _corners(low_m, high_m), look)


def extrude(profile_zy: Sequence[tuple[float, float]], half_width: float, look: Look, lean: float = 0.0) -> Solid:
    """A convex side view (z, y), turning from +z to -y, swept from -half_width to half_width across x.

    lean: how far the sides lean inwards per metre of height above the profile's lowest point.
    Faces: one per profile edge, then the left (-x) and right sides.
    """
    points = np.array(profile_zy, float)
    edges = np.roll(points, -1, axis=0) - points
    normals = np.stack([np.zeros(len(points)), edges[:, 0], -edges[:, 1]], axis=1)
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    if np.sum(normals[0, 2:0:-1] * (points.mean(0) - points[0])) > 0:
        normals = -normals
    offsets = normals[:, 2] * points[:, 0] + normals[:, 1] * points[:, 1]
    bottom = points[:, 1].max()
    length = np.hypot(1.0, lean)
    sides = np.array([[sign, -lean, 0.0, half_width - lean * bottom] for sign in (-1.0, 1.0)]) / length
    planes = np.concatenate([np.column_stack([normals, offsets]), sides])
    (z_low, y_low), (z_high, y_high) = points.min(0), points.max(0)
    corners = _corners(np.array([-half_width, y_low, z_low]), np.array([half_width, y_high, z_high]))
    return _solid(planes, np.array([0.0, bottom, points[:, 0].mean()]), corners, look)


def ellipsoid(centre: Sequence[float], radii: Sequence[float], look: Look) -> Solid:
    """Axis-aligned ellipsoid."""
    centre_m, radii_m = np.array(centre, float), np.array(radii, float)
    quadric = np.diag(radii_m**-2)
    return _solid(np.zeros((0, 4)), centre_m, _corners(centre_m - radii_m, centre_m + radii_m), look, quadric)


def limb(start: Sequence[float], end: Sequence[float], radius: float, look: Look) -> Solid:
    """Ellipsoid of revolution whose long axis runs from `start` to `end`."""
    start_m, end_m = np.array(start, float), np.array(end, float)
    centre, half = (start_m + end_m) / 2, (end_m - start_m) / 2
    square = half @ half
    axis = np.outer(half, half) / square
    quadric = (_UNIT - axis) / radius**2 + axis / square
    reach = np.sqrt(np.diag(radius**2 * (_UNIT - axis) + square * axis))
    return _solid(np.zeros((0, 4)), centre, _corners(centre - reach, centre + reach), look, quadric)


def rod(start: Sequence[float], end: Sequence[float], radius: float, look: Look) -> Solid:
    """Cylinder with flat ends; faces: the end at `start`, the end at `end`, the mantle."""
    start_m, end_m = np.array(start, float), np.array(end, float)
    axis = end_m - start_m
    axis /= math.sqrt(axis @ axis)
    planes = np.array([[*-axis, -axis @ start_m], [*axis, axis @ end_m]])
    quadric = (_UNIT - axis[:, None] * axis) / radius**2
    reach = radius * np.sqrt(np.maximum(1 - axis**2, 0))
    corners = _corners(np.minimum(start_m, end_m) - reach, np.maximum(start_m, end_m) + reach)
    return _solid(planes, (start_m + end_m) / 2, corners, look, quadric)


def half_space(normal: Sequence[float], offset: float, look: Look, reach_m: float = 1000.0) -> Solid:
    """Everything with normal.p <= offset (an unbounded ground or wall); bounded by `reach_m` for the screen only."""
    corners = _corners(np.full(3, -reach_m), np.full(3, reach_m))
    return _solid(np.array([[*normal, offset]], float), np.zeros(3), corners, look)


def placed(solids: Sequence[Solid], x: float, z: float, yaw_rad: float = 0.0, instance_id: int = 0) -> list[Solid]:
    """The solids turned by `yaw_rad` about the vertical (z towards x), moved to (x, 0, z), given an instance id."""
    cos, sin = math.cos(yaw_rad), math.sin(yaw_rad)
    turn = np.array([[cos, 0.0, sin], [0.0, 1.0, 0.0], [-sin, 0.0, cos]])
    shift = np.array([x, 0.0, z])
    centres = np.array([solid.centre for solid in solids]) @ turn.T + shift
    corners = np.array([solid.corners for solid in solids]) @ turn.T + shift
    planes = np.concatenate([solid.planes for solid in solids])
    planes[:, :3] = planes[:, :3] @ turn.T
    planes[:, 3] += planes[:, :3] @ shift
    moved: list[Solid] = []
    stop = 0
    for index, solid in enumerate(solids):
        start, stop = stop, stop + len(solid.planes)
        moved.append(
            Solid(
                planes[start:stop],
                centres[index],
                corners[index],
                solid.class_id,
                solid.colours,
                None if solid.quadric is None else turn @ solid.quadric @ turn.T,
                solid.material,
                solid.cut,
                solid.pitch_m,
                solid.grain,
                solid.detail,
                instance_id or solid.instance_id,
            )
        )
    return moved


def _corners(low: Floats, high: Floats) -> Floats:
    """The eight corners; corner i takes `high` on axis k where bit k of i is set."""
    return low + _HIGH * (high - low)


def _solid(planes: Floats, centre: Floats, corners: Floats, look: Look, quadric: Floats | None = None) -> Solid:
    return Solid(
        planes,
        centre,
        corners,
        look.class_id,
        np.array(look.colours, float),
        quadric,
        look.material,
        look.cut,
        look.pitch_m,
        look.grain,
        look.detail,
    )


@dataclass(frozen=True)
class Batch:
    """Solids side by side in arrays, for one frame.

    S solids, P planes, F faces. planes [P, 4], first_plane [S + 1]; first_face [S + 1], solid_of_face [F];
    quadrics [S, 3, 3] (zero where has_quadric is False); normals [F, 3] (zero on quadrics), colours [F, 3].
    tangents: [F, 2, 3], texture axes per face, divided by the pitch.
    """

    solids: tuple[Solid, ...]
    planes: Floats
    first_plane: NDArray[np.int64]
    first_face: NDArray[np.int64]
    solid_of_face: NDArray[np.int64]
    centres: Floats
    corners: Floats
    quadrics: Floats
    has_quadric: NDArray[np.bool_]
    normals: Floats
    colours: Floats
    tangents: Floats


def stack(solids: Sequence[Solid]) -> Batch:
    """Put solids side by side."""
    plane_counts = np.array([len(solid.planes) for solid in solids])
    has_quadric = np.array([solid.quadric is not None for solid in solids])
    face_counts = plane_counts + has_quadric
    first_plane = np.concatenate([[0], np.cumsum(plane_counts)])
    first_face = np.concatenate([[0], np.cumsum(face_counts)])
    solid_of_face = np.repeat(np.arange(len(solids)), face_counts)
    planes = np.concatenate([solid.planes for solid in solids])
    is_plane = np.arange(len(solid_of_face)) - first_face[solid_of_face] < plane_counts[solid_of_face]
    normals = np.zeros((len(solid_of_face), 3))
    normals[is_plane] = planes[:, :3]
    none = np.zeros((3, 3))
    pitch_m = np.array([solid.pitch_m for solid in solids])
    return Batch(
        tuple(solids),
        planes,
        first_plane,
        first_face,
        solid_of_face,
        np.stack([solid.centre for solid in solids]),
        np.stack([solid.corners for solid in solids]),
        np.stack([none if solid.quadric is None else solid.quadric for solid in solids]),
        has_quadric,
        normals,
        np.concatenate([np.broadcast_to(solid.colours, (solid.faces, 3)) for solid in solids]),
        _tangents(normals) / pitch_m[solid_of_face][:, :, None],
    )


def _tangents(normals: Floats) -> Floats:
    """Texture axes [F, 2, 3]: across and up on walls, x and z on level faces, oblique on quadrics."""
    x, z = normals[:, 0], normals[:, 2]
    level = np.hypot(x, z)
    steep = level > 0.1
    safe = np.where(steep, level, 1.0)
    across = np.stack([np.where(steep, z / safe, 1.0), np.zeros_like(x), np.where(steep, -x / safe, 0.0)], axis=1)
    up = np.cross(across, normals)
    up[~steep] = (0.0, 0.0, 1.0)
    across_up = np.stack([across, up], axis=1)
    across_up[(normals == 0).all(axis=1)] = [(0.8, 0.2, 0.6), (-0.3, -0.9, 0.3)]
    return across_up
