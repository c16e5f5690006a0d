"""Packed sequences: nothing is lost or cut, and they are nearly full."""

from __future__ import annotations

import numpy as np
import pytest

from kolotune.chats.dataset.packing import pack_pieces


@pytest.mark.parametrize("seed", range(5))
def test_every_piece_is_packed_once_and_sequences_are_nearly_full(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(2, 257, 2000)
    packed = pack_pieces(lengths, 256)
    assert sorted(piece for sequence in packed for piece in sequence) == list(range(2000))
    filled = [int(lengths[sequence].sum()) for sequence in packed]
    assert max(filled) <= 256 and sum(filled) / (256 * len(packed)) > 0.97


def test_the_fullest_sequence_with_space_is_taken() -> None:
    assert pack_pieces(np.array([5, 9, 4, 1, 6]), 10) == [[1, 3], [4, 2], [0]]
    assert pack_pieces(np.array([], np.int64), 10) == []
