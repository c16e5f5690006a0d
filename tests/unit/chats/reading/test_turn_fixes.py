"""Which turns --fix-turns joins; docs/chat-files.md has a table of its changes, each row of which is a test."""

from __future__ import annotations

from typing import Any

from kolotune.chats.reading.reading_options import ReadingOptions
from kolotune.chats.reading.shapes import ShapedRecord, read_record

QUESTION = {"role": "user", "content": "q"}


def read(*answers: dict[str, Any], fixes_turns: bool = True) -> ShapedRecord:
    turns = [QUESTION, *({"role": "assistant", **answer} for answer in answers)]
    return read_record({"messages": turns}, ReadingOptions(fixes_turns=fixes_turns))


def test_harmonys_analysis_is_a_thought() -> None:
    turns = {"channel": "analysis", "content": "t"}, {"channel": "final", "content": "a"}
    for fixes_turns in (False, True):
        shaped = read(*turns, fixes_turns=fixes_turns)
        assert (shaped.faults, shaped.fixes, shaped.unread) == ((), (), ())
        assert [(message.reasoning, message.content) for message in shaped.messages[1:]] == [("t", "a")]


def test_a_thought_as_parts() -> None:
    turns = {"channel": "analysis", "content": [{"type": "text", "text": "t"}]}, {"content": "a"}
    assert read(*turns).messages[1].reasoning == "t"


def test_turns_of_different_channels_are_not_joined() -> None:
    turns = {"channel": "commentary", "content": "b"}, {"channel": "final", "content": "a"}
    assert [fault.kind for fault in read(*turns).faults] == ["two-assistants"]


def test_another_channel_is_reported() -> None:
    assert read({"channel": "email", "content": "a"}).unread == ("turns: channel",)


def test_a_text_is_not_joined_with_the_call_before_it() -> None:
    call, text = {"tool_calls": [{"function": {"name": "f", "arguments": {}}}]}, {"content": "b"}
    assert [fault.kind for fault in read(call, text).faults] == ["two-assistants"]
    assert read(text, call).messages[1].content == "b"
    assert len(read(call, {**call, "content": None}).messages[1].tool_calls) == 2
