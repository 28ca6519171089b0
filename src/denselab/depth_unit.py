"""What depths are in; apart from results, so that artifacts can be described without numpy."""

from enum import Enum


class DepthUnit(Enum):
    """What depths are in.

    RELATIVE: farther is more, but in no unit: 1 / depth is known up to a scale and a shift (affine-invariant inverse
    depth, as MiDaS and Depth Anything predict it).
    """

    METRES = "metres"
    RELATIVE = "relative"
