"""Sequences are packed so that each is whole, and a common beginning is there once."""

from __future__ import annotations

import pytest

from kolotune.engines.native import shared_sequences
from kolotune.engines.native.shared_sequences import group_sequences, share

BEGIN = list(range(10, 22))
SEQUENCES = [[*BEGIN, 1, 2], [5, 6], [*BEGIN, 3], [*BEGIN, 1, 9, 9]]


def test_each_sequence_is_whole_and_the_beginning_is_there_once() -> None:
    shared = share(SEQUENCES)
    packed = shared.packed
    assert len(packed.ids) == sum(map(len, SEQUENCES)) - 2 * len(BEGIN)
    for sequence, path, front in zip(SEQUENCES, shared.paths, packed.fronts, strict=True):
        assert packed.ids[path].tolist() == sequence
        assert packed.positions[path].tolist() == list(range(len(sequence)))
        assert front.tolist() == path[: len(front)].tolist()
    assert shared.repeats[shared.paths[0], 0].tolist() == [3.0] * len(BEGIN) + [1.0] * 2


def test_sequences_of_other_kinds_share_nothing() -> None:
    packed = share(SEQUENCES, range(len(SEQUENCES))).packed
    assert packed.ids.tolist() == [token for sequence in SEQUENCES for token in sequence]


def test_equal_sequences_keep_a_token_each() -> None:
    assert share([BEGIN, BEGIN]).packed.lengths == (len(BEGIN), 1)


def test_groups_have_few_tokens_or_one_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_sequences, "_TOKENS_AT_ONCE", 20)
    assert list(group_sequences([[0] * 8, [0] * 8, [0] * 30, [0] * 20])) == [[0, 1], [2], [3]]
    assert list(group_sequences([])) == []
