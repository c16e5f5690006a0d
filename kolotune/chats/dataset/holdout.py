"""Which chats are held out: decided by their content, so that adding chats moves no other."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

# From so many chats on, at least one is held out.
_ENOUGH_TO_HOLD_OUT = 20


def is_held_out(digest: bytes, share: float) -> bool:
    """Whether a chat's hash, as a fraction, is below `share`."""
    return int.from_bytes(digest) < share * 2**256


def settled(held_out: np.ndarray, lowest: int, share: float) -> np.ndarray:
    """The chats that are held out, when all are known.

    When `is_held_out` leaves none and there are at least 20 chats, the one with the lowest hash is held out; when it
    leaves none to train on, none is.

    Args:
        held_out: bool ``[chats]``: what `is_held_out` says of each.
        lowest: the chat with the lowest hash.
        share: the share that is wanted.

    Returns:
        bool ``[chats]``.
    """
    held_out = held_out.copy()
    if not held_out.any() and share > 0 and len(held_out) >= _ENOUGH_TO_HOLD_OUT:
        held_out[lowest] = True
    if held_out.all():
        held_out[:] = False
    return held_out
