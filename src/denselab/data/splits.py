"""Which image is in which split: held out by a hash, or as the descriptor says."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from denselab.data.dataset import Item
from denselab.data.description import Description
from denselab.errors import InputError

SPLIT_OF_FOLDER = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
SPLITS = ("train", "val", "test")
VAL_SHARE = 0.1

Splits = Mapping[str, tuple[Item, ...]]


def split_named(text: str) -> str | None:
    """The split that a folder or file name means, with or without a year (val2017); None for other names."""
    return SPLIT_OF_FOLDER.get(text.lower().rstrip("0123456789"))


def with_validation(splits: Splits) -> tuple[Splits, tuple[str, ...]]:
    """The splits, with val carved out of train where there is none; and a note where that was done."""
    if "val" in splits or len(splits.get("train", ())) < 2:
        return splits, ()
    carved = carve_validation(splits)
    note = (
        f"no val split: {len(carved['val'])} of {len(splits['train'])} train images, "
        "chosen by a hash of their names, are held out as val"
    )
    return carved, (note,)


def carve_validation(splits: Splits) -> Splits:
    """Move about 10 % of train into val: the images whose name hashes low, at least one, never all.

    The name (`Item.name`) is hashed with SHA-1, so every machine chooses the same ones and an added image moves no
    other (while at least one hashes below 10 %). Neighbouring frames of one video land on both sides: say which
    frames are val for such data (splits: {train: first 90 %, val: last 10 %}).
    """

    def place(item: Item) -> float:
        return int.from_bytes(hashlib.sha1(item.name.encode(), usedforsecurity=False).digest()[:8]) / 2**64

    train = sorted(splits["train"], key=place)
    count = min(max(1, sum(place(item) < VAL_SHARE for item in train)), len(train) - 1)
    val = {item.name for item in train[:count]}
    kept = tuple(item for item in splits["train"] if item.name not in val)
    held_out = tuple(item for item in splits["train"] if item.name in val)
    return {"train": kept, "val": held_out, **{split: splits[split] for split in splits if split != "train"}}


def chosen_splits(splits: Splits, described: Description) -> Splits:
    """The images of all splits, shared out as `splits:` in the descriptor says.

    For train, val and test it says `first N`, `last N` (also N %), `N to M` (counted from 1 in the order of names), a
    list of names, or the file of such a list, one per line. Images that no split names are left out. Raises InputError
    for other texts, for unknown names and for images in two splits.
    """
    given = described.typed("splits", dict, "a mapping of train, val, test to images") or {}
    items = sorted((item for part in splits.values() for item in part), key=lambda item: item.name)
    if len({item.name for item in items}) < len(items):
        raise described.refusal("splits", "images of distinct names", "split folders that share some; remove splits:")
    chosen: dict[str, tuple[Item, ...]] = {}
    for split in given:
        if split not in SPLITS:
            raise described.refusal("splits", "train, val or test", split)
    for split in (name for name in SPLITS if name in given):
        chosen[split] = _chosen(items, split, given[split], described)
    owner: dict[str, str] = {}
    for split, part in chosen.items():
        for item in part:
            if item.name in owner:
                raise described.refusal(
                    "splits", "every image in one split", f"{item.name} in {owner[item.name]} and {split}"
                )
            owner[item.name] = split
    return chosen


def _chosen(items: Sequence[Item], split: str, given: object, described: Description) -> tuple[Item, ...]:
    if isinstance(given, list):
        return _listed(items, [str(name) for name in given], split, described)
    match = re.fullmatch(r"(?:(first|last) +(\d+)( *%)?|(\d+) +to +(\d+))", str(given).strip())
    if not match:
        path = described.resolve("splits", str(given))
        try:
            names = path.read_text("utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: wanted a list of images, one per line, got {error}") from error
        return _listed(items, names, split, described)
    if match[1] is None:
        low, high = int(match[4]) - 1, int(match[5])
    else:
        count = round(len(items) * int(match[2]) / 100) if match[3] else int(match[2])
        low, high = (0, count) if match[1] == "first" else (len(items) - count, len(items))
    if not 0 <= low < high <= len(items):
        raise described.refusal("splits", f"{split} out of {len(items)} images", given)
    return tuple(items[low:high])


def _listed(items: Sequence[Item], names: Sequence[str], split: str, described: Description) -> tuple[Item, ...]:
    """Items by name, with or without suffix; empty lines are passed over."""
    by_name = {item.name: item for item in items} | {item.image.name: item for item in items}
    wanted = [name.strip() for name in names if name.strip()]
    unknown = [name for name in wanted if name not in by_name and Path(name).stem not in by_name]
    if unknown or not wanted:
        example = items[0].name if items else "nothing"
        raise described.refusal("splits", f"names of images for {split}, such as {example}", unknown[:4])
    return tuple(by_name[name] if name in by_name else by_name[Path(name).stem] for name in wanted)
