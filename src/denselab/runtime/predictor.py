"""A session and what its artifact says, as one callable: image in, result out."""

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from denselab.errors import InputError
from denselab.results import JointResult, Result
from denselab.runtime.answers import Answers, to_result
from denselab.runtime.artifact import ArtifactInfo
from denselab.runtime.images import from_picture, open_image
from denselab.runtime.session import Session
from denselab.runtime.tiling import WHOLE_PX, run_tiled

LongSide = int | Literal["auto", "native"]
_FAR_LARGER = 2

MIN_SCORE = 0.05
"""Instances of which a model is less sure are dropped, unless told otherwise."""


class Predictor:
    """Answers images of any size with one model; call it from one thread at a time.

    tile_px: for semantic labels alone: None runs images whole unless they are huge (see runtime.tiling); a number
    forces tiles of that size. long_side: how large an image the model sees. "native": as it is. A number: larger
    images are shrunk to that many px, and their results enlarged again. "auto": images more than twice as large as
    those the model learned from are shrunk to their size, for a network knows things at the size it has seen them.
    min_score: instances of lower score are dropped.
    Models of any other task see an image in one piece, so one of more than WHOLE_PX pixels is shrunk to so many
    whatever long_side says. Results always have the size of the image.
    """

    def __init__(
        self,
        session: Session,
        info: ArtifactInfo,
        tile_px: int | None = None,
        long_side: LongSide = "auto",
        min_score: float = MIN_SCORE,
    ) -> None:
        self._tiles = info.tasks == ("semantic",)
        if tile_px is not None and not self._tiles:
            raise InputError(f"tile_px: wanted None, for only semantic labels are made by tiles, not {info.task}")
        self.session = session
        self.info = info
        self.tile_px = tile_px
        self.long_side: LongSide = long_side
        self.min_score = min_score

    def __call__(self, image: str | Path | Image.Image | NDArray[np.uint8]) -> Result | JointResult:
        """Answer a file, a PIL image, or RGB pixels uint8 [H, W, 3]; raises InputError for anything else.

        A model of one task gives its result, one of several a JointResult, a mapping from task to result. timing_ms
        holds decode (files only), engine (pixels to results) and total.
        """
        start = time.perf_counter()
        pixels = as_pixels(image)
        decoded = time.perf_counter()
        hw = pixels.shape[:2]
        results = self.results(self.answers(_shrunk(pixels, self.seen_hw(hw))), hw)
        end = time.perf_counter()
        timing_ms = {"engine": 1000 * (end - decoded), "total": 1000 * (end - start)}
        if isinstance(image, str | Path):
            timing_ms = {"decode": 1000 * (decoded - start), **timing_ms}
        joint = JointResult(results)
        return (joint if len(joint) > 1 else joint[self.info.task]).with_timing(timing_ms)

    def answers(self, pixels: NDArray[np.uint8]) -> Answers:
        """Outputs of the graph for RGB pixels [H, W, 3] (see runtime.answers), at the size of the pixels.

        Class ids of huge images come from tiles; what comes in one piece is smaller than the pixels above WHOLE_PX.
        """
        if self._tiles:
            return {"class_ids": run_tiled(self.session, pixels, self.info.size_multiple, self.tile_px)}
        return self.session.run(_shrunk(pixels, _in_one_piece(pixels.shape[:2])))

    def results(
        self, answers: Answers, source_hw: tuple[int, int], min_score: float | None = None
    ) -> dict[str, Result]:
        """The result of every task at source_hw. min_score: the predictor's own if not given."""
        least = self.min_score if min_score is None else min_score
        info = self.info
        return {
            task: to_result(
                task,
                answers,
                info.classes,
                source_hw,
                void=info.void,
                model=info.name,
                min_score=least,
                depth_unit=info.depth_unit,
            )
            for task in info.tasks
        }

    def results_at_own_size(self, pixels: NDArray[np.uint8]) -> Mapping[str, Result]:
        """What scores are measured on: results by task of RGB pixels [H, W, 3] seen as `answers` does, whatever
        `long_side` says, with instances of any score."""
        return self.results(self.answers(pixels), pixels.shape[:2], min_score=0.0)

    def asked_hw(self, source_hw: tuple[int, int]) -> tuple[int, int]:
        """Height and width at which `long_side` would have the model see an image of that size."""
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

    def seen_hw(self, source_hw: tuple[int, int]) -> tuple[int, int]:
        """Height and width at which the model sees an image of that size: as asked, if one piece has room for it."""
        asked = self.asked_hw(source_hw)
        return asked if self._tiles else _in_one_piece(asked)


def _in_one_piece(hw: tuple[int, int]) -> tuple[int, int]:
    """The largest size of the same aspect that has no more than WHOLE_PX pixels."""
    height, width = hw
    if height * width <= WHOLE_PX:
        return hw
    scale = math.sqrt(WHOLE_PX / (height * width))
    height = max(1, min(int(height * scale), WHOLE_PX))
    return height, max(1, min(int(width * scale), WHOLE_PX // height))


def _shrunk(pixels: NDArray[np.uint8], hw: tuple[int, int]) -> NDArray[np.uint8]:
    if hw == pixels.shape[:2]:
        return pixels
    return np.array(Image.fromarray(pixels).resize((hw[1], hw[0]), Image.Resampling.BILINEAR, reducing_gap=3))


def as_pixels(image: Any) -> NDArray[np.uint8]:
    """RGB pixels uint8 [H, W, 3] of a file, a PIL image or an array; raises InputError that says how to convert."""
    match image:
        case str() | Path():
            return open_image(Path(image))
        case Image.Image():
            return from_picture(image)
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
