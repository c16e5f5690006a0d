"""The contenders of the measurement on GPUs compute the same: here a tiny model on the CPU."""

from __future__ import annotations

from pathlib import Path

import gpu
import pytest
from gpu_contenders import CONTENDERS, Task, run

from kolotune.engines.prepared_tokens import PreparedTokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    gpu._write_model(gpu._TINY, folder / "base")
    gpu._write_chats(folder / "data", [gpu._length() for _ in range(12)], gpu._TINY.sizes["vocab_size"])
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, float]:
    return run(Task("kolotune bf16", str(folder), 6, 2))


@pytest.mark.parametrize(
    "contender",
    ["kolotune 4 bits", "peft padded, 8 chats", "peft padded, 32 chats, recomputing", "peft padding-free, SDPA"],
)
def test_a_contender_trains_the_same_chats(contender: str, folder: Path, expected: dict[str, float]) -> None:
    assert not CONTENDERS[contender]
    found = run(Task(contender, str(folder), 6, 2))
    tokens = PreparedTokens.load(folder / "data" / "train.safetensors")
    assert 0 < found["tokens"] < len(tokens.ids) and found["labels"] == pytest.approx(found["tokens"] / 2, rel=0.1)
    assert found["tokens_per_second"] == pytest.approx(found["tokens"] / found["seconds"])
    assert found["first_loss"] == pytest.approx(expected["first_loss"], rel=0.002)
    assert found["last_loss"] == pytest.approx(expected["last_loss"], rel=0.002)


def test_operations_by_hand() -> None:
    # Two layers: q and o of 64 x 64, k and v of 32 x 64, three matrices of 128 x 64.
    assert gpu._TINY.operations == (4 * 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64), 4 * 64 * 512)


def test_lengths_are_those_of_the_docstring_chats() -> None:
    lengths = [gpu._length() for _ in range(5_000)]
    assert min(lengths) >= 48 and max(lengths) <= 368
    assert sum(lengths) / len(lengths) == pytest.approx(98, rel=0.05)
