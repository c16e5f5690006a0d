"""Problems as the user sees them: a line for each kind, with a count and the first locations, and what helps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .faults import FaultKind, Problem

_MORE_LOCATIONS = 3
_ORDER = frozenset({
    FaultKind.SYSTEM_NOT_FIRST, FaultKind.ASSISTANT_FIRST, FaultKind.TWO_USERS, FaultKind.TWO_ASSISTANTS,
    FaultKind.NO_ANSWER,
})  # fmt: skip
_SWAPPED = frozenset({FaultKind.ASSISTANT_FIRST, FaultKind.NO_ANSWER})
_NOT_FIXED = "--fix-turns joins no answers whose weights or channels differ, nor a text with the call before it."
_HINTS = {
    **dict.fromkeys(_ORDER, "--fix-turns drops or joins such turns, and counts them."),
    FaultKind.UNKNOWN_ROLE: "Rename such roles, or leave those chats out.",
    FaultKind.TEMPLATE: "--chat-template FILE trains with a template that can write such chats.",
    FaultKind.NO_ASSISTANT: "Chats need answers to learn from.",
    FaultKind.UNKNOWN_SHAPE: "--map question=KEY,answer=KEY or --map messages=KEY names the keys; "
    "docs/chat-files.md lists the known ones.",
    FaultKind.DIFFERENT_PROMPTS: "A pair is two answers to one prompt.",
    FaultKind.FIELD_COUNT: "Save the table again with a program that quotes fields.",
    FaultKind.NO_HEADER: "Put a line of names before it, such as prompt,completion; if it does name the columns, "
    "--map question=NAME,answer=NAME says which is which.",
    FaultKind.BAD_UTF_8: "Save the file as UTF-8.",
    FaultKind.ENCODING: "Save the file as UTF-8.",
    FaultKind.CUT: "Get the whole file again.",
    FaultKind.UNSUPPORTED_CONTENT: "Remove what is no text, or those chats.",
}


def problem_lines(problems: Sequence[Problem]) -> list[str]:
    """Return a line for each kind of problem, in the order in which they come first."""
    groups: dict[tuple[FaultKind, str], list[Problem]] = {}
    for problem in problems:
        groups.setdefault((problem.kind, problem.fault.subject), []).append(problem)
    return [f"{group[0]}{_and_more(group)}" for group in groups.values()]


def affected_records(problems: Sequence[Problem]) -> int:
    """Return the number of records that have a problem."""
    return len({(problem.source, problem.line) for problem in problems})


def what_helps(problems: Sequence[Problem], fixes_turns: bool = False) -> str:
    """Return what helps against problems of these kinds, apart from leaving the chats out; "" if only a look does.

    Args:
        problems: The problems.
        fixes_turns: They are left although the order of turns is fixed.
    """
    known = {**_HINTS, **dict.fromkeys(_ORDER, _NOT_FIXED)} if fixes_turns else _HINTS
    hints = dict.fromkeys(known[problem.kind] for problem in problems if problem.kind in known)
    kinds: dict[tuple[Path, int], set[FaultKind]] = {}
    for problem in problems:
        kinds.setdefault((problem.source, problem.line), set()).add(problem.kind)
    swapped = sum(found >= _SWAPPED for found in kinds.values())
    if 2 * swapped > len(kinds):
        guess = f"In {swapped:,} records the assistant speaks first and the user last: are the roles swapped?"
        return " ".join([guess, *hints])
    return " ".join(hints)


def _and_more(group: Sequence[Problem]) -> str:
    first = group[0]
    others = dict.fromkeys(
        str(problem.line) if problem.source == first.source else f"{problem.source.name}:{problem.line}"
        for problem in group[1:]
        if (problem.source, problem.line) != (first.source, first.line)
    )
    if len(group) == 1:
        return ""
    shown = ", ".join(list(others)[:_MORE_LOCATIONS]) + (", …" if len(others) > _MORE_LOCATIONS else "")
    return f" ({len(group):,} of this kind{'; the next in ' + shown if shown else ''})"
