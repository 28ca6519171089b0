"""RGB-D sequences named as in 7-Scenes: NAME.color.png (or .jpg) beside NAME.depth.png, in millimetres.

Source: Microsoft 7-Scenes (Shotton et al. 2013): depth is 16-bit millimetres, 0 and 65535 are unknown.
"""

from collections.abc import Mapping
from pathlib import Path

from denselab.data.dataset import Dataset, Item, LeftOut
from denselab.data.depth import MILLIMETRE_M, DepthFile, NormalsFromDepth, read_intrinsics
from denselab.data.description import Description
from denselab.errors import InputError

COLOUR, DEPTH = ".color", ".depth.png"
INVALID = (0.0, 65535.0)
INTRINSICS = "camera-intrinsics.txt"
VAL_SHARE = 0.1


def has_sequences(root: Path) -> bool:
    """Whether there are frames in a folder, or in those directly below."""
    return any(True for pattern in ("", "*/") for _ in root.glob(f"{pattern}*{DEPTH}"))


def open_seven_scenes(described: Description) -> Dataset:
    """Depth truth, and normals where the camera is known: `intrinsics:`, or camera-intrinsics.txt in the folder.

    The last 10 % of the frames of every sequence (folder) are val, the others train: neighbours look alike, and so
    would not do for validation. Raises InputError.
    """
    root = described.root
    camera = described.camera()
    if camera is None and ("intrinsics" in described or (root / INTRINSICS).is_file()):
        camera = read_intrinsics(described.path("intrinsics") or root / INTRINSICS)
    if isinstance(camera, Mapping):
        raise described.refusal("intrinsics", "one camera for all frames", described.values["intrinsics"])
    scale_m = described.number("scale") or MILLIMETRE_M
    invalid = described.numbers("invalid") or INVALID
    train: list[Item] = []
    val: list[Item] = []
    left_out: list[LeftOut] = []
    for folder in (root, *sorted(path for path in root.iterdir() if path.is_dir())):
        frames: list[Item] = []
        for image in sorted(path for path in folder.glob(f"*{COLOUR}.*") if path.suffix in (".png", ".jpg", ".jpeg")):
            stem = image.name.split(COLOUR)[0]
            depth = folder / f"{stem}{DEPTH}"
            if not depth.is_file():
                left_out.append(LeftOut(image, "depth map"))
                continue
            name = (folder / stem).relative_to(root).as_posix()
            normals = None if camera is None else NormalsFromDepth()
            frames.append(Item(name, image, depth=DepthFile(depth, scale_m, invalid, camera), normals=normals))
        kept = len(frames) - round(VAL_SHARE * len(frames))
        train += frames[:kept]
        val += frames[kept:]
    if not train:
        raise InputError(f"{root}: wanted frames NAME{COLOUR}.png beside NAME{DEPTH}, got none; name another layout:")
    held_out = "" if "splits" in described else f"; the last {100 * VAL_SHARE:.0f} % of every sequence are val"
    notes = [f"7-Scenes: {scale_m:g} m per unit{held_out}"]
    if camera is not None:
        notes.append("normals are derived from depth and intrinsics")
    tasks = frozenset({"depth"} if camera is None else {"depth", "normals"})
    splits = {split: tuple(items) for split, items in (("train", train), ("val", val)) if items}
    return Dataset(root, None, tasks, splits, tuple(notes), tuple(left_out))
