"""Pack pieces of documents into sequences of full length.

Best fit, the longest piece first, as in "Fewer Truncations Improve Language Modeling" (Ding et al., 2024): no piece is
cut for it, and little of a sequence stays empty. Pieces that share a sequence don't see each other.
"""

from __future__ import annotations

import bisect

import numpy as np


def pack_pieces(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Return the pieces of each packed sequence, as indices.

    Args:
        lengths: int ``[pieces]``: the tokens of each, at most `capacity`.
        capacity: The most tokens of a packed sequence.
    """
    packed: list[list[int]] = []
    with_space: dict[int, list[int]] = {}  # by the tokens that are left
    spaces: list[int] = []  # the keys of that, ascending
    for piece in np.argsort(-lengths.astype(np.int64), kind="stable").tolist():
        length = int(lengths[piece])
        at = bisect.bisect_left(spaces, length)
        if at == len(spaces):
            left, number = capacity, len(packed)
            packed.append([])
        else:
            left = spaces[at]
            number = with_space[left].pop()
            if not with_space[left]:
                del with_space[left], spaces[at]
        packed[number].append(piece)
        if left > length:
            if left - length not in with_space:
                bisect.insort(spaces, left - length)
            with_space.setdefault(left - length, []).append(number)
    return packed
