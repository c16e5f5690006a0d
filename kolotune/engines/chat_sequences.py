"""How long chats are whose answers are sequences of their own.

Each sequence of such a chat is a prompt and its answer, in the order of the chat, and mostly begins as the next one
does. What a sequence shares with the next one counts once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

_COMPARED_AT_ONCE = 1_000_000  # tokens


def chat_lengths(ids: np.ndarray, labelled: np.ndarray, offsets: np.ndarray, chats: np.ndarray) -> np.ndarray:
    """Return the tokens of each chat, int64 ``[chats]``; a prefix that two sequences share counts once.

    Args:
        ids: the tokens of all sequences, end to end; `offsets` may begin anywhere in them.
        labelled: for each token whether it is a label: no token that predicts two of them is shared.
        offsets: int64 ``[sequences + 1]``: the start of each sequence, and the end of the last.
        chats: int64 ``[chats + 1]``: the first sequence of each chat, and the number of sequences.
    """
    import numpy as np

    own = np.diff(offsets)
    has_next = np.ones(len(own), bool)
    has_next[chats[1:] - 1] = False
    for numbers in _slices(np.flatnonzero(has_next), own):
        own[numbers] -= _shared_with_next(ids, labelled, offsets, numbers)
    return np.asarray(np.add.reduceat(own, chats[:-1]) if len(chats) > 1 else own)


def _slices(numbers: np.ndarray, lengths: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the sequences some at a time, so that comparing them takes little memory."""
    import numpy as np

    limits = np.cumsum(lengths[numbers]) // _COMPARED_AT_ONCE
    yield from np.split(numbers, np.flatnonzero(np.diff(limits)) + 1)


def _shared_with_next(ids: np.ndarray, labelled: np.ndarray, offsets: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Return how many tokens from its start each of some sequences has in common with the next sequence."""
    import numpy as np

    starts, following = offsets[numbers], offsets[numbers + 1]
    counts = np.minimum(following - starts, offsets[numbers + 2] - following)
    shared = counts.copy()
    compared = np.flatnonzero(counts)  # the others are empty
    if len(compared):
        counts = counts[compared]
        firsts = np.cumsum(counts) - counts
        within = np.arange(counts.sum()) - np.repeat(firsts, counts)
        left, right = (np.repeat(each[compared], counts) + within for each in (starts, following))
        last = np.repeat(counts, counts) - 1  # of the shorter sequence: what follows is none of its labels
        following = np.minimum(left + 1, len(ids) - 1), np.minimum(right + 1, len(ids) - 1)
        predicts_both = (within < last) & (labelled[following[0]] != 0) & (labelled[following[1]] != 0)
        same_up_to = np.where((ids[left] != ids[right]) | predicts_both, within, last + 1)
        shared[compared] = np.minimum.reduceat(same_up_to, firsts)
    return np.asarray(shared)
