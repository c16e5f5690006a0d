"""Text from strangers' files is made safe to show."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kolotune.chats.reading.faults import Fault, FaultKind, Problem
from kolotune.chats.reading.printable import printable


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


def test_a_problem_shows_file_line_turn_and_field() -> None:
    fault = Fault(FaultKind.BAD_JSON, "cause", turn=3, field="tools")
    assert str(Problem(Path("chats.jsonl"), 12, fault)) == "chats.jsonl:12: turn 3: tools: cause"
    assert str(Problem(Path("a\x1b[2Jb\n.jsonl"), 1, Fault(FaultKind.NUL, "cause"))) == "ab .jsonl:1: cause"
