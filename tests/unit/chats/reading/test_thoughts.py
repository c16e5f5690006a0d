"""A thought that a turn has twice is learnt once."""

from __future__ import annotations

from typing import Any

import pytest

from kolotune.chats.reading.messages import Turns, read_turns
from kolotune.chats.reading.shapes import read_record

THINKING = {"type": "thinking", "thinking": "t"}
TEXT = {"type": "text", "text": "a"}


def read(**answer: Any) -> Turns:
    return read_turns([{"role": "user", "content": "q"}, {"role": "assistant", **answer}])


@pytest.mark.parametrize(
    "answer",
    [
        {"content": "<think>t</think>a", "reasoning_content": "t"},
        {"content": "<think>\nt\n</think>\n\na", "reasoning": " t"},
        {"content": "t\n</think>\n\na", "thinking": "t"},
        {"content": "<think>\n\n</think>\n\na", "reasoning_content": "t"},
        {"content": "[THINK]t[/THINK]a", "reasoning_content": "t"},
        {"content": [THINKING, TEXT], "reasoning_content": "t\n"},
        {"content": [THINKING, {"type": "text", "text": "<think>t</think>a"}]},
        {"content": "a", "reasoning_content": "t", "reasoning": "t\n"},
    ],
)
def test_one_thought(answer: dict[str, Any]) -> None:
    turns = read(**answer)
    assert turns.faults == []
    assert (str(turns.messages[1].reasoning).strip(), turns.messages[1].content) == ("t", "a")


def test_several_parts_are_the_thought_of_the_key() -> None:
    turns = read(content=[THINKING, {**THINKING, "thinking": "u"}, TEXT], reasoning_content="t\n\nu")
    assert turns.messages[1].reasoning == "t\n\nu"


@pytest.mark.parametrize("content", ["<think>t</think>a", [THINKING, TEXT]])
def test_two_thoughts_are_refused(content: object) -> None:
    assert [fault.kind for fault in read(content=content, reasoning_content="other").faults] == ["bad-reasoning"]


def test_a_thought_in_a_turn_of_its_own_and_in_the_answer() -> None:
    turns = [("user", "q"), ("reasoning", "t"), ("assistant", "<think>t</think>a")]
    message = read_turns([{"role": role, "content": text} for role, text in turns]).messages[1]
    assert (message.reasoning, message.content) == ("t", "a")


def test_a_pair() -> None:
    record = {"question": "q", "answer": "<think>t</think>a", "reasoning": "t"}
    message = read_record(record).messages[1]
    assert (message.reasoning, message.content) == ("t", "a")


def test_what_is_no_second_thought_stays() -> None:
    assert read(content="<think>t</think>a").messages[1].content == "<think>t</think>a"
    assert read(content="It ends with </think>.", reasoning="t").messages[1].content == "It ends with </think>."
