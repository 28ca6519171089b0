"""Integer weights as few bits in a file, and the nodes that unpack them, which engines run once: when they load it.

8 bits are stored as they are, and so are 7, for the tables of the last bit are larger than what it saves in a small
network; 4 bits are stored as the ONNX type UINT4. Codes of other widths are split into parts of 4, 2 and 1 bits
(3 = 2 + 1, 6 = 4 + 2), so that whole numbers of them fill a byte, the first in the lowest bits: 8 codes of 3
bits take 3 bytes. A byte is unpacked by looking it up in a table of the codes in it. Shifts and bitwise operations
would be plainer, but OpenVINO (2026.4) neither computes them at load nor computes them right.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Integer, UInt8
from numpy.typing import NDArray

WHOLE_BYTE = (7, 8)
"""Bits of codes that are stored as bytes."""

_PARTS = (4, 2, 1)


def parts_of(bits: int) -> tuple[int, ...]:
    """Widths in bits of the parts of a code of 1 to 6 bits, that of its highest bits first."""
    return tuple(part for part in _PARTS if bits & part)


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that so many codes take."""
    return count if bits in WHOLE_BYTE else sum(-(-count * part // 8) for part in parts_of(bits))


def pack(codes: Integer[NDArray[np.integer], "count"], bits: int) -> tuple[UInt8[NDArray[np.uint8], "bytes"], ...]:
    """Codes 0..2^bits - 1 as bytes, one array per part (see `parts_of`); the last byte is filled up with zeros."""
    found: list[NDArray[np.uint8]] = []
    above = bits
    for part in parts_of(bits):
        above -= part
        each = (codes.astype(np.int64) >> above) & (2**part - 1)
        rows = np.pad(each, (0, -len(each) % (8 // part))).reshape(-1, 8 // part)
        found.append((rows << _shifts(part)).sum(axis=1).astype(np.uint8))
    return tuple(found)


def unpack(packed: Sequence[UInt8[NDArray[np.uint8], "bytes"]], bits: int, count: int) -> NDArray[np.int32]:
    """The codes that `pack` took, by the tables that the file holds."""
    above, codes = bits, np.zeros(count, np.int32)
    for part, found in zip(parts_of(bits), packed, strict=True):
        above -= part
        codes += byte_table(part, above)[found].reshape(-1)[:count]
    return codes


def byte_table(part: int, above: int = 0) -> Integer[NDArray[np.int32], "256 codes"]:
    """The codes of so many bits in every byte, multiplied by 2^above."""
    return (((np.arange(256)[:, None] >> _shifts(part)) & (2**part - 1)) << above).astype(np.int32)


def _shifts(part: int) -> NDArray[np.int64]:
    return part * np.arange(8 // part)
