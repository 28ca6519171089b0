"""Colours of things, as linear reflectance."""

from collections.abc import Sequence

import numpy as np

from denselab.data.scenes.solids import Rgb

RUBBER: Rgb = (0.025, 0.025, 0.028)
GLASS: Rgb = (0.05, 0.06, 0.07)
METALS: Sequence[Rgb] = (
    (0.16, 0.17, 0.17),
    (0.06, 0.06, 0.06),
    (0.35, 0.36, 0.36),
    (0.05, 0.12, 0.08),
    (0.3, 0.26, 0.2),
)
SKINS: Sequence[Rgb] = ((0.55, 0.36, 0.27), (0.4, 0.24, 0.16), (0.2, 0.12, 0.08), (0.65, 0.45, 0.36))
CLOTHES: Sequence[Rgb] = (
    (0.03, 0.03, 0.04),
    (0.04, 0.05, 0.11),
    (0.12, 0.12, 0.13),
    (0.35, 0.04, 0.04),
    (0.5, 0.48, 0.44),
    (0.08, 0.16, 0.3),
    (0.1, 0.18, 0.09),
    (0.7, 0.55, 0.05),
    (0.25, 0.17, 0.1),
)
PAINTS: Sequence[Rgb] = (
    (0.5, 0.51, 0.52),
    (0.2, 0.21, 0.22),
    (0.02, 0.02, 0.025),
    (0.75, 0.75, 0.74),
    (0.4, 0.03, 0.03),
    (0.03, 0.06, 0.2),
    (0.05, 0.2, 0.3),
    (0.06, 0.14, 0.07),
    (0.55, 0.4, 0.1),
)
WALLS: Sequence[Rgb] = (
    (0.42, 0.34, 0.22),
    (0.3, 0.13, 0.08),
    (0.62, 0.58, 0.5),
    (0.36, 0.33, 0.29),
    (0.75, 0.73, 0.69),
    (0.5, 0.42, 0.3),
    (0.22, 0.16, 0.12),
    (0.4, 0.42, 0.45),
)
ROOFS: Sequence[Rgb] = ((0.12, 0.09, 0.08), (0.25, 0.1, 0.06), (0.1, 0.1, 0.11), (0.17, 0.15, 0.14))
LEAVES: Sequence[Rgb] = (
    (0.09, 0.16, 0.04),
    (0.05, 0.11, 0.03),
    (0.14, 0.18, 0.05),
    (0.24, 0.17, 0.05),
    (0.11, 0.1, 0.05),
)
BARK: Sequence[Rgb] = ((0.09, 0.07, 0.05), (0.15, 0.12, 0.09), (0.05, 0.045, 0.04))


def pick(rng: np.random.Generator, colours: Sequence[Rgb], spread: float = 0.15) -> Rgb:
    """One of the colours, somewhat lighter or darker."""
    red, green, blue = np.array(colours[int(rng.integers(len(colours)))]) * rng.uniform(1 - spread, 1 + spread)
    return float(red), float(green), float(blue)
