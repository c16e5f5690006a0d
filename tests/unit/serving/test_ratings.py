"""Ratings typed in a chat are records that preference objectives read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kolotune.chats.reading.files import read_chats
from kolotune.chats.reading.reading_options import ReadingOptions
from kolotune.foundation.errors import ConfigError
from kolotune.foundation.objectives import LearnsFrom
from kolotune.serving.ratings import keep, line_of

TURNS: list[dict[str, Any]] = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "When?"},
    {"role": "assistant", "content": "At nôon.", "reasoning_content": "It is noon."},
]


def kept(file: Path, typed: list[str]) -> Path:
    for each in typed:
        record = line_of(each, TURNS)
        assert record is not None
        keep(file, record)
    return file


def test_ratings_are_read_as_labelled_answers(tmp_path: Path) -> None:
    file = kept(tmp_path / "new" / "ratings.jsonl", ["/good", " /bad ", "/better At one."])
    read = read_chats([file], ReadingOptions(learns_from=LearnsFrom.RATED))
    assert not read.problems
    good, bad, pair = read.chats
    assert good.is_desirable and not bad.is_desirable
    assert [turn.content for turn in good.messages] == [turn["content"] for turn in TURNS]
    assert good.messages[-1].reasoning == "It is noon."
    assert pair.messages[-1].content == "At one." and pair.rejected[-1].content == "At nôon."


def test_better_answers_are_read_as_pairs(tmp_path: Path) -> None:
    read = read_chats(
        [kept(tmp_path / "pairs.jsonl", ["/better At  one."])], ReadingOptions(learns_from=LearnsFrom.PAIRS)
    )
    assert not read.problems
    (pair,) = read.chats
    assert [turn.role for turn in pair.messages] == ["system", "user", "assistant"]
    assert pair.messages[-1].content == "At  one."


@pytest.mark.parametrize("typed", ["good", "/goodbye", "/good morning", "What is /better?", "/"])
def test_other_lines_are_questions(typed: str) -> None:
    assert line_of(typed, TURNS) is None


@pytest.mark.parametrize(("typed", "turns"), [("/good", []), ("/bad", TURNS[:2]), ("/better", TURNS)])
def test_what_can_not_be_kept_is_refused(typed: str, turns: list[dict[str, Any]]) -> None:
    with pytest.raises(ConfigError):
        line_of(typed, turns)


def test_a_file_that_can_not_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be written"):
        keep(tmp_path, json.loads('{"a": 1}'))
