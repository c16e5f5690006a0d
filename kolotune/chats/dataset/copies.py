"""Find exact copies among all chats by their hashes."""

from __future__ import annotations

import numpy as np


def find_copies(rows: np.ndarray, from_eval: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find chats that are equal.

    Args:
        rows: The row of each chat; see `ChatRow`.
        from_eval: bool ``[chats]``: it is from a file of held-out data.

    Returns:
        int ``[chats]``: for each chat the first chat of its part (training or held-out data) that equals it, which may
        be itself; and bool ``[chats]``: it is held out and also trained on.
    """
    order = np.lexsort((rows["hash_too"], rows["hash"]))  # stable: the training data comes first
    same = np.ones(len(rows), bool)
    for column in ("hash", "hash_too"):
        values = rows[column][order]
        same[1:] &= values[1:] == values[:-1]
    same[:1] = False
    first_of_all, part = _first_members(order, ~same), from_eval[order]
    same[1:] &= part[1:] == part[:-1]
    first = _first_members(order, ~same)
    return first, from_eval & ~from_eval[first_of_all] & (first == np.arange(len(rows)))


def _first_members(order: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Return the first member of each chat's group. Groups are consecutive in `order`, and start where `starts`."""
    first = np.empty_like(order)
    first[order] = order[np.flatnonzero(starts)][np.cumsum(starts) - 1]
    return first
