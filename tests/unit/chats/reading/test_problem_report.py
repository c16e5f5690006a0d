"""Problems as the user sees them: a line for each kind, and the hint that fits the cause."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kolotune.chats.reading.faults import Fault, FaultKind, Problem
from kolotune.chats.reading.files import read_chat
from kolotune.chats.reading.problem_report import affected_records, problem_lines, what_helps
from kolotune.chats.reading.records import parsed_record

ONE, TWO = Path("one.jsonl"), Path("two.jsonl")


def problem(kind: FaultKind, line: int, subject: str = "", source: Path = ONE) -> Problem:
    return Problem(source, line, Fault(kind, f"{kind} {subject}".strip(), subject=subject))


@pytest.mark.parametrize(
    ("problems", "lines"),
    [
        ([problem(FaultKind.CUT, 3)], ["one.jsonl:3: cut"]),
        (
            [problem(FaultKind.CUT, line) for line in range(1, 81)],
            ["one.jsonl:1: cut (80 of this kind; the next in 2, 3, 4, …)"],
        ),
        (
            [problem(FaultKind.CUT, 1), problem(FaultKind.CUT, 4, source=TWO)],
            ["one.jsonl:1: cut (2 of this kind; the next in two.jsonl:4)"],
        ),
        (
            [problem(FaultKind.UNKNOWN_ROLE, line, role) for line in (1, 2) for role in ("npc", "bard")],
            [
                "one.jsonl:1: unknown-role npc (2 of this kind; the next in 2)",
                "one.jsonl:1: unknown-role bard (2 of this kind; the next in 2)",
            ],
        ),
        (
            [problem(FaultKind.NO_ANSWER, 1), problem(FaultKind.NO_ANSWER, 1)],
            ["one.jsonl:1: no-answer (2 of this kind)"],
        ),
    ],
)
def test_a_line_for_each_kind(problems: list[Problem], lines: list[str]) -> None:
    assert problem_lines(problems) == lines


def test_records_are_counted_once() -> None:
    problems = [problem(FaultKind.NO_ANSWER, 1), problem(FaultKind.CUT, 1), problem(FaultKind.CUT, 1, source=TWO)]
    assert affected_records(problems) == 2


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (FaultKind.TWO_USERS, "--fix-turns"),
        (FaultKind.NO_ANSWER, "--fix-turns"),
        (FaultKind.ASSISTANT_FIRST, "--fix-turns"),
        (FaultKind.SYSTEM_NOT_FIRST, "--fix-turns"),
        (FaultKind.UNKNOWN_SHAPE, "--map"),
        (FaultKind.TEMPLATE, "--chat-template"),
        (FaultKind.BAD_UTF_8, "UTF-8"),
        (FaultKind.CUT, "whole file"),
        (FaultKind.UNKNOWN_ROLE, "Rename"),
        (FaultKind.BAD_JSON, ""),
    ],
)
def test_the_hint_fits_the_cause(kind: FaultKind, words: str) -> None:
    hint = what_helps([problem(kind, 1), problem(kind, 2)])
    assert words in hint and bool(words) == bool(hint)


def read(turns: list[dict[str, Any]], line: int) -> tuple[Problem, ...]:
    return read_chat(ONE, parsed_record(line, json.dumps({"messages": turns}).encode())).problems


def test_swapped_roles_are_guessed() -> None:
    question, answer = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}
    swapped = [each for line in range(9) for each in read([answer, question], line)]
    assert "In 9 records the assistant speaks first and the user last: are the roles swapped?" in what_helps(swapped)
    assert "swapped" not in what_helps([each for line in range(9) for each in read([question, answer, question], line)])


def test_fixing_turns_is_not_advised_where_it_is_on() -> None:
    for kind in (FaultKind.TWO_ASSISTANTS, FaultKind.NO_ANSWER):
        assert "drops or joins" in what_helps([problem(kind, 1)])
        assert "drops or joins" not in what_helps([problem(kind, 1)], fixes_turns=True)
