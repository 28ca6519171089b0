"""What is asked, and how the answer is found; apart from the rest, so that the help needs no torch."""

from dataclasses import dataclass
from enum import StrEnum


class Method(StrEnum):
    """LRP, CP_LRP: relevance propagation through the whole of attention, or through its values alone; patented for
    commercial use in some places. GRADIENT: gradient times input, which needs no capture of the model.
    """

    LRP = "lrp"
    CP_LRP = "cp-lrp"
    GRADIENT = "gradient"


@dataclass(frozen=True)
class OfClass:
    """All that the model calls by this name."""

    name: str


@dataclass(frozen=True)
class AtPoint:
    """What it says at a pixel of the photo, counted from its upper left corner."""

    x_px: int
    y_px: int


@dataclass(frozen=True)
class Largest:
    """What covers most of the photo."""


Asked = OfClass | AtPoint | Largest
