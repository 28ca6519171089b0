"""What `dataset.yaml` says, checked key by key."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

import yaml

from denselab.classes import VOID, Classes, Colour
from denselab.data.depth import as_intrinsics
from denselab.errors import InputError

DESCRIPTOR_NAMES = ("dataset.yaml", "dataset.yml", "dataset.json")
KEYS = (
    "names",
    "colours",
    "ignore",
    "images",
    "masks",
    "rgb_masks",
    "things",
    "background",
    "root",
    "layout",
    "annotations",
    "segments",
    "instances",
    "depth",
    "scale",
    "invalid",
    "intrinsics",
    "normals",
    "normal_signs",
    "splits",
)
YOLO_NAME = "data.yaml"
YOLO_KEYS = ("path", "train", "val", "test", "nc", "download", "kpt_shape", "flip_idx", "roboflow")
"""Keys of YOLO's own descriptor; only path, train, val and test are used, and names."""

FROM_DEPTH = "from depth"
_T = TypeVar("_T")


class Layout(StrEnum):
    """How files lie in a data folder."""

    FOLDERS = "folders"
    COCO_PANOPTIC = "coco_panoptic"
    COCO_INSTANCES = "coco_instances"
    DEPTH_LIST = "depth_list"
    SEVEN_SCENES = "seven_scenes"
    CITYSCAPES = "cityscapes"
    ADE20K = "ade20k"
    VOC = "voc"
    YOLO_SEG = "yolo_seg"


@dataclass(frozen=True)
class Description:
    """The values of a descriptor file. root: the data folder; source: the file, or where it could be written."""

    root: Path
    source: Path
    values: Mapping[str, Any]

    def __contains__(self, key: str) -> bool:
        """Whether the key is given."""
        return key in self.values

    def typed(self, key: str, kind: type[_T], wanted: str) -> _T | None:
        """The value of a key, None where it is not given; raises InputError where it is of another type."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, kind):
            raise self.refusal(key, wanted, value)
        return value

    def folder(self, key: str) -> str | None:
        """The name of a folder, or a pattern with one *."""
        return self.typed(key, str, "a folder's name")

    def path(self, key: str) -> Path | None:
        """A file or folder below the data folder, or else beside the descriptor; it exists."""
        text = self.typed(key, str, "a path")
        return None if text is None else self.resolve(key, text)

    def resolve(self, key: str, text: str) -> Path:
        """A path below the data folder, or else beside the descriptor. Raises InputError where there is neither."""
        for base in (self.root, self.source.parent):
            if (base / text).exists():
                return base / text
        raise self.refusal(key, f"a path in {self.root}", text)

    def refusal(self, key: str, wanted: str, got: Any) -> InputError:
        """The error for a value that cannot be used."""
        return InputError(f"{self.source}: {key}: wanted {wanted}, got {got!r}")

    @property
    def layout(self) -> Layout | None:
        """The named layout."""
        text = self.typed("layout", str, "a text")
        if text is None:
            return None
        if text not in tuple(Layout):
            raise self.refusal("layout", f"one of {', '.join(Layout)}", text)
        return Layout(text)

    @property
    def rgb_masks(self) -> bool:
        """Whether masks are coloured."""
        return bool(self.typed("rgb_masks", bool, "true or false"))

    @property
    def normal_signs(self) -> tuple[int, int, int]:
        """What x, y and z of normal maps are multiplied by."""
        match self.values.get("normal_signs", [1, 1, 1]):
            case [(1 | -1) as x, (1 | -1) as y, (1 | -1) as z]:
                return x, y, z
            case given:
                raise self.refusal("normal_signs", "1 or -1 for x, y and z, such as [1, -1, -1]", given)

    def ignored(self) -> list[int]:
        """Mask values that are void: ids, or with rgb_masks packed colours."""
        return self._values("ignore", self.values.get("ignore", []))

    def number(self, key: str) -> float | None:
        """A number above 0; a text such as 1/256 too."""
        value = self.values.get(key)
        if value is None:
            return None
        numerator, _, denominator = str(value).partition("/")
        try:
            number = float(numerator) / float(denominator or 1)
        except (ValueError, ZeroDivisionError):
            number = 0.0
        if not 0 < number < float("inf"):
            raise self.refusal(key, "a number above 0, such as 0.001 or 1/256", value)
        return number

    def numbers(self, key: str) -> tuple[float, ...] | None:
        """One or several numbers."""
        value = self.values.get(key)
        if value is None:
            return None
        items: list[Any] = value if isinstance(value, list) else [value]
        if not all(isinstance(item, int | float) for item in items):
            raise self.refusal(key, "numbers, such as [0, 65535]", value)
        return tuple(float(item) for item in items)

    def camera(self) -> Any:
        """Intrinsics float64 [3, 3] where they are given as numbers, else None."""
        given = self.values.get("intrinsics")
        return as_intrinsics(given, f"{self.source}: intrinsics") if isinstance(given, list) else None

    def with_things(self, classes: Classes, default: Sequence[int] = ()) -> Classes:
        """The classes with `things:` named in the descriptor, else with the default ones."""
        given = self.values.get("things")
        if given is None:
            return Classes(classes.names, classes.colours, tuple(default))
        if not isinstance(given, list):
            raise self.refusal("things", "a list of class names", given)
        unknown = [name for name in given if name not in classes.names]
        if unknown:
            raise self.refusal("things", f"names out of {', '.join(classes.names)}", unknown)
        return Classes(classes.names, classes.colours, tuple(sorted({classes.names.index(name) for name in given})))

    def with_background(self, classes: Classes) -> tuple[Classes, int | None]:
        """The class of pixels that are in no segment, if one is named; it comes last unless it is there already."""
        name = self.typed("background", str, "the name of a class")
        if name is None:
            return classes, None
        if name not in classes.names:
            names = (*classes.names, name)
            classes = Classes(names, (*classes.colours, Classes.named(names).colours[-1]), classes.things)
        return classes, classes.names.index(name)

    def named_classes(self) -> tuple[Classes, dict[int, int]]:
        """Classes of the `names` given, and the class id of each mask value; void values too."""
        names = self._by_id("names")
        if not all(isinstance(name, str) for name in names.values()):
            raise self._refuse_names(list(names.values()))
        colours = self._by_id("colours") if "colours" in self else {}
        if (colours or self.rgb_masks) and colours.keys() != names.keys():
            raise InputError(
                f"{self.source}: colours: wanted one for each of the {len(names)} names, got {len(colours)}; "
                "list them in the order of names, or under the same ids"
            )
        ignored = self.ignored()
        value_of = {i: self._packed("colours", colours[i]) if self.rgb_masks else i for i in names}
        if len(set(value_of.values())) < len(value_of):
            raise InputError(f"{self.source}: colours: wanted distinct ones for rgb_masks, got one colour twice")
        kept = [i for i in sorted(names) if value_of[i] not in ignored]
        classes = Classes.named([names[i] for i in kept])
        if colours:
            classes = Classes(classes.names, tuple(self._colour("colours", colours[i]) for i in kept))
        void_of = dict.fromkeys((*ignored, *(() if self.rgb_masks else (VOID,))), VOID)
        return classes, void_of | {value_of[i]: class_id for class_id, i in enumerate(kept)}

    def _refuse_names(self, got: Any) -> InputError:
        return self.refusal("names", "texts (quote numbers, yes and no)", got)

    def _by_id(self, key: str) -> dict[int, Any]:
        """A list by place, or a mapping by id."""
        given = self.values[key]
        if isinstance(given, list) and given:
            return dict(enumerate(given))
        if isinstance(given, dict) and given:
            return {self._mask_id(key, mask_id): value for mask_id, value in given.items()}
        raise self.refusal(key, "a list, or a mapping of mask id to one", given)

    def _values(self, key: str, given: Any) -> list[int]:
        items = given if isinstance(given, list) else [given]
        return [self._packed(key, item) if self.rgb_masks else self._mask_id(key, item) for item in items]

    def _mask_id(self, key: str, given: Any) -> int:
        text = str(given)
        if not text.isascii() or not text.isdigit() or int(text) > 65535:
            raise self.refusal(key, "mask ids in 0..65535", given)
        return int(text)

    def _packed(self, key: str, given: Any) -> int:
        red, green, blue = self._colour(key, given)
        return red << 16 | green << 8 | blue

    def _colour(self, key: str, given: Any) -> Colour:
        match given:
            case [int(red), int(green), int(blue)] if all(0 <= channel <= 255 for channel in (red, green, blue)):
                return red, green, blue
            case _:
                raise self.refusal(key, "[red, green, blue] in 0..255", given)


def read_description(path: Path) -> Description:
    """Of a data folder, or of a descriptor file whose `root` says where the data lie. Raises InputError."""
    if path.is_dir():
        found = [path / name for name in DESCRIPTOR_NAMES if (path / name).is_file()]
        if len(found) > 1:
            raise InputError(
                f"{path}: wanted one descriptor, got {' and '.join(file.name for file in found)}; remove one"
            )
        if not found and not (path / YOLO_NAME).is_file():
            return Description(path, path / DESCRIPTOR_NAMES[0], {})
        source = found[0] if found else path / YOLO_NAME
    elif path.suffix.lower() in (".yaml", ".yml", ".json") and path.is_file():
        source = path
    else:
        got = "a file" if path.exists() else "no such folder"
        raise InputError(f"{path}: wanted a data folder, got {got}; name the folder or its .yaml")
    values = _parsed(source)
    given = Description(source.parent, source, values)
    root = source.parent / (given.typed("root", str, "the path of the data folder") or "")
    if not root.is_dir():
        raise given.refusal("root", "a data folder", str(root))
    return Description(root if "root" in given else source.parent, source, values)


def _parsed(source: Path) -> Mapping[str, Any]:
    try:
        text = source.read_text("utf-8")
        values = json.loads(text) if source.suffix == ".json" else yaml.safe_load(text) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{source}: wanted YAML or JSON, got text that does not parse: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{source}: wanted keys out of {', '.join(KEYS)}, got {values!r}")
    known = KEYS if "train" not in values else (*KEYS, *YOLO_KEYS)
    unknown = [str(key) for key in values if key not in known]
    if unknown:
        raise InputError(f"{source}: wanted keys out of {', '.join(KEYS)}, got {', '.join(unknown)}; rename or remove")
    return {str(key): value for key, value in values.items()}
