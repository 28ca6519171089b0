"""From what was hit to colours: paint, light, shadow, haze, sky, and the camera's own faults.

Works on planar arrays over the pixels that were hit (M of them), one pass per effect.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from denselab.data.scenes.noise import sample
from denselab.data.scenes.paint import PAINTERS, Part
from denselab.data.scenes.solids import Batch, Floats, Map
from denselab.data.scenes.trace import Hits, trace
from denselab.data.scenes.views import Camera, Maps, Sun
from denselab.data.scenes.weather import Weather
from denselab.data.scenes.world import Road

SHADOW_PX = 448
SHADOW_REACH_M = 34.0


@dataclass(frozen=True)
class Surface:
    """What M pixels see. u, v: texture cells; position: world metres; normal: unit, camera axes."""

    face: NDArray[np.int32]
    solid: NDArray[np.int64]
    depth_m: Map
    position: Maps
    normal: Maps
    u: Map
    v: Map


def surface(batch: Batch, camera: Camera, hits: Hits) -> tuple[NDArray[np.int64], Surface]:
    """The pixels that were hit (flat indices [M]), and what they see."""
    pixels = np.flatnonzero(hits.face >= 0)
    row, column = np.divmod(pixels, camera.size_hw[1])
    face = hits.face.ravel()[pixels]
    solid = batch.solid_of_face[face]
    key = hits.key.ravel()[pixels]
    position = camera.points(column, row, key)
    normals = (batch.normals @ camera.rotation).astype(np.float32)
    normal = normals[:, 0][face], normals[:, 1][face], normals[:, 2][face]
    round_ = np.flatnonzero(batch.has_quadric[solid] & (face == batch.first_face[solid + 1] - 1))
    if len(round_):
        of = solid[round_]
        offset = np.stack([axis[round_] for axis in position], axis=1) - batch.centres.astype(np.float32)[of]
        outward = np.einsum("mij,mj->mi", batch.quadrics.astype(np.float32)[of], offset) @ camera.rotation
        outward /= np.linalg.norm(outward, axis=1, keepdims=True)
        for axis, values in zip(normal, outward.T, strict=True):
            axis[round_] = values
    return pixels, Surface(face, solid, 1 / key, position, normal, *_texture_cells(batch, position, face))


def _texture_cells(batch: Batch, position: Maps, face: NDArray[np.int32]) -> tuple[Map, Map]:
    tangents = batch.tangents.astype(np.float32)
    starts = np.einsum("fki,fi->fk", batch.tangents, batch.centres[batch.solid_of_face]).astype(np.float32)
    cells: list[Map] = []
    for k in range(2):
        x, y, z = (axis * tangents[:, k, i][face] for i, axis in enumerate(position))
        cells.append(x + y + z - starts[:, k][face])
    return cells[0], cells[1]


def shade(
    batch: Batch,
    camera: Camera,
    pixels: NDArray[np.int64],
    seen: Surface,
    weather: Weather,
    road: Road,
    rng: np.random.Generator,
) -> NDArray[np.uint8]:
    """The picture, uint8 [H, W, 3]."""
    colour, glow = _paint(batch, seen, camera, weather, road)
    lit = _light(batch, camera, seen, weather)
    haze = np.exp(seen.depth_m * np.float32(-1 / weather.haze_m))
    height, width = camera.size_hw
    image = _sky(camera, weather, pixels)
    for channel in range(3):
        direct = lit[0] * np.float32(weather.sunlight[channel]) + lit[1] * np.float32(weather.skylight[channel])
        value = colour[channel] * np.maximum(direct, glow)
        air = np.float32(0.85 * weather.horizon[channel])
        image[channel].ravel()[pixels] = air + (value - air) * haze
    return _develop(image.reshape(3, height, width), weather, rng)


def _paint(batch: Batch, seen: Surface, camera: Camera, weather: Weather, road: Road) -> tuple[list[Map], Map]:
    """Reflectance in three channels, and the light that the surface gives by itself."""
    grain = np.array([solid.grain for solid in batch.solids], np.float32)[seen.solid]
    # Noise fades where a texel is smaller than a pixel.
    footprint = seen.depth_m * np.float32(1 / camera.intrinsics[0, 0])
    u, v = seen.u, seen.v
    fine = (sample(u * 90, v * 90) - 0.5) * np.minimum(1, 0.02 / footprint)
    coarse = sample(u * 9, v * 9) - 0.5
    rough = 1 + grain * (fine + 0.8 * coarse)
    colours = batch.colours.astype(np.float32)
    colour: list[Map] = [colours[:, channel][seen.face] * rough for channel in range(3)]
    glow: Map = np.zeros_like(rough)
    material = np.array([solid.material for solid in batch.solids], np.uint8)[seen.solid]
    detail = np.array([solid.detail for solid in batch.solids], np.float32)[seen.solid]
    normal_up = np.abs(sum(axis * np.float32(up) for axis, up in zip(seen.normal, camera.rotation[1], strict=True)))
    for kind, painter in PAINTERS.items():
        where = np.flatnonzero(material == kind)
        if len(where):
            part = Part(u[where], v[where], footprint[where], detail[where], normal_up[where], weather, road)
            painted, glowing = painter(part, [plane[where] for plane in colour])
            for plane, values in zip(colour, painted, strict=True):
                plane[where] = values
            if glowing is not None:
                glow[where] = glowing
    return colour, glow


def _light(batch: Batch, camera: Camera, seen: Surface, weather: Weather) -> tuple[Map, Map]:
    """Shares of sunlight and of skylight that reach the surface."""
    to_sun, up = weather.to_sun @ camera.rotation, -camera.rotation[1]
    facing = _dot(seen.normal, to_sun)
    sun = np.maximum(facing, 0) * _sunlit(batch, camera, seen, facing, weather)
    # Close to the ground less sky is seen.
    sky = (0.62 + 0.38 * _dot(seen.normal, up)) * (0.75 + 0.25 * np.minimum(1, seen.position[1] * np.float32(-0.8)))
    sky[seen.position[1] > -0.2] *= np.float32(1.25)
    return sun, sky


def _dot(vector: Maps, other: Floats) -> Map:
    x, y, z = (axis * np.float32(weight) for axis, weight in zip(vector, other, strict=True))
    return x + y + z


def _sunlit(batch: Batch, camera: Camera, seen: Surface, facing: Map, weather: Weather) -> Map:
    """1 where the sun is seen, 0 in shadow; lit beyond the reach of the shadow map."""
    if weather.sunlight.max() < 0.1:
        return np.ones_like(seen.depth_m)
    forward = camera.rotation[:, 2]
    middle = camera.position_m * [1, 0, 1] + 0.85 * SHADOW_REACH_M * np.array([forward[0], 0, forward[2]])
    sun = Sun(weather.to_sun, middle, SHADOW_REACH_M, SHADOW_PX)
    nearest = trace(batch, sun, -1000.0, least_px=9).key.ravel()
    x, y, z = (axis - np.float32(start) for axis, start in zip(seen.position, middle, strict=True))
    # Looked up a little in front of the surface, or it would shade itself.
    lift = 0.2
    u, v = (
        _dot((x, y, z), axis) + lift * _dot(seen.normal, axis @ camera.rotation) + np.float32((SHADOW_PX - 1) / 2)
        for axis in sun.axes
    )
    key = _dot((x, y, z), weather.to_sun) + np.float32(0.12) + np.float32(lift) * facing
    inside = (u >= 0) & (v >= 0) & (u < SHADOW_PX - 1) & (v < SHADOW_PX - 1)
    u, v = np.where(inside, u, 0), np.where(inside, v, 0)
    column, row = u.astype(np.int32), v.astype(np.int32)
    u, v = u - np.floor(u), v - np.floor(v)
    at = row * SHADOW_PX + column
    above = (nearest[at] <= key) * (1 - u) + (nearest[at + 1] <= key) * u
    at += SHADOW_PX
    below = (nearest[at] <= key) * (1 - u) + (nearest[at + 1] <= key) * u
    lit = above + (below - above) * v
    lit[~inside] = 1
    return lit


def _sky(camera: Camera, weather: Weather, covered: NDArray[np.int64]) -> Map:
    """Sky in all pixels that nothing covers, float32 [3, H * W]."""
    height, width = camera.size_hw
    image = np.zeros((3, height * width), np.float32)
    free = np.ones(height * width, bool)
    free[covered] = False
    pixels = np.flatnonzero(free)
    row, column = np.divmod(pixels, width)
    x, y, z = ((ray[0] * column + (ray[1] * row + ray[2])).astype(np.float32) for ray in camera.ray_matrix)
    length = np.sqrt(x * x + y * y + z * z)
    elevation = np.maximum(-y / length, 0.02)
    blue = np.sqrt(np.minimum(elevation * 1.6, 1))
    spread = 150 / (elevation * length)
    drift = np.float32(weather.haze_m * 7)
    billow = 0.7 * sample(x * spread * 0.35 + drift, z * spread * 0.35) + 0.3 * sample(
        x * spread * 1.6, z * spread * 1.6
    )
    cover = np.clip((billow - (1 - np.float32(weather.clouds))) * 3, 0, 1) * np.minimum(1, elevation * 8)
    toward = np.maximum(_dot((x, y, z), weather.to_sun) / length, 0)
    halo = toward**12 * np.float32(0.25 * (1 - 0.6 * weather.clouds))
    lightness = 0.85 + 0.3 * billow
    for channel in range(3):
        horizon, zenith = np.float32(weather.horizon[channel]), np.float32(weather.zenith[channel])
        clear = horizon + (zenith - horizon) * blue
        cloud = np.float32(0.3 * weather.zenith[channel] + 0.7 * weather.horizon.mean()) * lightness
        sun = halo * np.float32(weather.sunlight[channel])
        image[channel, pixels] = clear + (cloud - clear) * cover + sun
    return image


def _develop(image: Map, weather: Weather, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Lens blur, vignette, exposure, tone curve, noise; float32 [3, H, W] to uint8 [H, W, 3]."""
    _, height, width = image.shape
    x, y = np.linspace(-1, 1, width, dtype=np.float32), np.linspace(-1, 1, height, dtype=np.float32)
    exposure = weather.exposure * 0.5 / max(float(image.mean()), 0.05) ** 0.8
    gain = np.float32(exposure / 25) * (1 - np.float32(0.12) * (x * x + y[:, None] ** 2))
    noise = rng.standard_normal((height, width), np.float32) * np.float32(rng.uniform(0.6, 2.5)) + np.float32(0.5)
    picture = np.empty((height, width, 3), np.uint8)
    for channel, plane in enumerate(image):
        value = _blur_rows(_blur_rows(plane).T).T * gain
        # Reinhard's curve with white at 2.5, then a square root for the display, then contrast.
        value = np.sqrt(value * (1 + value * np.float32(0.16)) / (1 + value))
        value += np.float32(0.7) * value * (1 - value) * (2 * value - 1)
        value *= 255
        value += noise
        picture[..., channel] = np.clip(value, 0, 255, out=value)
    return picture


def _blur_rows(plane: Map) -> Map:
    """Weights 1, 3, 1 over neighbouring rows (sum 5)."""
    blurred = 3 * plane
    blurred[1:] += plane[:-1]
    blurred[:-1] += plane[1:]
    blurred[0] += plane[0]
    blurred[-1] += plane[-1]
    return blurred
