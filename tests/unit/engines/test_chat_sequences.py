"""The tokens of chats with several sequences, however many are compared at once."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
import torch

from kolotune.engines import chat_sequences
from kolotune.engines.chat_sequences import chat_lengths
from kolotune.engines.native.branches import branches_of
from kolotune.engines.prepared_tokens import IGNORED


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
    labelled = np.zeros(len(ids), np.uint8)
    assert chat_lengths(ids, labelled, offsets, starts).tolist() == plainly(chats)
    assert chat_lengths(ids, labelled, offsets, np.arange(len(offsets))).tolist() == list(map(len, sequences))


@pytest.mark.parametrize("seed", range(4))
def test_no_token_that_predicts_two_labels_is_shared(seed: int) -> None:
    """What the step computes of two sequences is what their lengths say."""
    dice = random.Random(seed)
    chats = [[[dice.randrange(2) for _ in range(dice.randint(2, 8))] for _ in range(2)] for _ in range(30)]
    labels = [[[False, *(dice.random() < 0.5 for _ in each[1:-1]), True] for each in chat] for chat in chats]
    ids, labelled = (
        np.array([value for chat in values for each in chat for value in each], np.int32) for values in (chats, labels)
    )
    offsets = np.cumsum([0, *(len(each) for chat in chats for each in chat)])
    computed = []
    for chat, flags in zip(chats, labels, strict=True):
        sequences = [
            (torch.tensor(each), torch.where(torch.tensor(flag), torch.tensor(each), IGNORED), None)
            for each, flag in zip(chat, flags, strict=True)
        ]
        _, branch = branches_of(sequences, share=True)
        computed.append(sum(map(len, chat)) - branch.shared)
    lengths = chat_lengths(ids, labelled, offsets, np.arange(0, len(offsets), 2)).tolist()
    # A sequence ends before its last label, so what is shared may be one token less.
    assert all(length in (tokens, tokens - 1) for length, tokens in zip(lengths, computed, strict=True))


def test_no_chats_have_no_lengths() -> None:
    nothing = np.array([0])
    assert chat_lengths(np.array([], np.int32), np.array([], np.uint8), nothing, nothing).tolist() == []
