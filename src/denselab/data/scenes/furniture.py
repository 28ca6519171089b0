"""Houses, trees, posts, signs and fences, in the same kind of frame as `road_users`."""

import numpy as np

from denselab.data.scenes.palette import BARK, LEAVES, METALS, ROOFS, WALLS, pick
from denselab.data.scenes.solids import Cut, Look, Material, Rgb, Solid, Street, box, ellipsoid, extrude, placed, rod


def tree(rng: np.random.Generator) -> list[Solid]:
    """A tree in leaf, or bare as in winter."""
    bark = Look(Street.TREE, pick(rng, BARK), grain=0.6, pitch_m=(0.3, 1.0))
    height, thick = rng.uniform(4.5, 12.0), rng.uniform(0.1, 0.24)
    fork = height * rng.uniform(0.25, 0.42)
    bare = rng.random() < 0.35
    solids = [rod((0, 0, 0), (rng.uniform(-0.1, 0.1), -fork - 0.2, 0), thick, bark)]
    crown = Look(
        Street.TREE,
        pick(rng, BARK if bare else LEAVES, 0.3),
        Material.FOLIAGE,
        Cut.BARE if bare else Cut.LEAVES,
        grain=0.9,
        detail=rng.random(),
    )
    wide = rng.uniform(0.28, 0.42) * (height - fork) + 0.4
    for _ in range(6 if bare else 2):
        turn, tilt = rng.uniform(0, 2 * np.pi), rng.uniform(0.3, 0.9) * wide
        tip = (tilt * np.cos(turn), -rng.uniform(0.75, 0.98) * height, tilt * np.sin(turn))
        solids.append(rod((0, -fork + 0.3, 0), tip, thick * rng.uniform(0.2, 0.5), bark))
    for _ in range(3 if bare else rng.integers(4, 7)):
        turn, out = rng.uniform(0, 2 * np.pi), rng.uniform(0.1, 0.75) * wide
        size = rng.uniform(0.55, 0.85) * wide * (1.2 if bare else 1.0)
        centre_y = -rng.uniform(fork + 0.5 * size, max(height - size, fork + size))
        centre = (out * np.cos(turn), centre_y, out * np.sin(turn))
        solids.append(ellipsoid(centre, (size, size * rng.uniform(0.7, 1.0), size), crown))
    return solids


def bush(rng: np.random.Generator) -> list[Solid]:
    """A low shrub."""
    leaf = Look(Street.TREE, pick(rng, LEAVES, 0.3), Material.FOLIAGE, grain=0.9, detail=rng.random())
    size = rng.uniform(0.4, 1.1)
    return [
        ellipsoid((rng.uniform(-0.6, 0.6), -0.6 * size, rng.uniform(-0.6, 0.6)), (size, 0.85 * size, size), leaf)
        for _ in range(rng.integers(1, 4))
    ]


def lamp_post(rng: np.random.Generator) -> list[Solid]:
    """A street lamp whose arm reaches towards +x."""
    look = Look(Street.POLE, pick(rng, METALS), grain=0.1)
    height, arm = rng.uniform(5.0, 9.0), rng.uniform(0.6, 1.8)
    return [
        rod((0, 0, 0), (0, -height, 0), rng.uniform(0.05, 0.09), look),
        rod((0, 0, 0), (0, -1.1, 0), 0.11, look),
        rod((0, -height + 0.05, 0), (arm, -height - 0.2, 0), 0.04, look),
        box((arm - 0.3, -height - 0.28, -0.13), (arm + 0.35, -height - 0.14, 0.13), look),
    ]


def bollard(rng: np.random.Generator) -> list[Solid]:
    """A short post."""
    look = Look(Street.POLE, pick(rng, METALS))
    height = rng.uniform(0.8, 1.1)
    return [rod((0, 0, 0), (0, -height, 0), 0.07, look), ellipsoid((0, -height, 0), (0.08, 0.08, 0.08), look)]


def sign_post(rng: np.random.Generator) -> list[Solid]:
    """The post of a sign or of a traffic light; `sign` is what hangs on it."""
    return [rod((0, 0, 0), (0, -rng.uniform(2.9, 3.3), 0), 0.04, Look(Street.POLE, pick(rng, METALS)))]


def sign(rng: np.random.Generator) -> list[Solid]:
    """A road sign or a traffic light on a post of `sign_post`, seen from -z (it faces those who drive along +z)."""
    back: Rgb = (0.3, 0.3, 0.3)
    kind = rng.integers(5)
    if kind == 0:
        return _traffic_light(rng)
    y = -rng.uniform(2.3, 2.7)
    if kind == 1:
        colour: Rgb = ((0.02, 0.1, 0.4), (0.02, 0.2, 0.08), (0.75, 0.75, 0.72), (0.7, 0.55, 0.03))[rng.integers(4)]
        half_w, half_h = rng.uniform(0.3, 0.6), rng.uniform(0.2, 0.45)
        board = Look(Street.SIGN, [back, back, colour, back, back, back], grain=0.1)
        ink = Look(Street.SIGN, (0.8, 0.8, 0.8) if sum(colour) < 1 else (0.03, 0.03, 0.03), grain=0.1)
        rows = [
            box(
                (-0.7 * half_w, y + at * half_h - 0.03, -0.077),
                (rng.uniform(0, 0.8) * half_w, y + at * half_h + 0.03, -0.06),
                ink,
            )
            for at in (-0.5, 0.0, 0.5)
        ]
        return [box((-half_w, y - half_h, -0.07), (half_w, y + half_h, -0.045), board), *rows]
    radius = rng.uniform(0.28, 0.4)
    red: Rgb = (0.5, 0.02, 0.03)
    outer: Rgb = red if kind < 4 else (0.02, 0.1, 0.4)
    inner: Rgb = ((0.8, 0.8, 0.78), (0.8, 0.8, 0.78), outer)[kind - 2]
    solids = [rod((0, y, -0.07), (0, y, -0.045), radius, Look(Street.SIGN, [outer, back, back], grain=0.05))]
    solids.append(rod((0, y, -0.078), (0, y, -0.06), 0.76 * radius, Look(Street.SIGN, inner, grain=0.05)))
    ink = Look(Street.SIGN, (0.02, 0.02, 0.02) if kind < 4 else (0.8, 0.8, 0.8), grain=0.0)
    solids.append(box((-0.1 * radius, y - 0.45 * radius, -0.085), (0.1 * radius, y + 0.45 * radius, -0.07), ink))
    return solids


def _traffic_light(rng: np.random.Generator) -> list[Solid]:
    case = Look(Street.SIGN, (0.015, 0.015, 0.015), grain=0.1)
    y = -rng.uniform(2.6, 2.9)
    solids = [box((-0.17, y - 0.5, -0.3), (0.17, y + 0.5, -0.045), case)]
    lit = rng.integers(3)
    for row, (red, green, blue) in enumerate(((0.9, 0.05, 0.03), (0.9, 0.45, 0.03), (0.05, 0.8, 0.35))):
        shown, material = (1.0, Material.LAMP) if row == lit else (0.07, Material.PLAIN)
        look = Look(Street.SIGN, (shown * red, shown * green, shown * blue), material, grain=0.0)
        at = y - 0.31 + 0.31 * row
        solids.append(rod((0, at, -0.315), (0, at, -0.29), 0.11, look))
    return solids


def building(rng: np.random.Generator, front_m: float, deep_m: float, storeys: int, tall_m: float) -> list[Solid]:
    """A house over x in [0, front_m], z in [0, deep_m]; all four sides have windows."""
    cells = max(1, round(front_m / rng.uniform(1.9, 3.2)))
    height = storeys * tall_m
    pitch_m = (front_m / cells, tall_m)
    wall = Look(Street.BUILDING, pick(rng, WALLS), Material.FACADE, pitch_m=pitch_m, grain=0.25, detail=rng.random())
    roof = Look(Street.BUILDING, pick(rng, ROOFS, 0.3), Material.ROOF, pitch_m=(0.3, 0.3), grain=0.35)
    solids = [box((0, -height, 0), (front_m, 0, deep_m), wall)]
    if rng.random() < 0.6:
        rise = rng.uniform(0.3, 0.75) * min(front_m, deep_m) / 2 + 0.5
        profile = [(-0.3, -height + 0.05), (deep_m / 2, -height - rise), (deep_m + 0.3, -height + 0.05)]
        if rng.random() < 0.35:
            across = [(-front_m / 2 - 0.2, profile[0][1]), (0.0, -height - rise), (front_m / 2 + 0.2, profile[0][1])]
            solids += placed([extrude(across, deep_m / 2, roof)], front_m / 2, deep_m / 2, np.pi / 2)
        else:
            solids += placed([extrude(profile, front_m / 2, roof)], front_m / 2, 0.0)
        for _ in range(rng.integers(0, 3)):
            x, z = rng.uniform(0.1, 0.85) * front_m, deep_m * rng.uniform(0.3, 0.6)
            stack_look = Look(Street.BUILDING, wall.colours, grain=0.3)
            solids.append(box((x, -height - rise - rng.uniform(0.4, 1.2), z), (x + 0.7, -height, z + 0.9), stack_look))
    else:
        edge = Look(Street.BUILDING, pick(rng, WALLS), grain=0.15)
        rim = rng.uniform(0.05, 0.3)
        solids.append(box((-rim, -height - 0.4, -rim), (front_m + rim, -height, deep_m + rim), edge))
    return solids


def fence(rng: np.random.Generator, length_m: float, kind: int) -> list[Solid]:
    """A fence along z in [0, length_m]: 0 planks, 1 railings, 2 railings with posts and a low kerb."""
    if kind == 0:
        height = rng.uniform(1.0, 1.9)
        look = Look(
            Street.FENCE, pick(rng, (*BARK, (0.3, 0.2, 0.1), (0.5, 0.48, 0.42))), Material.PLANKS, pitch_m=(0.14, 1.0)
        )
        return [box((-0.04, -height, 0), (0.04, 0, length_m), look)]
    height = rng.uniform(0.95, 1.5)
    colour = pick(rng, METALS[:4])
    bars = Look(Street.FENCE, colour, cut=Cut.RAILINGS, pitch_m=(rng.uniform(0.12, 0.18), height), grain=0.0)
    post = Look(Street.FENCE, colour, grain=0.1)
    solids = [box((-0.02, -height, 0), (0.02, 0, length_m), bars)]
    if kind == 2:
        posts = int(length_m / 3.5) + 2
        for z in np.linspace(0, length_m, posts):
            solids.append(box((-0.05, -height - 0.1, z - 0.05), (0.05, 0, z + 0.05), post))
        solids.append(box((-0.1, -0.25, 0), (0.1, 0, length_m), Look(Street.FENCE, pick(rng, WALLS))))
    return solids


def hedge(rng: np.random.Generator, length_m: float) -> list[Solid]:
    """A clipped hedge along z in [0, length_m]."""
    leaf = Look(Street.TREE, pick(rng, LEAVES, 0.3), Material.FOLIAGE, grain=0.9, detail=rng.random())
    return [box((-0.4, -rng.uniform(0.8, 2.0), 0), (0.4, 0, length_m), leaf)]
