"""Traits of chats."""

from __future__ import annotations

from typing import Any

import pytest

from kolotune.chats import Chat, Message
from kolotune.chats.traits import ChatTrait, traits_of

USER, ANSWER, SYSTEM = Message("user", "Hi"), Message("assistant", "Hello"), Message("system", "Be brief.")
TOOL = {"type": "function", "function": {"name": "f", "description": "Find it", "parameters": {"type": "object"}}}


def calling(arguments: Any, text: str = "", **more: Any) -> Message:
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    return Message("assistant", text, tool_calls=(call,) * more.pop("times", 1), **more)


RESULT = Message("tool", "5")
CASES: dict[str, tuple[Chat, str]] = {
    "a question": (Chat((USER, ANSWER)), "question"),
    "a system turn": (Chat((SYSTEM, USER, ANSWER)), "system"),
    "an empty system turn": (Chat((Message("system", " "), USER, ANSWER)), "system empty-system spaces"),
    "two exchanges": (Chat((USER, ANSWER, USER, ANSWER)), "question turns"),
    "tools": (Chat((USER, ANSWER), tools=(TOOL,)), "tools"),
    "tools and system": (Chat((SYSTEM, USER, ANSWER), tools=(TOOL,)), "tools-and-system"),
    "a call": (Chat((USER, calling({"a": 1}), RESULT, ANSWER), tools=(TOOL,)), "tools call"),
    "a call as the last turn": (Chat((USER, calling({"a": "ü"}, "Text")), tools=(TOOL,)), "tools"),
    "calls at once": (Chat((USER, calling({"a": 1}, times=2), RESULT, ANSWER)), "question call parallel-calls"),
    "text and call": (Chat((USER, calling({"a": 1}, "Wait."), RESULT, ANSWER)), "question call call-and-text"),
    "no arguments": (Chat((USER, calling({}), RESULT, ANSWER)), "question call call-without-arguments"),
    "nested": (Chat((USER, calling({"a": [1]}), RESULT, ANSWER)), "question call rich-call"),
    "an umlaut": (Chat((USER, calling({"a": "ü"}), RESULT, ANSWER)), "question call rich-call"),
    "a quoted result": (Chat((USER, calling({"a": 1}), Message("tool", '"5"'), ANSWER)), "question call rich-call"),
    "after a call": (
        Chat((USER, calling({"a": 1}), RESULT, ANSWER, USER, ANSWER)),
        "question call turns turns-after-call",
    ),
    "thoughts": (
        Chat((USER, Message("assistant", "Hello", reasoning="Hm"), USER, ANSWER)),
        "question turns thoughts",
    ),
    "thoughts in the last answer": (Chat((USER, Message("assistant", "Hello", reasoning="Hm"))), "question"),
    "thoughts before a call": (
        Chat((USER, calling({"a": 1}, reasoning="Hm"), RESULT, ANSWER)),
        "question call thoughts-before-call",
    ),
    "a space": (Chat((Message("user", "Hi "), ANSWER)), "question spaces"),
    "accents": (Chat((Message("user", "Zu\u0308rich"), ANSWER)), "question combining-marks"),
    "composed accents": (Chat((Message("user", "Zürich"), ANSWER)), "question"),
    "accents in a call": (
        Chat((USER, calling({"a": ["Zu\u0308rich"]}), RESULT, ANSWER)),
        "question call rich-call combining-marks",
    ),
    "accents in a description": (
        Chat((USER, ANSWER), tools=({**TOOL, "function": {**TOOL["function"], "description": "Zu\u0308"}},)),
        "tools rich-tools combining-marks",
    ),
    "accents in a thought": (
        Chat((USER, Message("assistant", "Hello", reasoning="Zu\u0308"), USER, ANSWER)),
        "question turns thoughts combining-marks",
    ),
    "a ligature": (Chat((Message("user", "\ufb01ne"), ANSWER)), "question compatibility-forms"),
    "a ligature and accents": (
        Chat((Message("user", "\ufb01ne Zu\u0308rich"), ANSWER)),
        "question combining-marks compatibility-forms",
    ),
    "only the answer": (Chat((USER, Message("assistant", " Zu\u0308rich"))), "question"),
}


@pytest.mark.parametrize("case", CASES)
def test_traits(case: str) -> None:
    chat, expected = CASES[case]
    assert traits_of(chat) == {ChatTrait(name) for name in expected.split()}


def test_rich_tools() -> None:
    tools = ({"type": "function", "function": {"name": "f", "description": "Größe"}},)
    assert ChatTrait.RICH_TOOLS in traits_of(Chat((USER, ANSWER), tools=tools))


def test_each_has_a_sentence() -> None:
    assert len({trait.sentence for trait in ChatTrait}) == len(ChatTrait)
