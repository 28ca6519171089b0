"""What class ids mean: a name and a colour for each."""

import colorsys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from denselab.errors import InputError

VOID = 255
"""The id of pixels that belong to no class."""

MAX_CLASSES = VOID

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Classes:
    """The classes of a model or dataset; class id i has `names[i]` and the RGB colour `colours[i]` (0..255).

    things: ids of the classes whose objects are told apart; the others are stuff, as sky and road are.
    Raises InputError unless there are 1 to 255 distinct names and as many colours, and things are among them.
    """

    names: tuple[str, ...]
    colours: tuple[Colour, ...]
    things: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Check names and colours."""
        if not 1 <= len(self.names) <= MAX_CLASSES:
            raise InputError(f"classes: wanted 1 to {MAX_CLASSES} names (id {VOID} is void), got {len(self.names)}")
        if len(self.colours) != len(self.names):
            raise InputError(
                f"classes: wanted one colour per name, got {len(self.names)} names and {len(self.colours)} colours"
            )
        repeated = sorted({name for name in self.names if self.names.count(name) > 1})
        if repeated:
            raise InputError(f"classes: wanted distinct names, got {', '.join(repeated)} more than once; rename them")
        strange = [index for index in self.things if not 0 <= index < len(self.names)]
        if strange or list(self.things) != sorted(set(self.things)):
            raise InputError(f"classes: things: wanted rising ids in 0..{len(self.names) - 1}, got {list(self.things)}")
        for name, colour in zip(self.names, self.colours, strict=True):
            if len(colour) != 3 or not all(0 <= channel <= 255 for channel in colour):
                raise InputError(f"classes: colour of {name}: wanted red, green, blue in 0..255, got {list(colour)}")

    @classmethod
    def named(cls, names: Sequence[str], things: Sequence[int] = ()) -> "Classes":
        """Classes with generated colours: the same names count gives the same distinct colours every time."""
        return cls(tuple(names), tuple(_colour(index) for index in range(len(names))), tuple(things))

    def to_dict(self) -> dict[str, Any]:
        """`{"names": [...], "colours": [[r, g, b], ...]}`, and `"things": [id, ...]` where there are any."""
        data = {"names": list(self.names), "colours": [list(colour) for colour in self.colours]}
        return {**data, "things": list(self.things)} if self.things else data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Classes":
        """The inverse of `to_dict`; colours are generated where `colours` is absent."""
        try:
            names = tuple(str(name) for name in data["names"])
            things = tuple(int(index) for index in data.get("things", ()))
            if "colours" not in data:
                return cls.named(names, things)
            return cls(names, tuple(_as_colour(colour) for colour in data["colours"]), things)
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f'classes: wanted {{"names": [...], "colours": [[r, g, b], ...]}}, got {data!r}'
            ) from error

    def __len__(self) -> int:
        """How many classes, K."""
        return len(self.names)


def _as_colour(values: Sequence[Any]) -> Colour:
    red, green, blue = (int(value) for value in values)
    return red, green, blue


def _colour(index: int) -> Colour:
    """Hues a golden ratio apart never repeat; saturation and value alternate so that near hues still differ."""
    hue = (0.58 + index * 0.618033988749895) % 1
    saturation, value = ((0.75, 0.95), (0.95, 0.65), (0.45, 0.85))[index % 3]
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


STREET = Classes(
    (
        "sky",
        "building",
        "pole",
        "road",
        "pavement",
        "tree",
        "sign",
        "fence",
        "car",
        "pedestrian",
        "bicyclist",
    ),
    (
        (128, 128, 128),
        (128, 0, 0),
        (192, 192, 128),
        (128, 64, 128),
        (60, 40, 222),
        (128, 128, 0),
        (192, 128, 128),
        (64, 64, 128),
        (64, 0, 128),
        (64, 64, 0),
        (0, 128, 192),
    ),
)
"""CamVid's eleven classes in the order and colours of SegNet (Badrinarayanan et al. 2017)."""
