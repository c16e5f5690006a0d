"""Values as tables and loose JSON have them: lists as text, empty values beside filled ones, one object for a list."""

from __future__ import annotations

from typing import Any

import pytest

from kolotune.chats.reading.faults import RecordError
from kolotune.chats.reading.json_values import list_or_value
from kolotune.chats.reading.shapes import read_record

CALL = {"function": {"name": "f", "arguments": {}}}


@pytest.mark.parametrize(
    "text",
    ['["x", "it\'s"]', "['x', \"it's\"]", "('x', \"it's\")", "['x' \"it's\"]", "['x'\n \"it's\"]", ["x", "it's"]],
)
def test_lists_as_text(text: object) -> None:
    assert list_or_value(text) == ["x", "it's"]


def test_nested_lists_as_numpy_prints_them() -> None:
    assert list_or_value("[['q' 'a']\n ['r' 'b']]") == [["q", "a"], ["r", "b"]]
    assert list_or_value("[{'x': None, 'y': True}]") == [{"x": None, "y": True}]


@pytest.mark.parametrize("text", ["x", "'x'", "[x]", "[1", "{1, 2}", "[f()]", "['\\ud800']", "[" * 300])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(RecordError):
        list_or_value(text)


@pytest.mark.parametrize(
    ("key", "value", "first"),
    [("history", "[('p', 'b')]", "p"), ("choices", "['x' 'y']", "q\n\nA. x\nB. y"), ("tools", "[{'name': 'f'}]", "q")],
)
def test_printed_lists_beside_a_question(key: str, value: str, first: str) -> None:
    shaped = read_record({"question": "q", "answer": "a", key: value})
    assert (shaped.faults, shaped.messages[0].content) == ((), first)
    assert len(shaped.tools) == (key == "tools")


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ({"content": "q"}, {"content": "a", "weight": ""}),
        ({"content": "", "text": "q"}, {"content": "a"}),
        ({"content": [], "parts": [{"text": "q"}]}, {"content": "a"}),
        ({"role": "", "from": "human", "content": "q"}, {"content": "a"}),
    ],
)
def test_an_empty_value_says_nothing(question: dict[str, Any], answer: dict[str, Any]) -> None:
    shaped = read_record({"messages": [{"role": "user", **question}, {"role": "assistant", **answer}]})
    assert (shaped.faults, shaped.unread) == ((), ())
    assert [message.content for message in shaped.messages] == ["q", "a"]
    assert shaped.messages[1].weight == 1


def test_one_call_without_a_list() -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": CALL}]
    shaped = read_record({"messages": turns})
    assert [call["function"] for call in shaped.messages[1].tool_calls] == [CALL["function"]]
