"""Which solid each ray meets first, and where: exact intersections inside each solid's rectangle, and a z-buffer."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from denselab.data.scenes.noise import sample
from denselab.data.scenes.solids import Batch, Cut, Floats, Map, Solid
from denselab.data.scenes.views import View


@dataclass(frozen=True)
class Hits:
    """What the rays of a view meet. key: float32 [H, W] (see views); face: int32 [H, W] of the batch, -1 = nothing."""

    key: NDArray[np.float32]
    face: NDArray[np.int32]


def trace(batch: Batch, view: View, least_key: float, least_px: int = 1) -> Hits:
    """Meet all solids but those too far (key below `least_key`) or too small (fewer than `least_px` px on screen)."""
    height, width = view.size_hw
    hits = Hits(np.full((height, width), least_key, np.float32), np.full((height, width), -1, np.int32))
    bounds, fronts = view.plane_bounds(batch.planes)
    with np.errstate(invalid="ignore"):
        lines, squares = view.quadric_bounds(batch.centres, batch.quadrics)
        _draw_all(hits, batch, view, (bounds, fronts), (lines, _polynomials(squares)), least_px)
    return hits


def _draw_all(
    hits: Hits,
    batch: Batch,
    view: View,
    plane_bounds: tuple[Floats, NDArray[np.bool_]],
    quadric_bounds: tuple[Floats, Floats],
    least_px: int,
) -> None:
    height, width = view.size_hw
    u, v = np.arange(width, dtype=np.float64), np.arange(height, dtype=np.float64)
    powers_u, powers_v = np.stack([u * u, u, np.ones(width)]), np.stack([v * v, v, np.ones(height)], axis=1)
    rectangles, greatest_keys = view.rectangles(batch.corners)
    area = np.maximum(rectangles[:, 2:] - rectangles[:, :2], 0).prod(axis=1)
    bounds, fronts = plane_bounds[0], plane_bounds[1].tolist()
    lines, polynomials = quadric_bounds
    # Nearest first, so that what is hidden wholly is found out before it is met.
    for index in sorted(np.flatnonzero(area >= least_px).tolist(), key=greatest_keys.__getitem__, reverse=True):
        x0, y0, x1, y1 = rectangles[index].tolist()
        nearest = hits.key[y0:y1, x0:x1]
        if greatest_keys[index] < nearest.min():
            continue
        first, last = batch.first_plane[index], batch.first_plane[index + 1]
        enter, leave, face = _meet_planes(bounds[first:last], fronts[first:last], u[x0:x1], v[y0:y1])
        if batch.has_quadric[index]:
            line, u_part, v_part = lines[index], powers_u[:, x0:x1], powers_v[y0:y1]
            root = np.sqrt((v_part @ polynomials[index] @ u_part).astype(np.float32))
            middle = (line[0] * u_part[1]).astype(np.float32) + (v_part[:, 1:] @ line[1:]).astype(np.float32)[:, None]
            near = middle + root
            if enter is None:
                enter, face = near, np.int32(last - first)
            else:
                # Without a root the ray misses: NaN is never greater.
                leave = np.maximum(leave, middle - root) if leave is not None else middle - root
                face = np.where(near < enter, np.int32(last - first), face)
                enter = np.minimum(enter, near)
        if enter is None:
            continue
        won = enter > nearest
        if leave is not None:
            won &= enter > leave
        solid = batch.solids[index]
        if solid.cut and won.any():
            row, column = np.nonzero(won)
            won[row, column] = _kept(solid, *view.points(column + x0, row + y0, enter[row, column]))
        np.copyto(nearest, enter, where=won)
        np.copyto(hits.face[y0:y1, x0:x1], face + np.int32(batch.first_face[index]), where=won)


_Interval = tuple[Map | None, Map | None, NDArray[np.int32] | np.int32]
"""Where rays enter (None: the viewer is inside of all) and leave (None: never), and through which face they enter."""


def _meet_planes(bounds: Floats, fronts: list[bool], u: Floats, v: Floats) -> _Interval:
    across = (bounds[:, :1] * u).astype(np.float32)
    down = (bounds[:, 1:2] * v + bounds[:, 2:]).astype(np.float32)[:, :, None]
    enter: Map | None = None
    leave: Map | None = None
    face: NDArray[np.int32] | np.int32 = np.int32(0)
    for plane, is_front in enumerate(fronts):
        bound = across[plane] + down[plane]
        if not is_front:
            leave = bound if leave is None else np.maximum(leave, bound, out=leave)
        elif enter is None:
            enter, face = bound, np.int32(plane)
        else:
            face = np.where(bound < enter, np.int32(plane), face)
            np.minimum(enter, bound, out=enter)
    return enter, leave, face


def _polynomials(squares: Floats) -> Floats:
    """[S, 3, 3] of h^T Q h as (v^2, v, 1) P (u^2, u, 1)^T."""
    polynomials = np.zeros_like(squares)
    polynomials[:, 0, 2] = squares[:, 1, 1]
    polynomials[:, 1, 1], polynomials[:, 1, 2] = 2 * squares[:, 0, 1], 2 * squares[:, 1, 2]
    polynomials[:, 2, 0], polynomials[:, 2, 1] = squares[:, 0, 0], 2 * squares[:, 0, 2]
    polynomials[:, 2, 2] = squares[:, 2, 2]
    return polynomials


def _kept(solid: Solid, x: Map, y: Map, z: Map) -> NDArray[np.bool_]:
    """Which points of a surface are there, the others being cut out of it."""
    if solid.cut in (Cut.LEAVES, Cut.BARE):
        a, b = x * 0.8 + z * 0.6 - y * 0.2, y * 0.9 + z * 0.35 - x * 0.3
        leafy = sample(a * 70 + solid.detail * 300, b * 70) + 0.9 * sample(a * 330, b * 330)
        return leafy > (0.8 if solid.cut is Cut.LEAVES else 1.12)
    x, y, z = x - np.float32(solid.centre[0]), y - np.float32(solid.centre[1]), z - np.float32(solid.centre[2])
    if solid.cut is Cut.RAILINGS:
        sides = solid.corners[[1, 4]] - solid.corners[0]
        lengths = np.linalg.norm(sides, axis=1)
        along = sides[lengths.argmax()] / lengths.max()
        height = -y
        bar = np.mod(x * np.float32(along[0]) + z * np.float32(along[2]), np.float32(solid.pitch_m[0]))
        top = np.float32(solid.pitch_m[1])
        return (bar < 0.045) | (height > top - 0.09) | (np.abs(height - 0.2) < 0.035)
    radius = np.sqrt(x * x + y * y + z * z) / np.float32(solid.pitch_m[0])
    return (radius > 0.86) | (radius < 0.12)
