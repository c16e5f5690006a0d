"""How many tokens and logits a group of chats costs."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.training import write_tokens

from kolotune.engines.native.sequence_packing import costs
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
