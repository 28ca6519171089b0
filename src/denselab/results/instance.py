"""Instance segmentation: a mask for every object; masks may overlap."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from denselab import drawing
from denselab.classes import Classes
from denselab.drawing.canvas import font_px
from denselab.errors import InputError
from denselab.results import runs
from denselab.results.result import Result
from denselab.rle import Rle
from denselab.segments import Segment, Segments, from_masks

if TYPE_CHECKING:
    from PIL.Image import Image

_DRAWN_SCORE = 0.5
_MOST_INSTANCES = 65535


@dataclass(frozen=True, eq=False)
class InstanceSet(Result):
    """Objects, the surest first: what was given is sorted by falling score.

    masks: of height and width hw, kept as runs. class_ids: int32 [N], 0..K-1. scores: float32 [N], 0..1.
    Raises InputError for lists of different length, other types or sizes, and values out of range.
    """

    task: ClassVar[str] = "instance"

    masks: tuple[Rle, ...]
    class_ids: NDArray[np.int32]
    scores: NDArray[np.float32]
    size_hw: tuple[int, int]
    classes: Classes
    model: str = ""
    timing_ms: Mapping[str, float] = field(default_factory=dict[str, float])

    def __post_init__(self) -> None:
        """Check, then sort."""
        count = len(self.masks)
        for name, array, dtype in (("class_ids", self.class_ids, np.int32), ("scores", self.scores, np.float32)):
            if array.dtype != dtype or array.shape != (count,):
                wanted = f"{np.dtype(dtype)} [{count}], one for each mask"
                raise InputError(f"{name}: wanted {wanted}, got {array.dtype} {list(array.shape)}")
        if count > _MOST_INSTANCES:
            raise InputError(f"masks: wanted at most {_MOST_INSTANCES}, got {count}; drop those of low score")
        for mask in self.masks:
            if mask.hw != self.size_hw:
                raise InputError(f"masks: wanted the size {self.size_hw}, got {mask.hw}")
        strange = self.class_ids[(self.class_ids < 0) | (self.class_ids >= len(self.classes))]
        if len(strange):
            raise InputError(f"class_ids: wanted 0..{len(self.classes) - 1}, got {strange[:5].tolist()}")
        if not ((self.scores >= 0) & (self.scores <= 1)).all():
            raise InputError(f"scores: wanted 0..1, got {self.scores.min()}..{self.scores.max()}")
        order = np.argsort(-self.scores, kind="stable")
        if (np.diff(order) < 0).any():
            object.__setattr__(self, "masks", tuple(self.masks[i] for i in order))
            object.__setattr__(self, "class_ids", self.class_ids[order])
            object.__setattr__(self, "scores", self.scores[order])

    def __len__(self) -> int:
        """How many objects, N."""
        return len(self.masks)

    @property
    def hw(self) -> tuple[int, int]:
        """Height and width of the image in px."""
        return self.size_hw

    def decoded(self) -> Iterator[NDArray[np.bool_]]:
        """The masks bool [H, W], one after the other."""
        return (mask.to_mask() for mask in self.masks)

    @cached_property
    def boxes(self) -> tuple[runs.Box, ...]:
        """x0, y0, x1, y1 of every object in px, the last two exclusive; zeros for an empty mask."""
        return tuple(map(runs.box, self.masks))

    def above(self, score: float) -> "InstanceSet":
        """Those that are at least so sure."""
        count = int((self.scores >= score).sum())
        kept = (self.masks[:count], self.class_ids[:count], self.scores[:count])
        return InstanceSet(*kept, self.size_hw, self.classes, self.model, self.timing_ms)

    def to_segments(self) -> Segments:
        """What metrics take; ids are 1..N, the surest first."""
        segments = [
            Segment(number, int(class_id), float(score))
            for number, (class_id, score) in enumerate(zip(self.class_ids, self.scores, strict=True), 1)
        ]
        return from_masks(self.decoded(), segments, self.hw)

    def to_array(self) -> NDArray[np.uint16]:
        """At every pixel the number of the surest object there, from 1; 0 where there is none. uint16 [H, W]."""
        numbers = np.zeros(self.hw, np.uint16)
        for index in reversed(range(len(self))):
            rows, columns, inside = runs.crop(self.masks[index])
            numbers[rows, columns][inside] = index + 1
        return numbers

    def to_image(self) -> "Image":
        """`to_array` as a 16-bit grey picture; the ids are those of `to_dict`."""
        from PIL import Image

        return Image.fromarray(self.to_array())

    def overlay(
        self, image: NDArray[np.uint8], *, legend: bool = True, opacity: float = 0.55, score: float = _DRAWN_SCORE
    ) -> "Image":
        """The image [H, W, 3] uint8 with the objects of at least that score, each in a shade of its class colour.

        With legend, class and score stand at the objects, and the classes with areas and numbers below the image.
        """
        shown = self.above(score)
        colours = drawing.shades(shown.class_ids.tolist(), self.classes)
        numbers = shown.to_array()
        panel, tags = None, list[drawing.Tag]()
        if legend:
            areas = np.zeros(len(self.classes))
            for class_id, mask in zip(shown.class_ids, shown.masks, strict=True):
                areas[class_id] += mask.area_px
            counts = np.bincount(shown.class_ids, minlength=len(self.classes))
            panel = drawing.legend(self.classes, areas / numbers.size, self.hw[1], font_px(self.hw), counts)
            tags = [
                drawing.Tag(
                    f"{self.classes.names[shown.class_ids[i]]} {shown.scores[i]:.2f}", colours[i], shown.boxes[i]
                )
                for i in sorted(range(len(shown)), key=lambda i: -shown.masks[i].area_px)
            ]
        return drawing.segments_overlay(image, self.hw, lambda rows: numbers[rows], colours, tags, panel, opacity)

    def figures(self) -> dict[str, Any]:
        """How many there are of each class, and every object with its mask in COCO's compressed runs."""
        counts = np.bincount(self.class_ids, minlength=len(self.classes))
        return {
            "classes": [
                {"id": i, "name": name, "colour": list(colour), "instances": int(counts[i])}
                for i, (name, colour) in enumerate(zip(self.classes.names, self.classes.colours, strict=True))
            ],
            "instances": [
                {
                    "id": number,
                    "category_id": int(class_id),
                    "category": self.classes.names[class_id],
                    "score": round(float(score), 4),
                    "area": mask.area_px,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "segmentation": {"size": list(self.hw), "counts": mask.to_string()},
                }
                for number, (class_id, score, mask, (x0, y0, x1, y1)) in enumerate(
                    zip(self.class_ids, self.scores, self.masks, self.boxes, strict=True), 1
                )
            ],
        }
