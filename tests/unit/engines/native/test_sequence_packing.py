"""How chats are packed, and how many tokens and logits they cost."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.training import write_tokens

from kolotune.engines.native.sequence_packing import costs, group_by_length, pack
from kolotune.engines.prepared_tokens import PreparedTokens

PREFIX = list(range(10))
CHATS = [
    ([*PREFIX, 20, 21, 22], [0] * 11 + [1, 1]),
    ([*PREFIX, 30, 31, 32, 33, 34], [0] * 11 + [1, 0, 1, 0]),
    ([*PREFIX, 40], [0] * 11),
]


@pytest.mark.parametrize(("share", "prefix"), [(True, 10), (False, 0)])
def test_a_shared_prefix_and_tokens_after_the_last_label_cost_nothing(tmp_path: Path, share: bool, prefix: int) -> None:
    file = tmp_path / "train.safetensors"
    write_tokens(file, CHATS)
    # For each chat the tokens before its last label, and one logit per label; the third chat has no label.
    expected = {0: 12 - prefix + 2 * 0.5, 1: 13 - prefix + 2 * 0.5, 2: 0}
    assert costs(PreparedTokens.load(file), range(3), share, 0.5) == expected


def test_what_sequences_of_a_chat_share_costs_once(tmp_path: Path) -> None:
    """Two sequences share 12 tokens; a chat's tokens are counted alike in groups, costs and packed sequences."""
    several = [
        ([*PREFIX, 20, 21, 50, 51, 52], [0] * 13 + [1, 1]),
        ([*PREFIX, 20, 21, 22, 23, 24, 25], [0] * 15 + [1]),
    ]
    file = tmp_path / "train.safetensors"
    write_tokens(file, [several, CHATS[1]])
    tokens = PreparedTokens.load(file)
    assert costs(tokens, range(2), True, 0.0) == {0: (15 - 10) + (14 - 12), 1: 13 - 10}
    assert costs(tokens, range(2), False, 0.0) == {0: 15 + 14, 1: 13}
    assert group_by_length(tokens, range(2), True, 16 + 3 + 15) == [[0, 1]]
    assert group_by_length(tokens, range(2), False, 16 + 3 + 15) == [[0], [1]]
    packed = pack(tokens, range(2), True)
    assert packed.prefix == 10 and packed.lengths == (5, 2, 3) and packed.labels == 5
    assert packed.positions.tolist() == [*range(10), *range(10, 15), 12, 13, 10, 11, 12]
    assert [front.tolist() for front in packed.fronts] == [list(range(10)), list(range(12)), list(range(10))]
    shape = packed.batch_shape(unpadded=True)
    assert (shape.tokens, shape.chats, shape.longest, shape.padded) == (20, 4, 15, False)
    # Each of the prefix's tokens is seen by three others, and two of the trunk's by its branch.
    assert shape.shared == 10 * 4 + 2 * 2


def test_a_chat_without_labels_alone_can_be_packed(tmp_path: Path) -> None:
    write_tokens(tmp_path / "train.safetensors", [[CHATS[2], CHATS[2]]])
    packed = pack(PreparedTokens.load(tmp_path / "train.safetensors"), [0], True)
    assert packed.labels == 0 and len(packed.ids) == 11
