"""The patterns of materials: windows, lane marks, slabs, planks, leaves, ...; each a function of texture cells."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from denselab.data.scenes.noise import cell_hash, sample
from denselab.data.scenes.solids import Map, Material
from denselab.data.scenes.weather import Weather
from denselab.data.scenes.world import Road


@dataclass(frozen=True)
class Part:
    """M pixels of one material. u, v: texture cells; footprint_m: metres a pixel spans; level: 1 on level surfaces."""

    u: Map
    v: Map
    footprint_m: Map
    detail: Map
    level: Map
    weather: Weather
    road: Road


Painted = tuple[list[Map], Map | None]


def _mix(colour: list[Map], other: Sequence[Map | float], share: Map) -> list[Map]:
    return [old + (np.float32(1) * new - old) * share for old, new in zip(colour, other, strict=True)]


def _line(distance: Map, half_width: float, footprint: Map) -> Map:
    """How much of a pixel a line covers, 0..1."""
    return np.clip(
        (np.float32(half_width) - np.abs(distance)) / footprint + 0.5, 0, np.minimum(1, 2 * half_width / footprint)
    )


def _road(part: Part, colour: list[Map]) -> Painted:
    x, z, road, thin = part.u, part.v, part.road, part.footprint_m
    patches = 0.75 + 0.5 * sample(x * 6, z * 2.2)
    colour = [plane * patches for plane in colour]
    worn = 0.55 + 0.45 * sample(x * 40, z * 40)
    half = road.half_width_m
    if road.cycle_lane:
        lane = ((x * road.keep > half - 1.5) & (x * road.keep < half)).astype(np.float32)
        colour = _mix(colour, [colour[0] * 2.1, colour[1] * 0.9, colour[2] * 0.8], lane)
    white = np.zeros_like(x)
    if road.dash_m:
        white = _line(x, 0.06, thin) * (np.mod(z, road.dash_m) < 0.45 * road.dash_m)
    if road.cycle_lane:
        white = np.maximum(white, _line(x - road.keep * (half - 1.55), 0.05, thin))
    if road.zebra_m is not None:
        bars = (np.mod(x, 1.0) < 0.5) & (z > road.zebra_m) & (z < road.zebra_m + 3) & (np.abs(x) < half)
        stop = _line(z - (road.zebra_m - 1.2), 0.12, thin * 4) * ((x * road.keep > 0) & (np.abs(x) < half))
        white = np.maximum(np.where((z > road.zebra_m - 1) & (z < road.zebra_m + 4), 0, white), np.maximum(bars, stop))
    colour = _mix(colour, (0.62, 0.62, 0.6), white * worn)
    edges = np.zeros_like(x)
    for number in range(road.edge):
        edges = np.maximum(edges, _line(np.abs(x) - (half - 0.3 - 0.2 * number), 0.045, thin))
    tint = (0.55, 0.4, 0.06) if road.yellow else (0.55, 0.55, 0.53)
    gutter = np.clip(1 - np.abs(np.abs(x) - half) / 0.25, 0, 1) * 0.35
    colour = [plane * (1 - gutter) for plane in colour]
    return _mix(colour, tint, edges * worn), None


def _paving(part: Part, colour: list[Map]) -> Painted:
    tone = 0.88 + 0.24 * cell_hash(part.u, part.v, part.detail)
    joint = np.minimum(np.mod(part.u, 1), np.mod(part.v, 1)) < 0.035
    tone = np.where(joint & (part.footprint_m < 0.03), 0.7, tone).astype(np.float32)
    return [plane * tone for plane in colour], None


def _facade(part: Part, colour: list[Map]) -> Painted:
    u, v, detail = part.u, part.v, part.detail
    across, up = u - np.floor(u), v - np.floor(v)
    chance = cell_hash(u, v, detail)
    ground = v < 1
    style = np.mod(detail * 7, 1)
    shop = ground & (np.mod(detail * 13, 1) < 0.4)
    half = np.where(shop, 0.45, 0.16 + 0.18 * style)
    low, high = np.where(shop, 0.14, 0.26 + 0.08 * style), np.where(shop, 0.7, 0.72 + 0.12 * style)
    # Distance to the window's edge in cells: below 0 inside.
    outside = np.maximum(np.abs(across - 0.5) - half, np.maximum(low - up, up - high))
    wall = part.level < 0.5
    door = ground & ~shop & (chance < 0.3) & (np.abs(across - 0.5) < 0.19) & (up < 0.72) & wall
    window = (outside < 0) & wall & ~door
    frame = (outside >= 0) & (outside < 0.045) & wall & (style > 0.25)
    bar = (outside < -0.02) & (np.abs(across - 0.5) < 0.02) & wall & ~shop & (style > 0.4)
    band = (up < 0.035) & (v > 0.5) & wall
    board = shop & (up > 0.76) & (up < 0.95) & wall
    pale = (0.55, 0.53, 0.5)
    colour = _mix(colour, pale, (frame | bar | band).astype(np.float32) * 0.75)
    glass = [
        np.float32(tone) + np.float32(0.22 * sky) * up * (0.4 + 0.6 * chance)
        for tone, sky in zip((0.025, 0.03, 0.035), part.weather.horizon, strict=True)
    ]
    colour = _mix(colour, glass, (window & ~bar).astype(np.float32))
    hue = np.mod(detail * 29, 1)
    paint = [0.06 + 0.4 * np.clip(np.abs(np.mod(hue * 6 + shift, 6) - 3) - 1, 0, 1) ** 2 for shift in (0.0, 4.0, 2.0)]
    colour = _mix(colour, paint, (board | door).astype(np.float32))
    letters = board & (np.abs(up - 0.855) < 0.045) & (sample(u * 260, np.floor(v) * 7 + detail * 99) > 0.55)
    colour = _mix(colour, (0.7, 0.68, 0.6), letters.astype(np.float32))
    grime = 0.8 + 0.2 * np.minimum(v, 1)
    lit = window & (np.mod(chance * 17, 1) < part.weather.lamps)
    colour = _mix([plane * grime for plane in colour], (0.75, 0.55, 0.28), lit.astype(np.float32))
    return colour, lit.astype(np.float32)


def _planks(part: Part, colour: list[Map]) -> Painted:
    tone = 0.8 + 0.4 * cell_hash(part.u, np.zeros_like(part.v), part.detail)
    tone = np.where((np.mod(part.u, 1) < 0.1) & (part.footprint_m < 0.04), 0.45, tone).astype(np.float32)
    return [plane * tone for plane in colour], None


def _foliage(part: Part, colour: list[Map]) -> Painted:
    clumps = sample(part.u * 26 + part.detail * 200, part.v * 26)
    tone = 0.45 + 0.8 * clumps + 0.5 * (sample(part.u * 120, part.v * 120) - 0.5)
    warm = 0.8 + 0.4 * clumps
    return [colour[0] * tone * warm, colour[1] * tone, colour[2] * tone * (1.3 - 0.6 * clumps)], None


def _glass(part: Part, colour: list[Map]) -> Painted:
    bright = colour[0] < 0.06
    sheen = np.clip(0.15 + 0.5 * part.v + 0.25 * (sample(part.u * 14, part.v * 14) - 0.5), 0, 0.5) * bright
    return [
        plane + sheen * np.float32(0.5 * sky) for plane, sky in zip(colour, part.weather.horizon, strict=True)
    ], None


def _lamp(part: Part, colour: list[Map]) -> Painted:
    return colour, np.full_like(part.u, 0.9)


def _wheel(part: Part, colour: list[Map]) -> Painted:
    radius = np.hypot(part.u, part.v)
    spoke = np.mod(np.arctan2(part.v, part.u) * (5 / (2 * np.pi)), 1) < 0.6
    hub = (radius < 0.62) & (spoke | (radius < 0.2)) & (part.level < 0.5)
    return _mix(colour, (0.3, 0.3, 0.31), hub.astype(np.float32)), None


def _roof(part: Part, colour: list[Map]) -> Painted:
    tone = 0.8 + 0.35 * cell_hash(part.u, part.v, part.detail) - 0.25 * (np.mod(part.v, 1) < 0.2)
    tone = 1 + (tone - 1) * np.minimum(1, 0.08 / part.footprint_m)
    return [plane * tone for plane in colour], None


PAINTERS = {
    Material.ROAD: _road,
    Material.PAVING: _paving,
    Material.FACADE: _facade,
    Material.PLANKS: _planks,
    Material.FOLIAGE: _foliage,
    Material.GLASS: _glass,
    Material.LAMP: _lamp,
    Material.WHEEL: _wheel,
    Material.ROOF: _roof,
}
