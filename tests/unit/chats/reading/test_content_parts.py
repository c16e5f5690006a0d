"""Parts of a content that say more than a chat can: refused or reported, never lost."""

from __future__ import annotations

from typing import Any

import pytest

from kolotune.chats.reading.faults import FaultKind
from kolotune.chats.reading.shapes import ShapedRecord, read_record

CALL = {"type": "tool_use", "id": "1", "name": "f", "input": {}}
GOOGLE_CALL = {"functionCall": {"name": "f", "args": {}}}


def read(answer: list[Any], **result: Any) -> ShapedRecord:
    results = [{"type": "tool_result", "tool_use_id": "1", "content": "r", **result}]
    turns = [("user", "q"), ("assistant", answer), ("user", results), ("assistant", "a")]
    return read_record({"messages": [{"role": role, "content": content} for role, content in turns]})


@pytest.mark.parametrize("answer", [[CALL, {"type": "text", "text": "b"}], [GOOGLE_CALL, {"text": "b"}]])
def test_a_text_after_a_call_is_refused(answer: list[Any]) -> None:
    assert [(fault.kind, fault.turn) for fault in read(answer).faults] == [(FaultKind.BAD_TOOL_CALL, 2)]


def test_white_space_after_a_call_is_no_text() -> None:
    shaped = read([{"type": "text", "text": "b"}, CALL, {"type": "text", "text": "\n"}])
    assert (shaped.faults, shaped.messages[1].content.strip()) == ((), "b")


def test_an_error_of_a_tool_is_reported() -> None:
    assert read([CALL], is_error=True).unread == ("turns: is_error",)
    assert read([CALL], is_error=False).unread == ()
