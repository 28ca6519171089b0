"""JSON lists of depth samples: every entry names its photo, its depth map, their unit and the camera.

`{train,val,test}_annotations.json` holds `{"files": [{"rgb": PATH, "depth": PATH, "depth_scale": UNITS_PER_METRE,
"cam_in": [fx, fy, cx, cy]}, ...]}`, as Metric3D's data lists do (YvanYin/Metric3D, mono/datasets). Such files may lie
in several subfolders.
"""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from denselab.data.dataset import Dataset, Item
from denselab.data.depth import UNKNOWN, DepthFile, NormalsFromDepth, as_intrinsics
from denselab.data.description import Description
from denselab.data.splits import SPLITS, split_named
from denselab.errors import InputError

ENDING = "_annotations.json"


def find_depth_lists(root: Path) -> dict[Path, str]:
    """The lists in a folder and in those directly below, each with its split."""
    found = [path for pattern in ("", "*/") for path in sorted(root.glob(f"{pattern}*{ENDING}"))]
    split_of = {path: split_named(path.name.removesuffix(ENDING)) for path in found}
    return {path: split for path, split in split_of.items() if split}


def open_depth_lists(described: Description) -> Dataset:
    """Depth truth, and normals where every entry has a camera. Raises InputError for lists it cannot use."""
    lists = find_depth_lists(described.root)
    if not lists:
        raise InputError(f"{described.root}: wanted train{ENDING} or the like, got none; name another layout:")
    splits: defaultdict[str, list[Item]] = defaultdict(list)
    invalid = described.numbers("invalid") or UNKNOWN
    for path, split in lists.items():
        splits[split] += [_item(entry, path, described, invalid) for entry in _entries(path)]
    items = [item for part in splits.values() for item in part]
    if not items:
        raise InputError(f"{next(iter(lists))}: wanted entries under files, got none; add some")
    has_cameras = all(item.normals for item in items)
    notes = ("normals are derived from depth and intrinsics",) if has_cameras else ()
    ordered = {split: tuple(sorted(splits[split], key=lambda item: item.name)) for split in SPLITS if splits[split]}
    return Dataset(described.root, None, frozenset({"depth", *(["normals"] if has_cameras else [])}), ordered, notes)


def _entries(path: Path) -> list[Any]:
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: wanted a list of depth samples in JSON, got {error}; export it again") from error
    if not isinstance(data, dict) or not isinstance(data.get("files"), list):
        raise InputError(f'{path}: wanted {{"files": [{{"rgb": ..., "depth": ...}}, ...]}}, got {str(data)[:80]}')
    return data["files"]


def _item(entry: Any, path: Path, described: Description, invalid: tuple[float, ...]) -> Item:
    match entry:
        case {"rgb": str(rgb), "depth": str(depth), "depth_scale": int(units) | float(units)} if units > 0:
            camera = as_intrinsics(entry["cam_in"], f"{path}: {rgb}: cam_in") if "cam_in" in entry else None
            depth_file = DepthFile(_resolved(depth, path, described), 1 / units, invalid, camera)
            normals = NormalsFromDepth() if camera is not None else None
            name = Path(rgb).with_suffix("").as_posix()
            return Item(name, _resolved(rgb, path, described), depth=depth_file, normals=normals)
        case _:
            raise InputError(f"{path}: wanted rgb, depth and depth_scale (units per metre) of a sample, got {entry!r}")


def _resolved(text: str, path: Path, described: Description) -> Path:
    """Paths are relative to the data folder, or to the list."""
    found = next((base / text for base in (described.root, path.parent) if (base / text).is_file()), None)
    if found is None:
        raise InputError(
            f"{path}: wanted the file {text} in {described.root} or {path.parent}, got none; copy it there"
        )
    return found
