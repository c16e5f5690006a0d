"""Log-probabilities of the compared chats, kept in ``.npy`` files while a comparison lasts.

One file holds fp32 ``[positions, vocabulary]``: the positions of all chats, one chat after another.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kolotune.foundation.free_memory import release_mapped

from .tasks import ComparedChat

if TYPE_CHECKING:
    import numpy as np


def write(path: Path, chats: Sequence[ComparedChat], by_chat: Iterable[tuple[int, np.ndarray]]) -> np.ndarray:
    """Write the log-probabilities of each chat, as they come with its index; return the whole array, memory-mapped."""
    import numpy as np

    ends = list(itertools.accumulate(len(chat.positions) for chat in chats))
    written: np.ndarray | None = None
    count = 0
    for number, array in by_chat:
        if written is None:
            written = np.lib.format.open_memmap(path, "w+", np.float32, (ends[-1], array.shape[1]))
        part = written[ends[number] - len(array) : ends[number]]
        part[:] = array
        release(part)
        count += len(array)
        del array, part  # before the next ones are computed
    assert written is not None and count == ends[-1]
    return written


def release(array: np.ndarray) -> None:
    """Let go of an array's memory until it is read again from its file."""
    release_mapped(array.ctypes.data, array.nbytes)


def load(path: Path) -> np.ndarray:
    """Return the array in a file that `write` made, memory-mapped."""
    import numpy as np

    loaded: np.ndarray = np.load(path, mmap_mode="r")
    return loaded


def split(array: np.ndarray, chats: Sequence[ComparedChat]) -> Iterator[tuple[np.ndarray, ComparedChat]]:
    """Yield the log-probabilities of each chat, with the chat."""
    start = 0
    for chat in chats:
        yield array[start : start + len(chat.positions)], chat
        start += len(chat.positions)


def losses_of(chats: Sequence[ComparedChat], by_chat: Iterable[tuple[int, np.ndarray]]) -> list[float]:
    """Return the loss of each chat, given the log-probabilities of each as they come with its index."""
    losses = [0.0] * len(chats)
    for number, array in by_chat:
        losses[number] = loss_of(array, chats[number])
        del array  # before the next ones are computed
    return losses


def loss_of(array: np.ndarray, chat: ComparedChat) -> float:
    """Return the loss of a chat, summed over its trained tokens, by their weights."""
    import numpy as np

    targets = [chat.ids[position + 1] for position in chat.positions]
    found = array[np.arange(len(targets)), targets]
    if chat.weights is not None:
        found = found * np.asarray(chat.weights)
    return -float(found.sum(dtype=np.float64))
