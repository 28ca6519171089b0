"""Folders of images beside folders of class masks, id maps, depth and normal maps, in any combination."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from denselab.classes import Classes
from denselab.data.class_masks import ClassMask, MaskCoding, scanned_classes
from denselab.data.dataset import Dataset, Item, Labels
from denselab.data.depth import (
    MILLIMETRE_M,
    UNKNOWN,
    DepthFile,
    NormalFile,
    NormalsFromDepth,
    read_intrinsics,
)
from denselab.data.description import FROM_DEPTH, Description
from denselab.data.folder import DEPTH, INSTANCES, MASKS, NORMALS, FileKind, Files, find_files
from denselab.data.id_maps import IdMap, IdMapRule, are_id_maps
from denselab.errors import InputError

OBJECT = "object"
"""The class of id maps that nothing describes."""


@dataclass(frozen=True)
class _LabelPart:
    """What masks and id maps make of the files of an image."""

    classes: Classes | None
    tasks: tuple[str, ...]
    labels: Callable[[Files], Labels | None]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _SurfacePart:
    """What depth and normal maps make of the files of an image."""

    tasks: tuple[str, ...]
    depth: Callable[[Files], DepthFile | None]
    normals: Callable[[Files], NormalFile | NormalsFromDepth | None]
    notes: tuple[str, ...] = ()


def open_folders(described: Description) -> Dataset:
    """The data set of the files that `find_files` finds. Raises InputError for data it cannot use.

    masks: class ids (`names`, else scanned). instances: id maps, with masks of classes of which `things` are told
    apart, or without for one class. 16-bit masks that hold 1..n each, where no `names` are given, are id maps.
    depth: `scale` metres per unit, `invalid` values, `intrinsics`. normals: files, or derived from depth.
    """
    found = find_files(described)
    files = [each for part in found.splits.values() for each in part]
    labels = _label_part(described, files, found.kinds)
    surface = _surface_part(described, found.kinds)
    splits = {
        split: tuple(
            Item(each.name, each.image, labels.labels(each), surface.depth(each), surface.normals(each))
            for each in part
        )
        for split, part in found.splits.items()
    }
    tasks = frozenset((*labels.tasks, *surface.tasks))
    notes = (*found.notes, *labels.notes, *surface.notes)
    return Dataset(described.root, labels.classes, tasks, splits, notes, found.left_out)


def _label_part(described: Description, files: Sequence[Files], kinds: frozenset[FileKind]) -> _LabelPart:
    if INSTANCES in kinds:
        return _id_maps_and_masks(described, files) if MASKS in kinds else _id_maps(described, INSTANCES)
    if MASKS not in kinds:
        return _LabelPart(None, (), lambda _files: None)
    undescribed = "names" not in described and not described.rgb_masks
    if undescribed and are_id_maps([each.truths[MASKS] for each in files]):
        return _id_maps(described, MASKS)
    classes, coding, notes = _mask_classes(described, files)
    return _LabelPart(
        described.with_things(classes), ("semantic",), lambda each: ClassMask(each.truths[MASKS], coding), notes
    )


def _mask_classes(described: Description, files: Sequence[Files]) -> tuple[Classes, MaskCoding, tuple[str, ...]]:
    """Classes of masks, what their values mean, and what was assumed."""
    notes: tuple[str, ...] = ()
    if "names" in described:
        classes, class_of = described.named_classes()
    elif described.rgb_masks:
        raise InputError(f"{described.source}: rgb_masks needs names and colours, one colour per class; add them")
    else:
        masks, names = [each.truths[MASKS] for each in files], [each.image.name for each in files]
        classes, class_of, note = scanned_classes(masks, names, described.ignored(), described.root, described.source)
        notes = (note,)
    return classes, MaskCoding(tuple(class_of.items()), described.rgb_masks, described.source), notes


def _id_maps_and_masks(described: Description, files: Sequence[Files]) -> _LabelPart:
    classes, coding, notes = _mask_classes(described, files)
    classes = described.with_things(classes)
    if not classes.things:
        raise InputError(
            f"{described.source}: instances need the classes that are told apart, got none; add things: [NAMES]"
        )
    rule = IdMapRule(classes.things)
    return _LabelPart(
        classes,
        ("semantic", "instance", "panoptic"),
        lambda each: IdMap(each.truths[INSTANCES], rule, ClassMask(each.truths[MASKS], coding)),
        notes,
    )


def _id_maps(described: Description, kind: FileKind) -> _LabelPart:
    """Id maps without class masks: one thing class, and one for what is in no object where it is named."""
    notes: list[str] = []
    if "names" in described:
        classes, _ = described.named_classes()
    else:
        classes = Classes.named([OBJECT])
        notes.append(f"id maps without names: one class, {OBJECT}; {described.source.name} can name it")
    classes, background = described.with_background(classes)
    rest = [class_id for class_id in range(len(classes)) if class_id != background]
    classes = described.with_things(classes, rest)
    if len(classes.things) != 1 or len(rest) != 1:
        raise InputError(
            f"{described.source}: wanted one class of objects (and background: NAME, if 0 is a class) for id maps "
            f"without class masks, got {', '.join(classes.names)}; add masks: FOLDER, or keep one name"
        )
    rule = IdMapRule(classes.things, background, tuple(described.ignored()))
    tasks = ("instance",) if background is None else ("instance", "panoptic", "semantic")
    return _LabelPart(classes, tasks, lambda each: IdMap(each.truths[kind], rule), tuple(notes))


def _surface_part(described: Description, kinds: frozenset[FileKind]) -> _SurfacePart:
    notes: list[str] = []
    cameras = _cameras(described)
    scale_m = described.number("scale")
    if DEPTH in kinds and scale_m is None:
        scale_m = MILLIMETRE_M
        notes.append(f"depth without scale: taken as {MILLIMETRE_M} m per unit; {described.source.name} can say scale:")
    invalid = described.numbers("invalid") or UNKNOWN

    def depth(each: Files) -> DepthFile | None:
        return DepthFile(each.truths[DEPTH], scale_m or 1.0, invalid, cameras(each)) if DEPTH in kinds else None

    derives = DEPTH in kinds and NORMALS not in kinds and "intrinsics" in described
    if described.values.get("normals") == FROM_DEPTH and not derives:
        raise InputError(
            f"{described.source}: normals: from depth needs a depth folder and the camera; "
            "add intrinsics: [fx, fy, cx, cy] in px, or the file that holds them"
        )
    signs = described.normal_signs

    def normals(each: Files) -> NormalFile | NormalsFromDepth | None:
        if NORMALS in kinds:
            return NormalFile(each.truths[NORMALS], signs)
        return NormalsFromDepth() if derives else None

    tasks = (*(("depth",) if DEPTH in kinds else ()), *(("normals",) if derives or NORMALS in kinds else ()))
    return _SurfacePart(tasks, depth, normals, tuple(notes))


def _cameras(described: Description) -> Callable[[Files], NDArray[np.float64] | None]:
    """The intrinsics of an image: given as numbers, in a file for all, or in one by name."""
    if "intrinsics" not in described or isinstance(described.values["intrinsics"], list):
        camera = described.camera()
        return lambda _each: camera
    path = described.path("intrinsics")
    assert path is not None
    cameras = read_intrinsics(path)
    if not isinstance(cameras, Mapping):
        return lambda _each: cameras

    def of(each: Files) -> NDArray[np.float64]:
        found = cameras.get(each.name, cameras.get(each.image.stem))
        if found is None:
            raise InputError(f"{path}: wanted intrinsics of {each.name}, got those of {len(cameras)} others; add them")
        return found

    return of
