"""Counted operations, compared with counts by hand for a tiny model."""

from __future__ import annotations

import torch
from operations import MatrixProbe, Operations, Shape, count_operations, shared_prefix

# One layer: width 4, two query heads and one key head of 2, hidden 6, vocabulary 10, adapters of rank 1 on q alone.
TINY = Shape(width=4, hidden=6, layers=1, queries=2, keys=1, head=2, vocabulary=10, rank=1, targets=("q_proj",))
WEIGHTS = 4 * 4 + 4 * 2 + 4 * 2 + 4 * 4 + 4 * 6 + 4 * 6 + 6 * 4  # q, k, v, o, gate, up, down


def test_one_chat_by_hand() -> None:
    # Five tokens with labels on the third and fourth: tokens after the third are not needed.
    counted = count_operations(TINY, [([1, 2, 3, 4, 5], [False, False, True, True, False])])
    pairs = 1 + 2 + 3
    # The only layer is the first and the last: of the first position only key and value are needed.
    unneeded = 4 * (WEIGHTS - 2 * 4 * 2) + 6 * (4 + 4) + 12 * 2 * 2 * 1 + 2 * (4 * 4 + 2 * 4 * 2) * 3
    assert counted == Operations(
        weights=4 * WEIGHTS * 3, head=4 * 4 * 10 * 2, adapters=6 * (4 + 4) * 3, attention=12 * 2 * 2 * pairs,
        unneeded=unneeded, rows=3, labels=2,
    )  # fmt: skip
    assert counted.all == counted.weights + counted.head + counted.adapters + counted.attention


def test_a_shared_prefix_is_counted_once() -> None:
    # Both start with 7 8; three and four of their tokens are needed. A label on the first token does not count.
    chats = [([7, 8, 1, 2], [True, False, False, True]), ([7, 8, 3, 4, 5], [False, False, False, True, True])]
    counted = count_operations(TINY, chats)
    assert (counted.rows, counted.labels) == (2 + 1 + 2, 3)
    assert counted.attention == 12 * 2 * 2 * ((1 + 2) + 3 + (3 + 4))


def test_a_single_chat_shares_nothing() -> None:
    assert shared_prefix([[1, 2, 3]]) == 0
    assert shared_prefix([[1, 2], [1, 2, 3]]) == 2
    assert shared_prefix([[1], [2]]) == 0


def test_all_layers_and_adapters_count() -> None:
    all_linear = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    deep = Shape(4, 6, 3, 2, 1, 2, 10, 2, all_linear)
    one, three = (
        count_operations(TINY, [([1, 2, 3], [False, True, True])]),
        count_operations(deep, [([1, 2, 3], [False, True, True])]),
    )
    assert three.weights == 3 * one.weights and three.head == one.head and three.attention == 3 * one.attention
    assert three.adapters == 6 * 3 * 2 * (8 + 6 + 6 + 8 + 10 + 10 + 10) * 2


def test_the_probe_computes_the_products_of_a_step() -> None:
    probe = MatrixProbe(TINY, rows=5, labels=3, dtype=torch.float32)
    assert probe.operations == 4 * WEIGHTS * 5 + 4 * 4 * 10 * 3  # without adapters and attention
    assert probe.rate() > 0
