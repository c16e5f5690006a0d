"""Operations are counted as the issue's definition says: held against counts by hand on a tiny model."""

from __future__ import annotations

import torch
from operations import Needed, Probe, Shape, needed, shared_beginning

# One layer: width 4, two query heads and one key head of 2, hidden 6, vocabulary 10, adapters of rank 1 on q alone.
TINY = Shape(width=4, hidden=6, layers=1, queries=2, keys=1, head=2, vocabulary=10, rank=1, targets=("q_proj",))
WEIGHTS = 4 * 4 + 4 * 2 + 4 * 2 + 4 * 4 + 4 * 6 + 4 * 6 + 6 * 4  # q, k, v, o, gate, up, down


def test_one_chat_by_hand() -> None:
    # Five tokens, labels on the third and fourth: what stands behind the third's place is not needed.
    found = needed(TINY, [([1, 2, 3, 4, 5], [False, False, True, True, False])])
    pairs = 1 + 2 + 3
    # In the only layer, the first and the last: the first place is read by nobody but for its key and value.
    spared = 4 * (WEIGHTS - 2 * 4 * 2) + 6 * (4 + 4) + 12 * 2 * 2 * 1 + 2 * (4 * 4 + 2 * 4 * 2) * 3
    assert found == Needed(
        weights=4 * WEIGHTS * 3, head=4 * 4 * 10 * 2, adapters=6 * (4 + 4) * 3, attention=12 * 2 * 2 * pairs,
        spared=spared, rows=3, labels=2,
    )  # fmt: skip
    assert found.all == found.weights + found.head + found.adapters + found.attention


def test_a_shared_beginning_is_counted_once() -> None:
    # Both begin with 7 8; of each chat three and four tokens are needed. A first token's label counts nowhere.
    chats = [([7, 8, 1, 2], [True, False, False, True]), ([7, 8, 3, 4, 5], [False, False, False, True, True])]
    found = needed(TINY, chats)
    assert (found.rows, found.labels) == (2 + 1 + 2, 3)
    assert found.attention == 12 * 2 * 2 * ((1 + 2) + 3 + (3 + 4))


def test_a_chat_that_is_alone_shares_nothing() -> None:
    assert shared_beginning([[1, 2, 3]]) == 0
    assert shared_beginning([[1, 2], [1, 2, 3]]) == 2
    assert shared_beginning([[1], [2]]) == 0


def test_all_layers_and_adapters_count() -> None:
    all_linear = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    deep = Shape(4, 6, 3, 2, 1, 2, 10, 2, all_linear)
    one, three = needed(TINY, [([1, 2, 3], [False, True, True])]), needed(deep, [([1, 2, 3], [False, True, True])])
    assert three.weights == 3 * one.weights and three.head == one.head and three.attention == 3 * one.attention
    assert three.adapters == 6 * 3 * 2 * (8 + 6 + 6 + 8 + 10 + 10 + 10) * 2


def test_the_probe_multiplies_what_a_step_does() -> None:
    probe = Probe(TINY, rows=5, labels=3, dtype=torch.float32)
    assert probe.operations == 4 * WEIGHTS * 5 + 4 * 4 * 10 * 3  # without adapters and attention
    assert probe.rate() > 0
