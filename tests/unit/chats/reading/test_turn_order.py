"""Who may speak after whom, and which turns may be empty."""

from __future__ import annotations

import pytest

from kolotune.chats import Message
from kolotune.chats.reading.turn_order import order_faults

CALL = ({"function": {"name": "look", "arguments": {}}},)


def turns(letters: str) -> list[Message]:
    """Turns by letter: s, u, a and t for the roles, c for an assistant turn with a tool call."""
    by_letter = {
        "s": Message("system", "be kind"),
        "u": Message("user", "why?"),
        "a": Message("assistant", "because"),
        "c": Message("assistant", "", tool_calls=CALL),
        "t": Message("tool", "42"),
    }
    return [by_letter[letter] for letter in letters]


@pytest.mark.parametrize("letters", ["ua", "sua", "uaua", "ucta", "uctta", "uctcta", "uc", "ucua", "uctua"])
def test_good_orders(letters: str) -> None:
    assert order_faults(turns(letters)) == []


@pytest.mark.parametrize(
    ("letters", "kinds"),
    [
        ("u", ["no-assistant"]),
        ("s", ["no-assistant"]),
        ("su", ["no-assistant"]),
        ("a", ["assistant-first"]),
        ("sa", ["assistant-first"]),
        ("uua", ["two-users"]),
        ("uaa", ["two-assistants"]),
        ("uac", ["two-assistants"]),
        ("usa", ["system-not-first"]),
        ("ssua", ["system-not-first"]),
        ("uau", ["no-answer"]),
        ("uct", ["no-answer"]),
        ("uata", ["tool-order"]),
        ("tua", ["tool-order"]),
        ("usua", ["system-not-first", "two-users"]),
    ],
)
def test_bad_orders(letters: str, kinds: list[str]) -> None:
    assert [fault.kind for fault in order_faults(turns(letters))] == kinds


@pytest.mark.parametrize("blank", ["", " ", "\n\t", "\u3000"])
def test_empty_content(blank: str) -> None:
    question, answer = Message("user", blank), Message("assistant", blank)
    assert [fault.kind for fault in order_faults([question, Message("assistant", "x")])] == ["empty-user"]
    assert [fault.kind for fault in order_faults([Message("user", "x"), answer])] == ["empty-answer"]


def test_system_and_tool_turns_may_be_empty() -> None:
    chat = [Message("system", ""), *turns("uc"), Message("tool", ""), *turns("a")]
    assert order_faults(chat) == []


def test_faults_name_the_turn() -> None:
    assert order_faults(turns("uua"))[0].turn == 2
    assert order_faults(turns("suua"), [0, 1, 2, 3])[0].turn == 2
