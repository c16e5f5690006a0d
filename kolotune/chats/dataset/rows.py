"""What is kept of each chat while a data set is prepared: a row of numbers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..templates.loss_mask import ApartReason

USED, TOO_LONG, REFUSED, UNDECIDED = range(4)
"""States of a chat."""
SPECIAL, REDUCED, HELD_OUT = 1, 2, 4
"""Flags of a chat: special tokens in its text, tool definitions that said more, selected to be held out."""
WEIGHTED = 64
"""Flag of a chat some of whose labels count less."""
AS_SERVED = 128
"""Flag of a chat whose tokens are llama.cpp's, and not those of transformers."""
APART = {ApartReason.OPENING: 8, ApartReason.HISTORY: 16, ApartReason.BOUNDARY: 32}
"""Flags of a chat that is several sequences, by the reason."""


class ChatRow(NamedTuple):
    """One chat in numbers.

    Attributes:
        hash, hash_too: The first 16 bytes of its hash.
        unread: A hash of what its record says beside the chat; 0 if nothing.
        line, source: Its line, and the number of its file.
        turns: The turns that were dropped since it is too long.
        state: `USED`, `TOO_LONG`, `REFUSED` or, where both answers of a pair are the same, `UNDECIDED`.
        flags: `SPECIAL`, `REDUCED`, `HELD_OUT`, `WEIGHTED`, `AS_SERVED` and those of `APART`, added up.
        tokens: The number of its tokens, in all its sequences.
        sequences: The number of its sequences.
        masked, dropped: Its empty thoughts that are not trained on, and its thoughts that later prompts leave out.
        rejected: How many of its sequences, the first ones, are of a rejected answer.
        record, features: The bytes that it has in these columns of the row store.
    """

    hash: int
    hash_too: int
    unread: int
    line: int
    source: int
    turns: int
    state: int
    flags: int
    tokens: int
    sequences: int
    masked: int
    dropped: int
    rejected: int
    record: int
    features: int


def row_type() -> np.dtype:
    """Return the type of a row on disk."""
    types = ("<u8", "<u8", "<u8", "<u8", "<u4", "<u4", "u1", "u1", "<u4", "<u4", "<u4", "<u4", "<u4", "<u4", "<u4")
    return np.dtype(list(zip(ChatRow._fields, types, strict=True)))
