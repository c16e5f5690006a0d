"""Exports of chat programs, and what stands beside their turns."""

from __future__ import annotations

from typing import Any

import pytest
from support.documented_chats import turns_shown

from kolotune.chats.reading.record_keys import METADATA
from kolotune.chats.reading.shapes import read_record

Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def test_open_webui() -> None:
    """Its title, among others, is in the record and in the object with the turns."""
    inner = {"id": "", "title": "t", "models": ["m"], "messages": [Q, A], "tags": [], "timestamp": 1}
    shaped = read_record({"id": "1", "user_id": "u", "title": "t", "chat": inner, "updated_at": 1, "archived": False})
    assert turns_shown(shaped.messages) == "U q · A a"


@pytest.mark.parametrize(("beside", "is_read"), [("s", True), ("t", False)])
def test_what_an_object_and_its_record_say_must_be_the_same(beside: str, is_read: bool) -> None:
    shaped = read_record({"system": beside, "chat": {"system": "s", "messages": [Q, A]}})
    assert bool(shaped.messages) is is_read


def test_claude() -> None:
    """Each turn has its text twice: as a text and in parts."""
    turns = [
        {"sender": sender, "text": text, "content": [{"type": "text", "text": text, "citations": []}]}
        for sender, text in (("human", "q"), ("assistant", "a"))
    ]
    record = {"uuid": "u", "name": "n", "updated_at": "2024", "account": {"uuid": "z"}, "chat_messages": turns}
    shaped = read_record(record)
    assert turns_shown(shaped.messages) == "U q · A a"
    assert set(shaped.unread) == {"uuid", "name", "updated_at", "account"} <= METADATA
    turns[0]["text"] = "another"
    assert "turns: text" in read_record(record).unread


@pytest.mark.parametrize("key", ["response", "completion", "output", "answer"])
@pytest.mark.parametrize("turns", ["messages", "conversations"])
def test_an_answer_beside_turns_that_end_with_a_question(turns: str, key: str) -> None:
    assert turns_shown(read_record({turns: [Q], key: "a"}).messages) == "U q · A a"
    several = {turns: [Q, A, Q], key: [{"role": "assistant", "content": "b"}]}
    assert turns_shown(read_record(several).messages) == "U q · A a · U q · A b"
    assert read_record({turns: [Q], "choices": ["x", "y"], key: 1}).faults
    answered = read_record({turns: [Q, A], key: "b"})
    assert turns_shown(answered.messages) == "U q · A a" and answered.unread == (key,)


@pytest.mark.parametrize("answer", [2, [2], ["2"]])
def test_whole_numbers_are_answers(answer: Any) -> None:
    assert turns_shown(read_record({"question": "1+1?", "answer": answer}).messages) == "U 1+1? · A 2"


@pytest.mark.parametrize("answer", [True, 2.5, {"x": 2}])
def test_other_values_are_no_answers(answer: Any) -> None:
    assert read_record({"question": "q", "answer": answer}).faults
