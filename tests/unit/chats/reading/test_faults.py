"""The checks of one chat, and the helpers that make messages safe to show."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kolotune.chats import Message
from kolotune.chats.reading.faults import MAX_DEPTH, Problem, order_faults, printable, value_fault

CALL = ({"function": {"name": "look", "arguments": {}}},)


def turns(letters: str) -> list[Message]:
    """s, u, a, t: the roles; c: an assistant turn with a tool call."""
    made = {
        "s": Message("system", "be kind"),
        "u": Message("user", "why?"),
        "a": Message("assistant", "because"),
        "c": Message("assistant", "", tool_calls=CALL),
        "t": Message("tool", "42"),
    }
    return [made[letter] for letter in letters]


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
    assert order_faults(turns("uua"))[0].message.startswith("turn 2:")
    assert order_faults(turns("suua"), first=0)[0].message.startswith("turn 2:")


def nested(depth: int) -> object:
    value: object = "x"
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ({"a": ["x\0"]}, "nul"),
        ({"a\0": 1}, "nul"),
        (["\ud83d"], "lone-surrogate"),
        ({"\udc00": 1}, "lone-surrogate"),
        (float("nan"), "not-finite"),
        ([float("inf")], "not-finite"),
        ({"a": b"x"}, "bad-value"),
        (nested(MAX_DEPTH + 1), "too-deep"),
        (nested(100_000), "too-deep"),
    ],
)
def test_value_faults(value: object, kind: str) -> None:
    fault = value_fault(value)
    assert fault is not None
    assert fault.kind == kind


@pytest.mark.parametrize("value", [None, True, 1, 1.5, "é😀", [], {}, {"a": [{"b": None}]}, nested(MAX_DEPTH)])
def test_good_values(value: object) -> None:
    assert value_fault(value) is None


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("two\r\n  lines\t", "two lines"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07after", "after"),
        ("\x1b]8;;http://evil\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x9b2Jcleared", "cleared"),
        ("a\u202eb\u200bc\0d\x7f", "abcd"),
        ("\ud800x", "x"),
        ("é😀", "é😀"),
        ("", ""),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_printable_cuts() -> None:
    assert printable("x" * 10, 10) == "x" * 10
    assert printable("x" * 11, 10) == "x" * 9 + "…"
    assert printable("x" * 10_000_000, 10) == "x" * 9 + "…"


@given(st.text(st.characters()), st.integers(1, 40))
def test_printable_is_short_and_harmless(text: str, limit: int) -> None:
    shown = printable(text, limit)
    assert len(shown) <= limit
    assert all(unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Zl", "Zp") for char in shown)


def test_a_problem_shows_file_and_line() -> None:
    assert str(Problem(Path("chats.jsonl"), 12, "bad-json", "cause")) == "chats.jsonl:12: cause"
    assert str(Problem(Path("a\x1b[2Jb\n.jsonl"), 1, "nul", "cause")) == "ab .jsonl:1: cause"
