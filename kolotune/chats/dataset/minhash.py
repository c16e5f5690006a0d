"""MinHash: find in linear time which pairs of texts may be similar.

Each text gets a signature of 80 numbers, split into 16 bands of 5. Two texts that share 80% of their shingles have a
band in common in 998 of 1000 cases. The bands are sorted columns of numbers, not tables of a library, which need
several times the memory (datasketch: 2.5 KB a chat).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

BANDS, _BAND_SIZE = 16, 5
_MIX = 0x9E3779B97F4A7C15


def factors() -> np.ndarray:
    """Return the odd numbers, one for each number of a signature, that `signatures` multiplies with."""
    return np.random.default_rng(0).integers(0, 2**63, BANDS * _BAND_SIZE, dtype=np.uint64) * 2 + 1


def signatures(shingles: np.ndarray, sizes: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Return for each factor the lowest of a text's shingles multiplied by it (their upper 32 bits).

    Args:
        shingles: Those of all texts, one text after another.
        sizes: How many each text has.
        factors: Odd numbers.

    Returns:
        uint32 ``[texts, factors]``; the highest number for a text without shingles.
    """
    out = np.full((len(sizes), len(factors)), 0xFFFFFFFF, np.uint32)
    if len(shingles):
        first, filled = starts(sizes), sizes > 0
        for column, factor in enumerate(factors):
            hashed = (shingles * factor >> np.uint64(32)).astype(np.uint32)
            out[filled, column] = np.minimum.reduceat(hashed, first[filled])
    return out


def starts(sizes: np.ndarray) -> np.ndarray:
    """Return where each of several consecutive parts of these sizes starts."""
    return np.concatenate(([0], np.cumsum(sizes)[:-1]))


def bands(signatures: np.ndarray) -> np.ndarray:
    """Return each band of the signatures as 32 bits that are not 0: uint32 ``[texts, BANDS]``."""
    mixed = np.zeros((len(signatures), BANDS), np.uint64)
    for number in range(_BAND_SIZE):
        mixed = mixed * np.uint64(_MIX) + signatures[:, number::_BAND_SIZE]
    return (mixed >> np.uint64(32) | np.uint64(1)).astype(np.uint32)


def buckets(bands: np.ndarray) -> Iterator[list[int]]:
    """Yield groups of texts that have a band in common, each group in rising order; a band of 0 counts for nothing."""
    for band in bands.T:
        order = np.argsort(band, kind="stable")
        order = order[band[order] != 0]
        values = band[order]
        ends = np.flatnonzero(np.diff(values)) + 1
        first = np.concatenate(([0], ends))
        sizes = np.diff(np.concatenate((first, [len(order)])))
        for start, size in zip(first[sizes > 1].tolist(), sizes[sizes > 1].tolist(), strict=True):
            yield order[start : start + size].tolist()
