"""Light and air: where the sun stands, the colours of sun and sky, clouds, haze."""

from dataclasses import dataclass

import numpy as np

from denselab.data.scenes.solids import Floats


@dataclass(frozen=True)
class Weather:
    """Colours are linear RGB [3].

    to_sun: [3] unit, from the ground to the sun. sunlight, skylight: light on a surface that faces them.
    zenith, horizon: the sky's colours. clouds: 0..1 of the sky. haze_m: distance at which haze takes 63 %.
    lamps: 0..1, how many windows are lit. exposure: 1 is right, more is brighter.
    """

    to_sun: Floats
    sunlight: Floats
    skylight: Floats
    zenith: Floats
    horizon: Floats
    clouds: float
    haze_m: float
    lamps: float
    exposure: float


def random_weather(rng: np.random.Generator) -> Weather:
    """Sunny, overcast, misty, a low golden sun, or dusk."""
    kind = rng.choice(5, p=(0.4, 0.28, 0.06, 0.16, 0.1))
    high = np.deg2rad((rng.uniform(30, 65), rng.uniform(40, 75), rng.uniform(40, 75), rng.uniform(13, 26), 50.0)[kind])
    # Mostly along the street: from the side, houses put all of it in shadow.
    round_about = rng.choice((0, np.pi)) + rng.normal(0, 0.7)
    to_sun = np.array([np.cos(high) * np.sin(round_about), -np.sin(high), np.cos(high) * np.cos(round_about)])
    sunlight, skylight, zenith, horizon, haze_m, lamps = (
        ((2.6, 2.4, 2.1), (0.75, 0.85, 1.0), (0.2, 0.4, 0.85), (0.75, 0.85, 1.0), 500.0, 0.0),
        ((0.35, 0.35, 0.35), (1.25, 1.28, 1.3), (0.75, 0.79, 0.85), (1.1, 1.1, 1.1), 260.0, 0.05),
        ((0.2, 0.2, 0.2), (1.1, 1.12, 1.15), (0.8, 0.82, 0.85), (0.85, 0.87, 0.9), 60.0, 0.15),
        ((2.6, 1.7, 0.9), (0.55, 0.6, 0.75), (0.3, 0.45, 0.75), (1.1, 0.85, 0.6), 300.0, 0.05),
        ((0.02, 0.02, 0.03), (0.3, 0.34, 0.45), (0.1, 0.15, 0.32), (0.65, 0.42, 0.35), 300.0, 0.5),
    )[kind]
    clouds = (rng.uniform(0, 0.7), 0.95, 1.0, rng.uniform(0.1, 0.7), rng.uniform(0.1, 0.8))[kind]
    exposure = (1.0, 1.0, 1.0, 0.9, 0.55)[kind] * rng.uniform(0.75, 1.35)
    return Weather(
        to_sun,
        np.array(sunlight),
        np.array(skylight),
        np.array(zenith),
        np.array(horizon),
        clouds,
        haze_m * rng.uniform(0.7, 1.5),
        lamps,
        exposure,
    )
