"""Markers of empty cells: no context, and reported as answers."""

from __future__ import annotations

import pytest

from kolotune.chats import Message
from kolotune.chats.reading.markers import is_marker, marked_answers
from kolotune.chats.reading.shapes import read_record


@pytest.mark.parametrize("text", ["#N/A", "NULL", "nan", "None", "\\N", "#REF!", "N/A", "<noinput>", " nan\n"])
def test_markers(text: str) -> None:
    assert is_marker(text)
    assert marked_answers([Message("user", text), Message("assistant", text)]) == [text]
    assert marked_answers([Message("assistant", f"{text} is the answer")]) == []


@pytest.mark.parametrize("text", ["", "no", "Nanna", "#1", 3, None])
def test_other_values(text: object) -> None:
    assert not is_marker(text)


@pytest.mark.parametrize("key", ["input", "context", "system", "reasoning", "history", "choices", "tools"])
def test_a_marker_beside_a_question_is_empty(key: str) -> None:
    shaped = read_record({"instruction": "q", key: "nan", "output": "a"})
    assert (shaped.faults, shaped.unread, shaped.tools) == ((), (), ())
    assert shaped.messages == (Message("user", "q"), Message("assistant", "a"))
