"""A session and what its artifact says, as one callable: image in, SemanticMap out."""

import time
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from denselab.errors import InputError
from denselab.results import SemanticMap
from denselab.runtime.artifact import ArtifactInfo
from denselab.runtime.images import open_image
from denselab.runtime.session import Session
from denselab.runtime.tiling import run_tiled

LongSide = int | Literal["auto", "native"]
_FAR_LARGER = 2


class Predictor:
    """Labels images of any size with one model; call it from one thread at a time.

    tile_px: None runs images whole unless they are huge (see runtime.tiling); a number forces tiles of that size.
    long_side: how large an image the model sees. "native": as it is. A number: larger images are shrunk to that
    many px, and their labels enlarged again. "auto": images more than twice as large as those the model learned
    from are shrunk to their size, for a network knows things at the size it has seen them.
    """

    def __init__(
        self, session: Session, info: ArtifactInfo, tile_px: int | None = None, long_side: LongSide = "auto"
    ) -> None:
        self.session = session
        self.info = info
        self.tile_px = tile_px
        self.long_side: LongSide = long_side

    def __call__(self, image: str | Path | Image.Image | NDArray[np.uint8]) -> SemanticMap:
        """Label a file, a PIL image, or RGB pixels uint8 [H, W, 3]; raises InputError for anything else.

        The result's timing_ms holds decode (files only), engine and total.
        """
        start = time.perf_counter()
        pixels = as_pixels(image)
        decoded = time.perf_counter()
        class_ids = _enlarged(self.class_ids(self._shrunk(pixels)), pixels.shape[:2])
        end = time.perf_counter()
        timing_ms = {"engine": 1000 * (end - decoded), "total": 1000 * (end - start)}
        if isinstance(image, str | Path):
            timing_ms = {"decode": 1000 * (decoded - start), **timing_ms}
        return SemanticMap(class_ids, self.info.classes, self.info.void, self.info.name, timing_ms)

    def class_ids(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Class ids [H, W] of RGB pixels [H, W, 3] at their own size, by tiles where the image is huge."""
        return run_tiled(self.session, pixels, self.info.size_multiple, self.tile_px)

    def seen_hw(self, source_hw: tuple[int, int]) -> tuple[int, int]:
        """Height and width at which the model sees an image of that size."""
        longest = max(source_hw)
        match self.long_side:
            case "native":
                return source_hw
            case "auto":
                trained = max(self.info.train_hw) if self.info.train_hw else longest
                target = trained if longest > _FAR_LARGER * trained else longest
            case int():
                target = min(self.long_side, longest)
        height, width = (max(1, round(side * target / longest)) for side in source_hw)
        return height, width

    def _shrunk(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        height, width = self.seen_hw(pixels.shape[:2])
        if (height, width) == pixels.shape[:2]:
            return pixels
        return np.array(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR, reducing_gap=3))


def _enlarged(class_ids: NDArray[np.uint8], hw: tuple[int, int]) -> NDArray[np.uint8]:
    if class_ids.shape == hw:
        return class_ids
    return np.array(Image.fromarray(class_ids).resize((hw[1], hw[0]), Image.Resampling.NEAREST))


def as_pixels(image: Any) -> NDArray[np.uint8]:
    """RGB pixels uint8 [H, W, 3] of a file, a PIL image or an array; raises InputError that says how to convert."""
    match image:
        case str() | Path():
            return open_image(Path(image))
        case Image.Image():
            return _picture_pixels(image)
        case np.ndarray():
            return _checked(cast("NDArray[Any]", image))
        case _:
            raise InputError(
                f"image: wanted a path, a PIL image or a numpy array uint8 [H, W, 3], got {type(image).__name__}"
            )


def _checked(pixels: NDArray[Any]) -> NDArray[np.uint8]:
    match pixels.shape:
        case (height, width, 3) if pixels.dtype == np.uint8 and height and width:
            return pixels
        case (_, _, 3) if np.issubdtype(pixels.dtype, np.floating):
            mend = 'if its values are in 0..1: (255 * image).round().astype("uint8")'
        case (_, _, 3) if pixels.dtype == np.uint16:
            mend = 'scale it to 8 bits: (image // 257).astype("uint8")'
        case (_, _, 3) if pixels.size:
            mend = 'if its values are in 0..255: image.astype("uint8")'
        case (_, _):
            mend = "repeat the grey channel: numpy.stack([image] * 3, axis=-1)"
        case (_, _, 4):
            mend = "drop the alpha channel: image[:, :, :3]"
        case (3, _, _):
            mend = "put the channels last: image.transpose(1, 2, 0)"
        case (_, _, _, 3):
            mend = "give one image at a time: image[0]"
        case _:
            mend = "give at least one pixel, with red, green and blue"
    raise InputError(f"image: wanted uint8 [H, W, 3] RGB, got {pixels.dtype} {list(pixels.shape)}; {mend}")


def _picture_pixels(picture: Image.Image) -> NDArray[np.uint8]:
    """As open_image has it: upright by its EXIF orientation, transparency laid on white."""
    if picture.mode in ("F", "LAB") or picture.mode.startswith("I"):
        raise InputError(
            f"image: wanted a PIL image of 8 bits a channel, got mode {picture.mode}; "
            "give the path of its file instead, or convert it to RGB"
        )
    try:
        upright = ImageOps.exif_transpose(picture)
    except OSError as error:  # PIL reads lazily: a damaged file shows here
        raise InputError(f"image: PIL cannot read it ({error}); copy or export it again") from error
    if upright.has_transparency_data:
        white = Image.new("RGBA", upright.size, "white")
        upright = Image.alpha_composite(white, upright.convert("RGBA"))
    return np.array(upright.convert("RGB"))
