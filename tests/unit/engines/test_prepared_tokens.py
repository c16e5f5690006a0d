"""Content and order of prepared tokens; padding does not change the loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from support.training import write_tokens

from kolotune.engines.native.model import TransformersModel
from kolotune.engines.native.padded_batch import pad_batch
from kolotune.engines.prepared_tokens import IGNORED, PreparedTokens, epoch_order, epoch_steps, longest_first
from kolotune.engines.training_length import TrainingLength
from kolotune.foundation.errors import TrainingError

CHATS = [
    ([5, 6, 7, 8], [0, 0, 1, 1]),
    ([9, 10], [0, 1]),
    ([11, 12, 13, 14, 15, 16], [0, 1, 0, 0, 1, 1]),
    ([17, 18, 19], [1, 1, 0]),
    ([20, 21, 22], [0, 0, 1]),
]


@pytest.fixture
def tokens(tmp_path: Path) -> PreparedTokens:
    path = tmp_path / "tokens.safetensors"
    save_file(
        {
            "ids": np.array([each for ids, _ in CHATS for each in ids], np.int32),
            "labelled": np.array([each for _, flags in CHATS for each in flags], np.uint8),
            "offsets": np.cumsum([0, *(len(ids) for ids, _ in CHATS)], dtype=np.int64),
        },
        path,
    )
    return PreparedTokens.load(path)


def test_a_chat_is_what_was_written(tokens: PreparedTokens) -> None:
    assert len(tokens) == len(CHATS)
    for index, (ids, flags) in enumerate(CHATS):
        found, labels = tokens.sequence(index)
        assert found.tolist() == ids
        assert labels.tolist() == [each if flag else IGNORED for each, flag in zip(ids, flags, strict=True)]


def test_each_position_predicts_the_next_token(tokens: PreparedTokens) -> None:
    batch = pad_batch(tokens, [0, 2, 3])
    assert batch.tokens == 4 + 6 + 3
    predicted = {
        (row, int(position)): int(target)
        for row, targets in enumerate(batch.targets)
        for position, target in zip(batch.positions, targets, strict=True)
        if target != IGNORED
    }
    # The label on the first token of chat 3 is skipped: no token precedes it.
    assert predicted == {(0, 1): 7, (0, 2): 8, (1, 0): 12, (1, 3): 15, (1, 4): 16, (2, 0): 18}
    assert batch.labels == len(predicted)
    for row, index in enumerate((0, 2, 3)):
        ids = CHATS[index][0]
        assert batch.ids[row, : len(ids)].tolist() == ids


def test_a_label_on_the_first_token_alone_counts_nothing(tokens: PreparedTokens) -> None:
    batch = pad_batch(PreparedTokens(tokens.ids[:3], torch.tensor([True, False, False]), torch.tensor([0, 3])), [0])
    assert batch.labels == 0 and batch.positions.numel() == 0


@pytest.mark.parametrize(("size", "count"), [(1, 5), (2, 3), (4, 2), (12, 1)])
def test_an_epoch_holds_each_chat_once(size: int, count: int) -> None:
    steps = list(epoch_steps(len(CHATS), 3, 42, size))
    assert len(steps) == count == TrainingLength.of(len(CHATS), size, 1, 1, None).steps
    assert all(len(step) <= size for step in steps)
    assert [index for step in steps for index in step] == epoch_order(3, len(CHATS), 42)


@pytest.mark.parametrize("first", range(4))
def test_an_epoch_can_start_at_any_step(first: int) -> None:
    assert list(epoch_steps(len(CHATS), 1, 5, 2, first)) == list(epoch_steps(len(CHATS), 1, 5, 2))[first:]


def test_a_chat_is_counted_in_tokens_and_labels(tokens: PreparedTokens) -> None:
    assert [tokens.chat_length(index) for index in range(5)] == [4, 2, 6, 3, 3] and tokens.longest == 6
    assert [tokens.label_count(index) for index in range(5)] == [2, 1, 3, 1, 1]


def test_a_chat_may_have_several_sequences(tmp_path: Path) -> None:
    second = [([1, 2, 3, 4], [0, 0, 1, 1]), ([1, 2, 5, 6, 7], [0, 0, 0, 0, 1]), ([1, 2, 5, 8], [0, 1, 0, 1])]
    write_tokens(tmp_path / "tokens", [CHATS[0], second, CHATS[1]])
    tokens = PreparedTokens.load(tmp_path / "tokens")
    assert len(tokens) == 3 and list(map(list, map(tokens.sequences, range(3)))) == [[0], [1, 2, 3], [4]]
    assert [tokens.sequence(number)[0].tolist() for number in tokens.sequences(1)] == [ids for ids, _ in second]
    assert [tokens.unshared_length(index) for index in range(3)] == [4, 13, 2] and tokens.longest == 5
    assert [tokens.chat_length(index) for index in range(3)] == tokens.chat_lengths().tolist() == [4, 2 + 2 + 4, 2]
    assert [tokens.label_count(index) for index in range(3)] == [2, 5, 1]
    assert longest_first(tokens) == [1, 0, 2]


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    orders = {(seed, epoch): tuple(epoch_order(epoch, 30, seed)) for seed in (0, 1, 2**32 - 1) for epoch in range(3)}
    assert len(set(orders.values())) == len(orders)
    torch.manual_seed(99)
    assert orders == {key: tuple(epoch_order(key[1], 30, key[0])) for key in orders}


def test_evaluation_sees_every_chat_longest_first(tokens: PreparedTokens) -> None:
    assert longest_first(tokens) == [2, 0, 3, 4, 1]


@pytest.mark.parametrize("damage", ["cut", "missing", "another"])
def test_a_damaged_file_is_reported(tmp_path: Path, tokens: PreparedTokens, damage: str) -> None:
    path = tmp_path / "tokens.safetensors"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-3])
    elif damage == "missing":
        path.unlink()
    else:
        save_file({"ids": np.zeros(3, np.int32)}, path)
    with pytest.raises(TrainingError, match=r"tokens\.safetensors") as caught:
        PreparedTokens.load(path)
    assert "prepare" in caught.value.hint


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma"])
def test_padding_never_changes_the_loss(kind: str, make_training: Callable[..., Any]) -> None:
    job = make_training(kind).job()
    model, tokens = TransformersModel(job, "cpu"), PreparedTokens.load(Path(job.data) / "train.safetensors")
    lengths = [tokens.chat_length(index) for index in range(8)]
    assert min(lengths) < max(lengths)
    whole = float(model.loss(tokens, range(8)))
    assert whole == pytest.approx(sum(float(model.loss(tokens, [index])) for index in range(8)), rel=1e-5)
