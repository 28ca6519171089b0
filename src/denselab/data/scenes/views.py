"""The two ways to look at solids: a pinhole camera, and the parallel rays of the sun.

Both give every ray a key that grows towards the viewer and that is AFFINE in pixel coordinates on any plane: the
inverse depth 1/z of a camera, the negative distance of the sun. So a plane bounds the key by one affine function,
a quadric by an affine function plus or minus the root of a quadratic one, and no pixel needs a division.
Pixel centres lie on whole numbers; h = (column, row, 1).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from denselab.data.scenes.solids import Floats, Map

NEAR_M = 0.05
_EDGES = np.array([(i, i | 1 << k) for i in range(8) for k in range(3) if not i >> k & 1])
Indices = NDArray[np.integer[Any]]
Maps = tuple[Map, Map, Map]


class View(Protocol):
    """What `trace` needs to know about a viewer."""

    @property
    def size_hw(self) -> tuple[int, int]:
        """Height and width in px."""
        ...

    def plane_bounds(self, planes: Floats) -> tuple[Floats, NDArray[np.bool_]]:
        """Affine key bounds [P, 3] of planes [P, 4], and which bound from above (the viewer is outside of them)."""
        ...

    def quadric_bounds(self, centres: Floats, quadrics: Floats) -> tuple[Floats, Floats]:
        """L [S, 3], Q [S, 3, 3]: inside a quadric keys lie within L.h +- sqrt(h^T Q h); no root, no hit."""
        ...

    def rectangles(self, corners: Floats) -> tuple[NDArray[np.int64], Floats]:
        """For boxes given by corners [S, 8, 3]: x0, y0, x1, y1 in px [S, 4] (x1, y1 exclusive), greatest key [S]."""
        ...

    def points(self, columns: Indices, rows: Indices, key: Map) -> Maps:
        """World x, y, z in metres where the rays through pixels have these keys."""
        ...


@dataclass(frozen=True)
class Camera:
    """A pinhole camera without distortion. position_m: [3] in the world; rotation: [3, 3], camera axes to world."""

    position_m: Floats
    rotation: Floats
    intrinsics: Floats
    size_hw: tuple[int, int]

    @cached_property
    def ray_matrix(self) -> Floats:
        """[3, 3]: h to the world direction whose length along the camera's z axis is 1."""
        return self.rotation @ np.linalg.inv(self.intrinsics)

    def plane_bounds(self, planes: Floats) -> tuple[Floats, NDArray[np.bool_]]:
        """See View: on n.(o + r/k) = d the key is k = n.r / (d - n.o)."""
        distance = planes[:, 3] - planes[:, :3] @ self.position_m
        distance = np.where(np.abs(distance) < 1e-7, 1e-7, distance)
        return planes[:, :3] @ self.ray_matrix / distance[:, None], distance < 0

    def quadric_bounds(self, centres: Floats, quadrics: Floats) -> tuple[Floats, Floats]:
        """See View: (o + r/k)^T A (o + r/k) = 1, o from the centre, is c k^2 + 2 (o^T A r) k + r^T A r = 0."""
        offset = self.position_m - centres
        pulled = np.einsum("sij,sj->si", quadrics, offset)
        c = np.einsum("si,si->s", pulled, offset) - 1
        c = np.where(c > 1e-9, c, np.nan)
        linear = pulled @ self.ray_matrix / c[:, None]
        square = self.ray_matrix.T @ quadrics @ self.ray_matrix / c[:, None, None]
        return -linear, linear[:, :, None] * linear[:, None, :] - square

    def rectangles(self, corners: Floats) -> tuple[NDArray[np.int64], Floats]:
        """See View; boxes are cut at the near plane."""
        local = (corners - self.position_m) @ self.rotation
        start, end = local[:, _EDGES[:, 0]], local[:, _EDGES[:, 1]]
        span = end - start
        depth_span = np.where(np.abs(span[..., 2]) < 1e-12, 1e-12, span[..., 2])
        crossing = ((NEAR_M - start[..., 2]) / depth_span)[..., None]
        start_cut = np.where(start[..., 2:] < NEAR_M, start + crossing * span, start)
        end_cut = np.where(end[..., 2:] < NEAR_M, start + crossing * span, end)
        visible = (start[..., 2] >= NEAR_M) | (end[..., 2] >= NEAR_M)
        points = np.concatenate([start_cut, end_cut], axis=1)
        points[..., 2] = np.maximum(points[..., 2], NEAR_M)
        pixels = (points @ self.intrinsics.T)[..., :2] / points[..., 2:]
        rectangles = _rectangles(pixels, np.concatenate([visible, visible], axis=1), self.size_hw)
        return rectangles, 1 / np.maximum(local[..., 2].min(axis=1), NEAR_M)

    def points(self, columns: Indices, rows: Indices, key: Map) -> Maps:
        """See View."""
        depth_m = 1 / key
        x, y, z = (
            np.float32(position) + (column * columns + (row * rows + constant)).astype(np.float32) * depth_m
            for position, (column, row, constant) in zip(self.position_m, self.ray_matrix, strict=True)
        )
        return x, y, z


@dataclass(frozen=True)
class Sun:
    """Parallel rays on a square of ground, for shadows. towards: [3] unit, from the ground to the sun."""

    towards: Floats
    middle_m: Floats
    reach_m: float
    size_px: int

    @property
    def size_hw(self) -> tuple[int, int]:
        """Height and width in px."""
        return self.size_px, self.size_px

    @cached_property
    def axes(self) -> Floats:
        """[2, 3]: world metres to px, across and along the rays' plane."""
        across = np.cross([0.0, 1.0, 0.0], self.towards)
        norm = np.linalg.norm(across)
        across = across / norm if norm > 1e-6 else np.array([1.0, 0.0, 0.0])
        along = np.cross(self.towards, across)
        # Stretched so that the same stretch of ground is covered however low the sun stands.
        return np.stack([across, along / np.abs(self.towards[1])]) * (self.size_px / (2 * self.reach_m))

    @cached_property
    def _origins(self) -> Floats:
        """[3, 3]: h to a point of the plane through the middle from which the ray starts."""
        spread = (self.axes / np.sum(self.axes**2, axis=1, keepdims=True)).T
        half = (self.size_px - 1) / 2
        return np.column_stack([spread, self.middle_m - spread @ np.array([half, half])])

    def plane_bounds(self, planes: Floats) -> tuple[Floats, NDArray[np.bool_]]:
        """See View: n.(O h + k s) = d gives k = (d - n.O h) / n.s."""
        slope = planes[:, :3] @ self.towards
        slope = np.where(np.abs(slope) < 1e-7, 1e-7, slope)
        reach = -planes[:, :3] @ self._origins
        reach[:, 2] += planes[:, 3]
        return reach / slope[:, None], slope > 0

    def quadric_bounds(self, centres: Floats, quadrics: Floats) -> tuple[Floats, Floats]:
        """See View: (O h + k s)^T A (O h + k s) = 1 with O h from the centre."""
        origins = np.repeat(self._origins[None], len(centres), axis=0)
        origins[:, :, 2] -= centres
        pulled = quadrics @ self.towards
        a = pulled @ self.towards
        a = np.where(a > 1e-9, a, np.nan)
        linear = np.einsum("si,sij->sj", pulled, origins) / a[:, None]
        square = np.swapaxes(origins, 1, 2) @ quadrics @ origins
        square[:, 2, 2] -= 1
        return -linear, linear[:, :, None] * linear[:, None, :] - square / a[:, None, None]

    def rectangles(self, corners: Floats) -> tuple[NDArray[np.int64], Floats]:
        """See View."""
        local = corners - self.middle_m
        pixels = local @ self.axes.T + (self.size_px - 1) / 2
        rectangles = _rectangles(pixels, np.ones(pixels.shape[:2], bool), self.size_hw)
        return rectangles, (local @ self.towards).max(axis=1)

    def points(self, columns: Indices, rows: Indices, key: Map) -> Maps:
        """See View."""
        x, y, z = (
            (column * columns + (row * rows + constant)).astype(np.float32) + np.float32(towards) * key
            for towards, (column, row, constant) in zip(self.towards, self._origins, strict=True)
        )
        return x, y, z


def _rectangles(pixels: Floats, visible: NDArray[np.bool_], size_hw: tuple[int, int]) -> NDArray[np.int64]:
    limit = np.array(size_hw[::-1], float)
    low = np.where(visible[..., None], pixels, np.inf).min(axis=1)
    high = np.where(visible[..., None], pixels, -np.inf).max(axis=1)
    # Whole numbers are pixel centres; the margin covers rounding.
    low, high = np.ceil(np.clip(low - 1e-3, 0, limit)), np.floor(np.clip(high + 1e-3, -1, limit - 1)) + 1
    return np.concatenate([low, high], axis=1).astype(np.int64)
