"""The tokens of chats with several sequences, however many are compared at once."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest

from kolotune.engines import chat_sequences
from kolotune.engines.chat_sequences import chat_lengths


def plainly(chats: list[list[list[int]]]) -> list[int]:
    """Count the tokens of each chat one by one."""
    lengths = []
    for sequences in chats:
        total = sum(map(len, sequences))
        for one, following in pairwise(sequences):
            shared = 0
            while shared < min(len(one), len(following)) and one[shared] == following[shared]:
                shared += 1
            total -= shared
        lengths.append(total)
    return lengths


@pytest.mark.parametrize("at_once", [1, 7, 1_000_000])
@pytest.mark.parametrize("seed", range(4))
def test_a_shared_prefix_counts_once(seed: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_sequences, "_COMPARED_AT_ONCE", at_once)
    dice = random.Random(seed)
    chats = [
        [[dice.randrange(2) for _ in range(dice.randrange(8))] for _ in range(dice.randint(1, 4))] for _ in range(30)
    ]
    sequences = [each for chat in chats for each in chat]
    ids = np.array([token for each in sequences for token in each], np.int32)
    offsets, starts = (np.cumsum([0, *map(len, each)]) for each in (sequences, chats))
    assert chat_lengths(ids, offsets, starts).tolist() == plainly(chats)
    assert chat_lengths(ids, offsets, np.arange(len(offsets))).tolist() == list(map(len, sequences))


def test_no_chats_have_no_lengths() -> None:
    nothing = np.array([0])
    assert chat_lengths(np.array([], np.int32), nothing, nothing).tolist() == []
