"""Cars, people and bicycles, each a few convex solids in its own frame: on y = 0, facing +z, middle at x = 0."""

import numpy as np

from denselab.data.scenes.palette import BARK, CLOTHES, GLASS, PAINTS, RUBBER, SKINS, pick
from denselab.data.scenes.solids import Cut, Look, Material, Solid, Street, box, ellipsoid, extrude, limb, rod


def car(rng: np.random.Generator, bus: bool = True) -> list[Solid]:
    """A car, an estate, a van or, if allowed, a bus."""
    kind = rng.choice(4, p=(0.5, 0.27, 0.17, 0.06) if bus else (0.55, 0.3, 0.15, 0.0))
    paint = (0.4, 0.03, 0.03) if kind == 3 and rng.random() < 0.6 else pick(rng, PAINTS)
    body = Look(Street.CAR, paint, grain=0.04)
    glass = Look(Street.CAR, GLASS, Material.GLASS)
    length, width, height = (
        (rng.uniform(3.7, 4.6), rng.uniform(1.62, 1.8), rng.uniform(1.38, 1.5)),
        (rng.uniform(4.2, 4.8), rng.uniform(1.7, 1.9), rng.uniform(1.5, 1.75)),
        (rng.uniform(4.8, 6.0), rng.uniform(1.85, 2.0), rng.uniform(2.0, 2.5)),
        (rng.uniform(9.0, 11.0), 2.5, rng.uniform(3.0, 4.3)),
    )[kind]
    front, back, half = length / 2, -length / 2, width / 2
    if kind < 2:
        waist = 0.6 * height
        tail = back + (0.06 if kind == 1 else rng.uniform(0.05, 0.5))
        solids = [
            extrude(
                [
                    (front - 0.08, -0.22),
                    (front, -0.45),
                    (front - 0.12, -0.62),
                    (front - 1.0, -waist),
                    (back + 0.1, -waist - 0.04),
                    (back, -0.5),
                    (back + 0.08, -0.25),
                ],
                half,
                body,
                lean=0.03,
            ),
            extrude(
                [
                    (front - 0.95, 0.04 - waist),
                    (front - 1.65, -height),
                    (tail + 0.5, 0.02 - height),
                    (tail, -waist),
                ],
                half - 0.05,
                Look(Street.CAR, [GLASS, paint, GLASS, paint, GLASS, GLASS], Material.GLASS, grain=0.0),
                lean=0.22,
            ),
        ]
        middle = (front - 1.65 + tail + 0.5) / 2
        # Pillars: the roof comes down as a narrow hoop between the side windows.
        solids.append(
            extrude(
                [(middle - 0.06, -waist), (middle - 0.06, -height), (middle + 0.06, -height), (middle + 0.06, -waist)],
                half - 0.035,
                body,
                lean=0.22,
            )
        )
        lamp_y = -0.62
    else:
        sill, top = (1.05, height - 0.25) if kind == 2 else (1.2, 2.15)
        nose = 0.75 if kind == 2 else 0.08
        solids = [
            extrude(
                [
                    (front, -0.3),
                    (front, -sill if kind == 3 else -0.85),
                    (front - nose, -height + 0.05),
                    (front - nose - 0.15, -height),
                    (back + 0.05, -height),
                    (back, -0.3),
                ],
                half,
                body,
                lean=0.02,
            ),
            extrude(
                [
                    (front + 0.015 - 0.4 * nose, -sill),
                    (front + 0.015 - 0.93 * nose, -top),
                    (front - 0.6 - nose, -top),
                    (front - 0.6, -sill),
                ],
                half - 0.1,
                glass,
            ),
            box(
                (-half - 0.01, -top, back + 0.3 if kind == 3 else front - 2.0),
                (half + 0.01, -sill, front - 0.85),
                glass,
            ),
        ]
        if kind == 3 and height > 3.8:
            solids.append(box((-half - 0.01, -3.5, back + 0.3), (half + 0.01, -2.7, front + 0.01), glass))
        solids.append(box((-half + 0.2, -top, back - 0.01), (half - 0.2, -sill, back + 0.2), glass))
        lamp_y = -0.75
    radius = 0.31 if kind < 3 else 0.45
    wheel = Look(Street.CAR, RUBBER, Material.WHEEL, pitch_m=(radius, radius), grain=0.0)
    for z in (front - 0.2 * length, back + 0.19 * length):
        for side in (-1, 1):
            solids.append(rod((side * (half - 0.2), -radius, z), (side * (half + 0.015), -radius, z), radius, wheel))
    white = Look(Street.CAR, (0.8, 0.8, 0.75), Material.LAMP, grain=0.0)
    red = Look(Street.CAR, (0.5, 0.02, 0.02), Material.LAMP, grain=0.0)
    for side in (-1, 1):
        low, high = sorted((side * (half - 0.06), side * (half - 0.36)))
        solids.append(box((low, lamp_y - 0.07, front - 0.25), (high, lamp_y + 0.07, front + 0.012), white))
        solids.append(box((low, lamp_y - 0.14, back - 0.012), (high, lamp_y + 0.06, back + 0.25), red))
    plate = Look(Street.CAR, ((0.75, 0.6, 0.08), (0.75, 0.75, 0.75))[rng.integers(2)], grain=0.3)
    solids.append(box((-0.26, -0.52, back - 0.02), (0.26, -0.4, front + 0.02), plate))
    return solids


def pedestrian(rng: np.random.Generator, phase_rad: float = 0.0) -> list[Solid]:
    """A person; the generator must be in the same state for every phase of the same person's step."""
    height = rng.uniform(1.5, 1.9) if rng.random() < 0.85 else rng.uniform(1.0, 1.4)
    skin, hair = pick(rng, SKINS), pick(rng, BARK, 0.5)
    top = Look(Street.PEDESTRIAN, pick(rng, CLOTHES), grain=0.3)
    legs = Look(Street.PEDESTRIAN, pick(rng, CLOTHES[:6]), grain=0.2)
    broad = rng.uniform(0.9, 1.2)
    swing = float(np.sin(phase_rad)) * rng.uniform(0.2, 0.3)
    hip, shoulder = 0.5 * height, 0.82 * height
    solids: list[Solid] = []
    for side in (-1, 1):
        x, step = side * 0.09 * broad, side * swing
        solids += [
            limb((x, -hip - 0.05, 0), (x, -0.05, step), 0.085 * broad, legs),
            ellipsoid((x, -0.05, step + 0.06), (0.05, 0.05, 0.13), Look(Street.PEDESTRIAN, RUBBER)),
            limb((side * 0.2 * broad, -shoulder, 0), (side * 0.24 * broad, -hip + 0.02, -step), 0.055 * broad, top),
        ]
    solids += [
        ellipsoid((0, -(hip + shoulder) / 2 - 0.02, 0), (0.21 * broad, 0.22 * height, 0.13 * broad), top),
        ellipsoid((0, -0.925 * height, 0.01), (0.08, 0.115, 0.095), Look(Street.PEDESTRIAN, skin)),
        ellipsoid((0, -0.945 * height, -0.015), (0.085, 0.105, 0.095), Look(Street.PEDESTRIAN, hair)),
    ]
    if rng.random() < 0.3:
        bag = Look(Street.PEDESTRIAN, pick(rng, CLOTHES), grain=0.3)
        solids.append(ellipsoid((0, -0.68 * height, -0.19), (0.14, 0.2, 0.1), bag))
    return solids


def bicycle(rng: np.random.Generator) -> list[Solid]:
    """A bicycle without its rider."""
    frame = Look(Street.BICYCLIST, pick(rng, PAINTS), grain=0.0)
    rim = Look(Street.BICYCLIST, RUBBER, cut=Cut.RIM, pitch_m=(0.34, 0.34), grain=0.0)
    front, back, seat = 0.52, -0.5, (0.0, -0.92, -0.22)
    steer, pedals = (0.0, -0.98, 0.38), (0.0, -0.3, -0.05)
    solids = [rod((-0.025, -0.34, z), (0.025, -0.34, z), 0.34, rim) for z in (front, back)]
    for start, end in (
        ((0.0, -0.34, back), pedals),
        (pedals, seat),
        (seat, (0.0, -0.34, back)),
        (pedals, (0.0, -0.8, 0.42)),
        ((0.0, -0.8, 0.42), (0.0, -0.8, -0.19)),
        (steer, (0.0, -0.34, front)),
        ((-0.26, -0.99, 0.36), (0.26, -0.99, 0.36)),
    ):
        solids.append(rod(start, end, 0.022, frame))
    return solids


def bicyclist(rng: np.random.Generator, phase_rad: float = 0.0) -> list[Solid]:
    """A bicycle and its rider; see `pedestrian` about the generator."""
    solids = bicycle(rng)
    top = Look(Street.BICYCLIST, pick(rng, CLOTHES), grain=0.3)
    legs = Look(Street.BICYCLIST, pick(rng, CLOTHES[:6]), grain=0.2)
    skin = Look(Street.BICYCLIST, pick(rng, SKINS))
    cap = Look(Street.BICYCLIST, pick(rng, PAINTS), grain=0.1)
    for side in (-1, 1):
        foot_y, foot_z = -0.3 - side * 0.17 * np.sin(phase_rad), -0.05 + side * 0.17 * np.cos(phase_rad)
        knee = (side * 0.11, (foot_y - 0.95) / 2 - 0.12, 0.16 + foot_z / 2)
        solids += [
            limb((side * 0.09, -0.95, -0.2), knee, 0.09, legs),
            limb(knee, (side * 0.11, foot_y, foot_z), 0.065, legs),
            ellipsoid((side * 0.11, foot_y + 0.02, foot_z + 0.05), (0.05, 0.04, 0.13), Look(Street.BICYCLIST, RUBBER)),
            limb((side * 0.19, -1.4, 0.08), (side * 0.24, -1.0, 0.37), 0.055, top),
        ]
    solids += [
        limb((0, -0.9, -0.26), (0, -1.52, 0.12), 0.19, top),
        ellipsoid((0, -1.64, 0.18), (0.08, 0.115, 0.1), skin),
        ellipsoid((0, -1.68, 0.16), (0.095, 0.09, 0.12), cap),
    ]
    return solids
