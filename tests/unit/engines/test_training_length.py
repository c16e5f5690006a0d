"""The number of warmup steps, and the default number of chats per step."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.training import write_tokens

from kolotune.engines.training_length import automatic_batch_size, warmup
from kolotune.foundation.errors import TrainingError


@pytest.mark.parametrize(
    ("steps", "requested", "expected"),
    [(0, None, 0), (9, None, 0), (50, None, 5), (5000, None, 100), (50, 0, 0), (5, 8, 8)],
)
def test_warmup_is_a_tenth_of_the_steps_unless_requested(steps: int, requested: int | None, expected: int) -> None:
    assert warmup(steps, requested) == expected


@pytest.mark.parametrize(
    ("chats", "length", "expected"),
    [(10, 20, 4), (400, 20, 4), (1000, 20, 10), (9000, 20, 50), (9000, 2000, 4), (9000, 100, 10)],
)
def test_the_batch_size_depends_on_the_chats(chats: int, length: int, expected: int, tmp_path: Path) -> None:
    write_tokens(tmp_path / "train.safetensors", [([1] * length, [1] * length)] * chats)
    assert automatic_batch_size(tmp_path / "train.safetensors", "sft") == expected


def test_the_batch_size_counts_chats_not_their_sequences(tmp_path: Path) -> None:
    write_tokens(tmp_path / "train.safetensors", [[([1] * 10, [1] * 10)] * 2] * 1000)
    assert automatic_batch_size(tmp_path / "train.safetensors", "sft") == 10


def test_a_damaged_file_is_reported(tmp_path: Path) -> None:
    (tmp_path / "train.safetensors").write_bytes(b"none")
    with pytest.raises(TrainingError, match=r"train\.safetensors"):
        automatic_batch_size(tmp_path / "train.safetensors", "sft")
