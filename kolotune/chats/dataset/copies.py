"""Find exact copies among all chats by their hashes."""

from __future__ import annotations

import numpy as np


def find_copies(rows: np.ndarray, from_eval: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find chats that are equal.

    Args:
        rows: The row of each chat; see `ChatRow`.
        from_eval: bool ``[chats]``: it is from a file of held-out data.

    Returns:
        int ``[chats]``: for each chat the first chat of its part (training or held-out data) whose record says the
        same, which may be itself; and bool ``[chats]``: it is held out and also trained on.
    """
    order = np.lexsort((rows["unread"], rows["hash_too"], rows["hash"]))  # stable: the training data comes first
    same_chat = _same_as_before(rows[order], "hash", "hash_too")
    part = from_eval[order]
    is_trained = np.zeros(len(rows), bool)
    groups = np.cumsum(~same_chat) - 1
    has_trained = np.zeros(len(rows), bool)
    np.logical_or.at(has_trained, groups, ~part)
    is_trained[order] = has_trained[groups]
    same = same_chat & _same_as_before(rows[order], "unread")
    same[1:] &= part[1:] == part[:-1]
    first = _first_members(order, ~same)
    return first, from_eval & is_trained & (first == np.arange(len(rows)))


def _same_as_before(rows: np.ndarray, *columns: str) -> np.ndarray:
    """Return for each row whether it has the values of the row before it."""
    same = np.ones(len(rows), bool)
    for column in columns:
        same[1:] &= rows[column][1:] == rows[column][:-1]
    same[:1] = False
    return same


def _first_members(order: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Return the first member of each chat's group. Groups are consecutive in `order`, and start where `starts`."""
    first = np.empty_like(order)
    first[order] = order[np.flatnonzero(starts)][np.cumsum(starts) - 1]
    return first
