"""How the blocks of ggml's types hold their quants: put others into a block whose scales stay as they are.

Each type's value is one of a few levels, chosen by a whole number, the quant. ggml makes the blocks with their scales,
and says what a block's values are (`stored_values`); here is only which bits hold the quants. Tests compare with ggml.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    Write = Callable[[np.ndarray, np.ndarray], None]


@dataclass(frozen=True)
class BlockLayout:
    """The quants of a type.

    Attributes:
        levels: how many there are.
        is_linear: the levels are at equal distances.
        write: puts quants, uint8 ``[blocks, weights]``, into blocks, uint8 ``[blocks, bytes]``, in place.
    """

    levels: int
    is_linear: bool
    write: Write


def _nibbles(start: int, size: int = 16) -> Write:
    """The first half of the weights in the low four bits, the second half in the high ones; `size` bytes together."""

    def write(blocks: np.ndarray, quants: np.ndarray) -> None:
        pairs = (quants & 15).reshape(len(quants), -1, 2, size)
        blocks[:, start : start + quants.shape[1] // 2] = (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(
            len(quants), -1
        )

    return write


def _fifth_bits(start: int) -> Write:
    """The fifth bits of 32 quants in four bytes, behind which are the nibbles."""
    import numpy as np

    nibbles = _nibbles(start + 4)

    def write(blocks: np.ndarray, quants: np.ndarray) -> None:
        blocks[:, start : start + 4] = np.packbits(quants >> 4, axis=1, bitorder="little")
        nibbles(blocks, quants)

    return write


def _together(parts: np.ndarray, bits: int) -> np.ndarray:
    """Put the parts, ``[blocks, parts, bytes]``, of some bits each, side by side into bytes; the first one lowest."""
    joined = parts[:, 0].copy()
    for number in range(1, parts.shape[1]):
        joined |= parts[:, number] << bits * number
    return joined


def _q8_0(blocks: np.ndarray, quants: np.ndarray) -> None:
    blocks[:, 2:] = quants - 128  # int8, whose sign wraps in uint8


def _q3_k(blocks: np.ndarray, quants: np.ndarray) -> None:
    parts = quants.reshape(-1, 2, 4, 32)
    low, high = parts & 3, (parts >> 2).reshape(-1, 8, 32)
    blocks[:, :32] = _together(high, 1)
    blocks[:, 32:96] = _together(low.reshape(-1, 4, 32), 2).reshape(-1, 64)


def _q5_k(blocks: np.ndarray, quants: np.ndarray) -> None:
    high = (quants >> 4).reshape(-1, 8, 32)
    blocks[:, 16:48] = _together(high, 1)
    _nibbles(48, 32)(blocks, quants)


def _q6_k(blocks: np.ndarray, quants: np.ndarray) -> None:
    parts = quants.reshape(-1, 2, 4, 32)
    low, high = parts & 15, parts >> 4
    blocks[:, :128] = (low[:, :, :2] | low[:, :, 2:] << 4).reshape(-1, 128)
    blocks[:, 128:192] = _together(high.reshape(-1, 4, 32), 2).reshape(-1, 64)


def block_layouts() -> dict[str, BlockLayout]:
    """Return the layouts by the names of the types."""
    return {
        "Q4_0": BlockLayout(16, True, _nibbles(2)),
        "Q4_1": BlockLayout(16, True, _nibbles(4)),
        "Q5_0": BlockLayout(32, True, _fifth_bits(2)),
        "Q5_1": BlockLayout(32, True, _fifth_bits(4)),
        "Q8_0": BlockLayout(256, True, _q8_0),
        "Q3_K": BlockLayout(8, True, _q3_k),
        "Q4_K": BlockLayout(16, True, _nibbles(16, 32)),
        "Q5_K": BlockLayout(32, True, _q5_k),
        "Q6_K": BlockLayout(64, True, _q6_k),
        "IQ4_NL": BlockLayout(16, False, _nibbles(2)),
        "IQ4_XS": BlockLayout(16, False, _nibbles(8)),
    }
