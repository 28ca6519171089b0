"""ADE20K scene parsing: images/{training,validation}, annotations/{training,validation}, objectInfo150.txt.

Masks hold 1..150, 0 is void; the names stand in objectInfo150.txt. Source: Zhou et al. 2017, ADEChallengeData2016.
Panoptic ADE20K is distributed as COCO panoptic, which opens as that.
"""

from dataclasses import replace

from denselab.data.dataset import Dataset
from denselab.data.description import Description
from denselab.data.folders import open_folders
from denselab.errors import InputError

NAMES_FILE = "objectInfo150.txt"


def open_ade20k(described: Description) -> Dataset:
    """Semantic truth with the 150 classes, or those of `names:` in the descriptor. Raises InputError."""
    if "names" in described:
        return open_folders(described)
    path = described.root / NAMES_FILE
    try:
        rows = [line.split("\t") for line in path.read_text("utf-8").splitlines()[1:] if line.strip()]
        names = {int(row[0]): row[-1].split(",")[0].strip() for row in rows}
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: wanted lines of number, ..., name, got {error}; unpack it there") from error
    distinct = {i: name if list(names.values()).count(name) == 1 else f"{name} {i}" for i, name in names.items()}
    values = {**described.values, "names": distinct, "ignore": [0]}
    folders = {key: name for key, name in (("images", "images"), ("masks", "annotations")) if key not in described}
    return open_folders(replace(described, values=values | folders))
