"""Masks as runs, in COCO's order: down the columns, first the number of zeros."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from denselab.errors import InputError

_DIGIT_BITS, _FIRST_CHARACTER = 5, 48


@dataclass(frozen=True, eq=False)
class Rle:
    """One mask of height and width hw. counts: int64, lengths of runs of 0, 1, 0, ..., summing to H * W."""

    hw: tuple[int, int]
    counts: NDArray[np.int64]

    def __post_init__(self) -> None:
        """Check that the runs fill the image."""
        if (self.counts < 0).any() or int(self.counts.sum()) != self.hw[0] * self.hw[1]:
            raise InputError(
                f"counts: wanted runs that fill {self.hw[1]}x{self.hw[0]} px, got {int(self.counts.sum())} px"
            )

    @property
    def area_px(self) -> int:
        """Pixels in the mask."""
        return int(self.counts[1::2].sum())

    def box(self) -> tuple[int, int, int, int]:
        """x0, y0, x1, y1 in px, the last two exclusive; zeros for an empty mask."""
        rows, columns = (np.flatnonzero(self.to_mask().any(axis=axis)) for axis in (1, 0))
        if not len(rows):
            return 0, 0, 0, 0
        return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1

    def to_mask(self) -> NDArray[np.bool_]:
        """bool [H, W]."""
        values = np.arange(len(self.counts)) % 2 == 1
        return np.repeat(values, self.counts).reshape(self.hw[::-1]).T

    def to_string(self) -> str:
        """COCO's compressed counts: from the fourth run on differences to the run two before, 5 bits a character."""
        numbers = self.counts.copy()
        numbers[3:] -= self.counts[1:-2]
        return "".join(map(_characters, numbers.tolist()))


def encode(mask: NDArray[np.bool_]) -> Rle:
    """The runs of a mask bool [H, W]."""
    height, width = mask.shape
    flat = np.concatenate(([False], np.asarray(mask, bool).T.ravel()))
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    return Rle((height, width), np.diff(np.concatenate(([0], changes, [height * width]))))


def from_string(text: str, hw: tuple[int, int]) -> Rle:
    """The inverse of `Rle.to_string`. Raises InputError for text that is no mask of that size."""
    numbers: list[int] = []
    value = shift = 0
    for character in text.encode("ascii", "replace"):
        digit = character - _FIRST_CHARACTER
        value |= (digit & 31) << shift
        shift += _DIGIT_BITS
        if not digit & 32:
            numbers.append(value - (1 << shift) if digit & 16 else value)
            value = shift = 0
    counts = np.array(numbers, np.int64)
    for index in range(3, len(counts)):
        counts[index] += counts[index - 2]
    return Rle(hw, counts)


def _characters(number: int) -> str:
    text = ""
    while True:
        digit = number & 31
        number >>= _DIGIT_BITS
        last = number == (-1 if digit & 16 else 0)
        text += chr((digit if last else digit | 32) + _FIRST_CHARACTER)
        if last:
            return text
