"""Lists under keys of turns that are no turns, beside a question and its answer or alone."""

from __future__ import annotations

from typing import Any

import pytest
from support.documented_chats import turns_shown

from kolotune.chats.reading.faults import FaultKind
from kolotune.chats.reading.reading_options import ReadingOptions
from kolotune.chats.reading.record_keys import RecordPart
from kolotune.chats.reading.shapes import read_record

PAIR = {"question": "q", "answer": "a"}
TURNS = [{"role": "user", "content": "r"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize("key", ["items", "data", "contents", "turns", "dialogue", "messages"])
@pytest.mark.parametrize(
    "value",
    [["milk", "eggs"], [["milk", "2"], ["eggs", "3"]], [{"name": "milk"}, {"name": "eggs"}], "User: x\nAssistant: y"],
    ids=["texts", "rows", "objects", "dialogue"],
)
def test_a_pair_comes_before_what_only_looks_like_turns(key: str, value: Any) -> None:
    shaped = read_record({key: value, **PAIR})
    assert turns_shown(shaped.messages) == "U q · A a"
    assert shaped.unread == (key,)


@pytest.mark.parametrize("key", ["messages", "data", "turns"])
def test_turns_with_roles_come_before_a_pair(key: str) -> None:
    shaped = read_record({key: TURNS, **PAIR})
    assert turns_shown(shaped.messages) == "U r · A b"
    assert shaped.unread == ("question", "answer")


@pytest.mark.parametrize("value", [["q", "a", "r", "b"], [["q", "a"], ["r", "b"]]])
def test_texts_that_begin_with_the_question_come_before_a_pair(value: Any) -> None:
    assert turns_shown(read_record({"data": value, **PAIR}).messages) == "U q · A a · U r · A b"


@pytest.mark.parametrize("key", ["turns", "items", "contents"])
def test_texts_that_may_not_alternate_are_refused(key: str) -> None:
    record = {"question_id": 81, key: ["Write a post.", "Rewrite it."], "reference": ["x", "y"]}
    (fault,) = read_record(record).faults
    assert fault.kind is FaultKind.UNKNOWN_SHAPE and f"--map messages={key}" in fault.detail
    mapped = ReadingOptions(parts=((key, RecordPart.TURNS),))
    assert turns_shown(read_record(record, mapped).messages) == "U Write a post. · A Rewrite it."
