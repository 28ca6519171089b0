"""A data set of any kind: images in splits, and where the truth of each image is kept."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from denselab.classes import Classes
from denselab.data.depth import DepthFile, NormalFile, NormalsFromDepth
from denselab.data.truth import LABEL_TASKS, Truth
from denselab.errors import InputError


class Labels(Protocol):
    """Where the class ids and segments of one image are kept, still encoded: paths, polygons or runs."""

    def read(self, image: Path, hw: tuple[int, int], tasks: Collection[str]) -> Truth:
        """Class ids where tasks hold "semantic"; segments and void where they hold "panoptic" or "instance".

        image, hw: the image they belong to and its size in px, for errors and for masks without a size of their own.
        Raises InputError, SizeMismatchError, UnknownLabelError.
        """
        ...


@dataclass(frozen=True, eq=False)
class Item:
    """One image and where its truths are. name: its path below the image folder, without suffix."""

    name: str
    image: Path
    labels: Labels | None = None
    depth: DepthFile | None = None
    normals: NormalFile | NormalsFromDepth | None = None

    def truth(self, hw: tuple[int, int], tasks: Collection[str]) -> Truth:
        """What these tasks need to know about the image of hw px. Raises InputError."""
        truth = Truth()
        label_tasks = LABEL_TASKS.intersection(tasks)
        if label_tasks and self.labels:
            truth = self.labels.read(self.image, hw, label_tasks)
        if self.depth and ("depth" in tasks or ("normals" in tasks and isinstance(self.normals, NormalsFromDepth))):
            depth_m = self.depth.read(self.image, hw)
            truth = replace(truth, depth_m=depth_m, intrinsics=self.depth.intrinsics)
        if "normals" in tasks and self.normals:
            match self.normals:
                case NormalFile():
                    truth = replace(truth, normals=self.normals.read(self.image, hw))
                case NormalsFromDepth():
                    truth = replace(truth, normals=self.normals.derive(truth))
        return truth if "depth" in tasks else replace(truth, depth_m=None)


@dataclass(frozen=True)
class LeftOut:
    """A file that found no partner of the kind that `missing` names, such as "image" or "mask"."""

    path: Path
    missing: str


@dataclass(frozen=True)
class Dataset:
    """Images in splits, and what is known of them.

    root: the folder, for messages. classes: None for data without labels. tasks: what can be read, out of
    `runtime.artifact.TASKS`. notes: what was assumed, in words for the user. left_out: files without a partner.
    """

    root: Path
    classes: Classes | None
    tasks: frozenset[str]
    splits: Mapping[str, tuple[Item, ...]]
    notes: tuple[str, ...] = ()
    left_out: tuple[LeftOut, ...] = ()

    def split(self, name: str) -> tuple[Item, ...]:
        """The items of a split; raises InputError that lists the splits there are."""
        if name not in self.splits:
            raise InputError(
                f"{self.root}: wanted split {name}, got only {', '.join(self.splits)}; choose one of these"
            )
        return self.splits[name]

    def require(self, tasks: Collection[str]) -> None:
        """Raise InputError, saying what is missing, unless the data hold the truth for all tasks."""
        missing = [task for task in tasks if task not in self.tasks]
        if missing:
            raise InputError(
                f"{self.root}: wanted truth for {', '.join(missing)}, got data with {', '.join(sorted(self.tasks))} "
                f"only; {_MEND.get(missing[0], 'choose another task')}"
            )

    def read(self, item: Item, tasks: Collection[str]) -> tuple[NDArray[np.uint8], Truth]:
        """Image uint8 [H, W, 3], and the truth these tasks need; nothing else is read.

        Of "instance" and "panoptic" together the segments are those of panoptic. Raises InputError for tasks without
        truth and for files that cannot be used, SizeMismatchError and UnknownLabelError.
        """
        from denselab.runtime.images import open_image

        self.require(tasks)
        image = open_image(item.image)
        return image, item.truth((image.shape[0], image.shape[1]), tasks)


_MEND = {
    "semantic": "add masks, or name the class of what is in no segment in dataset.yaml (background: NAME)",
    "panoptic": "add masks of the stuff classes, or name the class of what is in no segment (background: NAME)",
    "instance": "add id maps (instances: FOLDER) and say which classes are things (things: [NAMES])",
    "depth": "add depth maps (depth: FOLDER, scale: METRES_PER_UNIT)",
    "normals": "add normal maps (normals: FOLDER), or depth with intrinsics: [fx, fy, cx, cy]",
}
