"""Which chats are held out: decided by their content, so that adding chats moves no other."""

from __future__ import annotations

import numpy as np

# With this many chats, at least one is held out.
_ENOUGH_TO_HOLD_OUT = 20


def is_held_out(digest: bytes, share: float) -> bool:
    """Whether a chat's hash, as a fraction, is below `share`."""
    return int.from_bytes(digest) < share * 2**256


def final_split(held_out: np.ndarray, lowest: int, share: float) -> np.ndarray:
    """Decide which chats are held out, once all are known.

    If `is_held_out` selects none and there are at least 20 chats, the chat with the lowest hash is held out. If it
    leaves none to train on, none is held out.

    Args:
        held_out: bool ``[chats]``: `is_held_out` of each.
        lowest: The chat with the lowest hash.
        share: The share to hold out.

    Returns:
        bool ``[chats]``.
    """
    held_out = held_out.copy()
    if not held_out.any() and share > 0 and len(held_out) >= _ENOUGH_TO_HOLD_OUT:
        held_out[lowest] = True
    if held_out.all():
        held_out[:] = False
    return held_out
