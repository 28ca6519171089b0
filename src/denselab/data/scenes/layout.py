"""A random street: what stands where, and who moves where."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from denselab.data.scenes import furniture, road_users
from denselab.data.scenes.palette import pick
from denselab.data.scenes.solids import Look, Material, Solid, Street, box, half_space, placed
from denselab.data.scenes.weather import random_weather
from denselab.data.scenes.world import Actor, Body, Drive, Mount, Road, World

KERB_M = 0.12


def build_world(seed: int, mount: Mount | None = None) -> World:
    """The street of a seed. mount: of the camera, None: it is random too."""
    rng = np.random.default_rng([seed, 1])
    length = rng.uniform(80, 170)
    road = _random_road(rng)
    waits = rng.random() < 0.25
    speed = 0.0 if waits else rng.uniform(2, 11)
    drive = Drive(
        x=road.keep * road.lane_m + rng.normal(0, 0.3),
        height_m=rng.uniform(1.15, 2.1),
        yaw_rad=rng.normal(0, 0.09),
        pitch_rad=rng.normal(0.02, 0.035),
        roll_rad=rng.normal(0, 0.012),
        view_rad=np.deg2rad(rng.uniform(48, 72)),
        speed_mps=speed,
        range_m=0.5 * length,
        sway=rng.uniform(0.2, 1.0),
    )
    if mount:
        drive = replace(drive, **vars(mount))
    street = _Builder(rng, road, length)
    street.ground()
    for side in (-1, 1):
        street.buildings(side)
        street.furniture(side)
        street.walkers(side)
    street.far_end()
    street.traffic(speed)
    if waits:
        street.crossing_people()
    return World(tuple(street.fixed), tuple(street.actors), road, random_weather(rng), drive)


def _random_road(rng: np.random.Generator) -> Road:
    spans: list[tuple[int, float, float]] = []
    for side in (-1, 1):
        if rng.random() < 0.6:
            start = rng.uniform(8, 60)
            spans.append((side, start, start + rng.uniform(6, 11)))
    return Road(
        half_width_m=rng.uniform(3.2, 6.5),
        pavement_m=rng.uniform(1.6, 4.5),
        keep=int(rng.choice((-1, 1))),
        dash_m=float(rng.choice((0.0, 4.0, 6.0, 9.0))),
        edge=int(rng.integers(3)),
        yellow=bool(rng.random() < 0.5),
        cycle_lane=bool(rng.random() < 0.2),
        zebra_m=rng.uniform(4, 40) if rng.random() < 0.3 else None,
        side_streets=tuple(spans),
    )


@dataclass
class _Builder:
    rng: np.random.Generator
    road: Road
    length_m: float
    fixed: list[Solid] = field(default_factory=list[Solid])
    actors: list[Actor] = field(default_factory=list[Actor])
    last_id: int = 0

    def next_id(self) -> int:
        self.last_id += 1
        return self.last_id

    def put(self, solids: Sequence[Solid], x: float, z: float, yaw_rad: float = 0.0, instance: bool = True) -> None:
        self.fixed += placed(solids, x, z, yaw_rad, self.next_id() if instance else 0)

    def move(self, body: Body, x: float, z: float, yaw_rad: float, speed_mps: float, range_m: float) -> None:
        seed = int(self.rng.integers(2**31))
        self.actors.append(Actor(body, seed, self.next_id(), x, z, yaw_rad, speed_mps, range_m))

    def open_spans(self, side: int, start: float, end: float) -> list[tuple[float, float]]:
        """The parts of z in [start, end] that are not a side street."""
        for where, z0, z1 in self.road.side_streets:
            if where == side:
                return [(start, z0), (z1, end)]
        return [(start, end)]

    def blocked(self, side: int, z: float, margin_m: float = 0.5) -> bool:
        return any(where == side and z0 - margin_m < z < z1 + margin_m for where, z0, z1 in self.road.side_streets)

    def ground(self) -> None:
        rng, grey = self.rng, self.rng.uniform(0.06, 0.16)
        asphalt = Look(Street.ROAD, (grey, grey, 1.03 * grey), Material.ROAD, grain=rng.uniform(0.25, 0.5))
        self.fixed.append(half_space((0, -1, 0), 0.0, asphalt))
        slab = pick(rng, ((0.3, 0.28, 0.26), (0.38, 0.34, 0.28), (0.24, 0.24, 0.25)), 0.2)
        size = rng.uniform(0.4, 0.8)
        look = Look(Street.PAVEMENT, slab, Material.PAVING, pitch_m=(size, size * rng.uniform(1, 1.6)), grain=0.35)
        kerb = Look(Street.PAVEMENT, pick(rng, ((0.4, 0.39, 0.37), (0.3, 0.3, 0.3))), grain=0.3)
        near = self.road.half_width_m
        for side in (-1, 1):
            for z0, z1 in self.open_spans(side, -20.0, self.length_m):
                for look_of, x0, x1, high in (
                    (look, near + 0.1, 90.0, KERB_M),
                    (kerb, near, near + 0.14, KERB_M + 0.003),
                ):
                    left, right = sorted((side * x0, side * x1))
                    self.fixed.append(box((left, -high, z0), (right, 0, z1), look_of))

    def buildings(self, side: int) -> None:
        """A row of houses: closed, loose with gardens, or none (a park with houses behind)."""
        rng = self.rng
        style = rng.choice(3, p=(0.5, 0.32, 0.18))
        edge = self.road.half_width_m + self.road.pavement_m
        setback = (rng.uniform(0, 0.5), rng.uniform(2.5, 7), rng.uniform(16, 30))[style]
        storeys = int(rng.integers(2, 5))
        for start, end in self.open_spans(side, -14.0, self.length_m):
            z = start
            while z < end - 4:
                front = min(rng.uniform(6, 16), end - z)
                deep, tall = rng.uniform(7, 12), rng.uniform(2.7, 3.5)
                floors = max(1, storeys + int(rng.integers(-1, 2)))
                self.house(side, edge + setback + rng.uniform(0, 0.3), z, (front, deep), floors, tall)
                z += front + (0.0 if style == 0 and rng.random() < 0.85 else rng.uniform(0.5, (4, 9, 20)[style]))
            if style > 0:
                self.border(side, start, end, edge)
                for _ in range(int((end - start) / (11 if style == 1 else 7))):
                    x, at = side * (edge + rng.uniform(1.0, setback)), rng.uniform(start, end)
                    self.put((furniture.tree, furniture.bush)[rng.integers(2)](rng), x, at)
        for _, z0, z1 in (span for span in self.road.side_streets if span[0] == side):
            self.house(side, rng.uniform(45, 60), z0 - 8, (z1 - z0 + 16, 10), storeys + 1, 3.0)

    def house(self, side: int, x: float, z: float, size_m: tuple[float, float], floors: int, tall_m: float) -> None:
        """A house along z from `z`, its front `x` metres to the side."""
        solids = furniture.building(self.rng, *size_m, floors, tall_m)
        z_placed, yaw = (z + size_m[0], np.pi / 2) if side > 0 else (z, -np.pi / 2)
        self.put(solids, side * x, z_placed, yaw, instance=False)

    def border(self, side: int, start: float, end: float, edge: float) -> None:
        """Fences and hedges between pavement and gardens."""
        kind, z = self.rng.integers(4), start
        while z < end - 2:
            length = min(self.rng.uniform(6, 18), end - z)
            solids = furniture.hedge(self.rng, length) if kind == 3 else furniture.fence(self.rng, length, int(kind))
            self.put(solids, side * (edge + 0.1), z, instance=False)
            z += length + (self.rng.uniform(1, 3) if self.rng.random() < 0.5 else 0)
            if self.rng.random() < 0.3:
                kind = self.rng.integers(4)

    def furniture(self, side: int) -> None:
        """Lamps, signs, trees, bollards, guard rails and parked bicycles along the kerb."""
        rng, kerb = self.rng, self.road.half_width_m
        inward = 0.0 if side < 0 else np.pi
        lamp_step = rng.uniform(16, 32)
        for z in np.arange(rng.uniform(-5, lamp_step), self.length_m, lamp_step):
            if not self.blocked(side, z):
                self.put(furniture.lamp_post(rng), side * (kerb + 0.45), z, inward)
        for z in np.cumsum(rng.uniform(5, 30, 6)):
            if z < self.length_m and not self.blocked(side, z):
                x, yaw = side * (kerb + rng.uniform(0.4, 0.7)), 0.0 if rng.random() < 0.8 else np.pi
                yaw += rng.normal(0, 0.12)
                self.put(furniture.sign_post(rng), x, z, yaw)
                self.put(furniture.sign(rng), x, z, yaw)
        if rng.random() < 0.45:
            step = rng.uniform(7, 16)
            for z in np.arange(rng.uniform(2, step), self.length_m, step):
                if not self.blocked(side, z):
                    self.put(furniture.tree(rng), side * (kerb + rng.uniform(0.8, 1.1)), z)
        if rng.random() < 0.3:
            z0 = rng.uniform(3, 30)
            for z in z0 + np.arange(rng.integers(3, 8)) * 1.6:
                if not self.blocked(side, z):
                    self.put(furniture.bollard(rng), side * (kerb + 0.35), z)
        if rng.random() < 0.35:
            z0 = rng.uniform(3, 40)
            length = rng.uniform(6, 16)
            if not any(self.blocked(side, z) for z in np.arange(z0, z0 + length, 2.0)):
                self.put(furniture.fence(rng, length, 1), side * (kerb + 0.25), z0, instance=False)
        if rng.random() < 0.15:
            z0 = rng.uniform(4, 20)
            for z in z0 + np.arange(rng.integers(2, 5)) * 0.7:
                if not self.blocked(side, z):
                    self.put(road_users.bicycle(rng), side * (kerb + 1.4), z, np.pi / 2 + rng.normal(0, 0.1))

    def walkers(self, side: int) -> None:
        """People on the pavement, some of them in a group."""
        rng, road = self.rng, self.road
        together = 3 + rng.gamma(1.6, 10)
        places = [*rng.normal(together, 2.5, rng.poisson(3)), *rng.uniform(2.5, 50, rng.poisson(3))]
        for z in places:
            self.walker(side * (road.half_width_m + rng.uniform(0.4, max(0.6, road.pavement_m - 0.4))), z)

    def walker(self, x: float, z: float) -> None:
        rng = self.rng
        yaw = rng.choice((0.0, np.pi)) + rng.normal(0, 0.03)
        stands = rng.random() < 0.25
        if stands:
            self.put(road_users.pedestrian(rng), x, z, rng.uniform(0, 2 * np.pi))
        else:
            self.move(_walk, x, z, yaw, rng.uniform(0.9, 1.7), 60.0)

    def crossing_people(self) -> None:
        """People who walk over the road; only before a camera that stands still."""
        rng, half = self.rng, self.road.half_width_m
        ahead = (self.road.zebra_m or rng.uniform(6, 16)) + 1.5
        for _ in range(rng.integers(1, 5)):
            yaw = rng.choice((-np.pi / 2, np.pi / 2))
            self.move(
                _walk, rng.uniform(-half, half), ahead + rng.uniform(-1.3, 1.3), yaw, rng.uniform(1, 1.6), 2.5 * half
            )

    def far_end(self) -> None:
        """What closes the view: houses across, or trees."""
        rng = self.rng
        x = -75.0
        while x < 75:
            front = rng.uniform(9, 18)
            solids = furniture.building(rng, front, 9.0, int(rng.integers(2, 6)), 3.0)
            self.put(solids, x, self.length_m + rng.uniform(8, 12), instance=False)
            if rng.random() < 0.5:
                self.put(furniture.tree(rng), x + rng.uniform(0, front), self.length_m + 5)
            x += front

    def traffic(self, speed_mps: float) -> None:
        """Parked cars, cars that drive in both directions, and bicyclists."""
        rng, half, keep = self.rng, self.road.half_width_m, self.road.keep
        for side in (-1, 1):
            if self.road.has_parking and rng.random() < 0.65:
                z = rng.uniform(3, 20) if side != keep else rng.uniform(6, 25)
                while z < self.length_m - 4:
                    yaw = 0.0 if side == keep else np.pi
                    if not self.blocked(side, z, 4):
                        self.put(road_users.car(rng, bus=False), side * (half - 1.05), z, yaw + rng.normal(0, 0.02))
                    z += rng.uniform(6.2, 9) if rng.random() < 0.75 else rng.uniform(12, 35)
        lane = self.road.lane_m
        z = rng.uniform(7, 30)
        while z < 0.8 * self.length_m:
            self.move(_drive, keep * lane, z, rng.normal(0, 0.01), 1.05 * speed_mps, 0.6 * self.length_m)
            z += rng.uniform(9, 50)
        z = rng.uniform(4, 40)
        while z < self.length_m:
            oncoming = rng.uniform(3, 12)
            self.move(_drive, -keep * lane, z, np.pi + rng.normal(0, 0.01), oncoming, 400.0)
            z += rng.uniform(10, 50)
        for _ in range(rng.poisson(1.3)):
            along = rng.random() < 0.7
            side = keep if along else -keep
            edge = 2.3 if self.road.has_parking else 0.7
            x = side * (half - edge + rng.uniform(-0.3, 0.3))
            yaw = (0.0 if along else np.pi) + rng.normal(0, 0.03)
            self.move(_ride, x, rng.uniform(5, 30), yaw, max(speed_mps * 1.02, rng.uniform(3, 6)), 0.6 * self.length_m)


def _walk(rng: np.random.Generator, went_m: float) -> list[Solid]:
    return road_users.pedestrian(rng, rng.uniform(0, 2 * np.pi) + went_m * 4.4)


def _ride(rng: np.random.Generator, went_m: float) -> list[Solid]:
    return road_users.bicyclist(rng, rng.uniform(0, 2 * np.pi) + went_m * 1.2)


def _drive(rng: np.random.Generator, went_m: float) -> list[Solid]:
    del went_m
    return road_users.car(rng)
