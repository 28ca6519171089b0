"""Predicted and true files of the same name in two folders."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from denselab.errors import InputError
from denselab.runtime.artifact import TASKS

SHOWN = 10
_OVERLAY = ".overlay"


@dataclass(frozen=True)
class FileKind:
    """Which files hold a task's maps.

    x.labels.png, as predict names what it writes, x.TASK.labels.png, as it does for several tasks, and x.TASK.png stand
    for x, and go before a plain x.png beside them.
    """

    what: str
    task: str
    suffixes: tuple[str, ...] = (".png",)

    def name_of(self, stem: str) -> tuple[str, bool]:
        """What a path without suffix stands for, and whether its ending says so."""
        for ending in (f".{self.task}.labels", ".labels", f".{self.task}"):
            if stem.endswith(ending):
                return stem.removesuffix(ending), True
        return stem, False

    def is_of_another_task(self, stem: str) -> bool:
        """Whether the ending says that it holds another task's maps."""
        return any(stem.endswith(f".{task}.labels") for task in TASKS if task != self.task)


@dataclass(frozen=True)
class FilePair:
    """A predicted and a true file; name: their path below both folders, without suffix."""

    name: str
    pred: Path
    truth: Path


def match_folders(pred: Path, gt: Path, kind: FileKind, allow_missing: bool) -> tuple[list[FilePair], list[str]]:
    """Pairs by relative stem, and the files of either folder that found no partner.

    Raises InputError for missing and empty folders, where nothing matches, and for files without a partner unless they
    are allowed.
    """
    preds, truths = find_files("--pred", pred, kind), find_files("--gt", gt, kind)
    pairs = [FilePair(name, preds[name], truths[name]) for name in truths if name in preds]
    unmatched = [str(truths[name]) for name in truths if name not in preds]
    unmatched += [str(preds[name]) for name in preds if name not in truths]
    if not pairs:
        raise InputError(
            f"--pred, --gt: wanted files of the same name in both folders, got e.g. {preds[min(preds)]} and "
            f"{truths[min(truths)]}; name the folders whose contents correspond"
        )
    refuse_unmatched("files", unmatched, allow_missing)
    return pairs, unmatched


def refuse_unmatched(what: str, unmatched: Sequence[str], allow_missing: bool) -> None:
    """Raise InputError if anything has no partner and that is not allowed."""
    if unmatched and not allow_missing:
        more = f" and {len(unmatched) - SHOWN} more" if len(unmatched) > SHOWN else ""
        raise InputError(
            f"{len(unmatched)} {what} without a partner: {', '.join(unmatched[:SHOWN])}{more}; "
            "add them, or leave them out: --allow-missing"
        )


def find_files(option: str, folder: Path, kind: FileKind) -> dict[str, Path]:
    """Files of the kind below a folder by relative stem. Raises InputError for missing and empty folders."""
    if not folder.is_dir():
        raise InputError(f"{option}: wanted a folder of {kind.what}, got {folder}, which is no folder; check the path")
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder).with_suffix("")
        hidden = any(part.startswith(".") for part in relative.parts)
        if path.suffix.lower() not in kind.suffixes or relative.suffix == _OVERLAY or hidden:
            continue
        stem = relative.as_posix()
        if kind.is_of_another_task(stem):
            continue
        name, marked = kind.name_of(stem)
        if marked:
            found[name] = path
        else:
            found.setdefault(name, path)
    if not found:
        raise InputError(f"{option}: wanted a folder of {kind.what}, got {folder}, which holds none; check the path")
    return found
