"""What is checked in a chat, and how a fault is told.

A `Fault` is what is wrong; a `Problem` is a fault with its file and line, ready to be shown. Nothing here
reads files: `formats` does, and asks these functions about what it read.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..chat import Message

MAX_DEPTH = 64
"""Deepest nesting of lists and objects in a record; well under what Python's json can recurse into."""

_TERMINAL_ESCAPE = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # CSI: colours, cursor, clearing
    r"|\x1b[\]PX^_][^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?"  # OSC, DCS and kin: titles, links, clipboard
    r"|\x9b[0-?]*[ -/]*[@-~]"  # CSI as one C1 character
    r"|\x1b."
)
_SURROGATE = re.compile("[\ud800-\udfff]")
# Cf holds the bidirectional overrides, which can make a shown line read as another one.
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


@dataclass(frozen=True)
class Fault:
    """One thing wrong with a record.

    Attributes:
        kind: a short stable slug, such as ``bad-json``.
        message: the cause and, briefly, the mend.
        down: how many lines below the start of its record the fault stands.
    """

    kind: str
    message: str
    down: int = 0


class RecordError(Exception):
    """Carries a fault out of the depths of a parser; never leaves `kolotune.chats`."""

    def __init__(self, kind: str, message: str, down: int = 0) -> None:
        super().__init__(message)
        self.fault = Fault(kind, message, down)


@dataclass(frozen=True)
class Problem:
    """One thing wrong with one place of a file.

    Attributes:
        source: the file.
        line: the line, counted from 1 (Parquet: the row).
        kind: a short stable slug, such as ``unknown-role``.
        message: the cause and, briefly, the mend; safe to show in a terminal.
    """

    source: Path
    line: int
    kind: str
    message: str

    def __str__(self) -> str:
        return f"{printable(str(self.source), 200)}:{self.line}: {self.message}"


def printable(text: str, limit: int = 60) -> str:
    """Makes text from a file safe and short enough for a message.

    Args:
        text: anything.
        limit: the most characters of the result.

    Returns:
        One line without terminal escapes, control or invisible characters; cut with ``…``.
    """
    # The cut comes first, so that a line of megabytes costs nothing; escapes take some of the margin.
    head = text[: limit * 4 + 64]
    clean = _TERMINAL_ESCAPE.sub("", head)
    clean = "".join(" " if char.isspace() else char for char in clean)
    clean = "".join(char for char in clean if unicodedata.category(char) not in _HIDDEN)
    clean = " ".join(clean.split())
    if len(clean) <= limit and len(head) == len(text):
        return clean
    return clean[: max(limit - 1, 0)] + "…"


def quoted(text: str, limit: int = 40) -> str:
    """`printable` in double quotes: a key, a role or a name inside a message."""
    return f'"{printable(text, limit)}"'


def value_fault(value: Any) -> Fault | None:
    """Looks through a parsed value for what no template or tokenizer can take.

    Args:
        value: a record or a part of one; lists and objects may be nested.

    Returns:
        The first NUL, lone surrogate, infinite number, foreign type or too deep nesting, or None.
    """
    # A stack of our own: the value may be nested deeper than Python can recurse.
    waiting: list[tuple[Any, int]] = [(value, 0)]
    while waiting:
        item, depth = waiting.pop()
        if isinstance(item, dict | list):
            if depth >= MAX_DEPTH:
                return Fault("too-deep", f"nested deeper than {MAX_DEPTH} levels; a chat needs a few")
            if isinstance(item, dict):
                waiting.extend((key, depth + 1) for key in item)
                item = list(item.values())
            waiting.extend((part, depth + 1) for part in item)
            continue
        fault = _scalar_fault(item)
        if fault is not None:
            return fault
    return None


def _scalar_fault(item: Any) -> Fault | None:
    if isinstance(item, str):
        return text_fault(item)
    if isinstance(item, float):
        if math.isfinite(item):
            return None
        return Fault("not-finite", "a number is NaN or infinite; JSON has no such number")
    if item is None or isinstance(item, bool | int):
        return None
    return Fault("bad-value", f"a value of type {type(item).__name__}; use text, numbers, lists, objects")


def text_fault(text: str) -> Fault | None:
    """Finds what makes a text unfit for a tokenizer.

    Args:
        text: any string.

    Returns:
        A fault for a NUL character or half of a surrogate pair, or None.
    """
    if "\0" in text:
        return Fault("nul", "a NUL character in a text; remove it")
    found = _SURROGATE.search(text)
    if found:
        code = f"\\u{ord(found[0]):04x}"
        return Fault("lone-surrogate", f"half a character ({code}) in a text; it was cut in two, mend the text")
    return None


def order_faults(messages: Sequence[Message], first: int = 1) -> list[Fault]:
    """Checks the turns of one chat: who speaks when, and whether they say something.

    Args:
        messages: the turns in order.
        first: the number of the first turn in messages to the user.

    Returns:
        Every fault, in the order of the turns; an empty list for a good chat.
    """
    if _is_orderly(messages):
        return []
    faults: list[Fault] = []
    previous: Message | None = None
    for number, message in enumerate(messages, first):
        faults += _turn_faults(message, previous, number, number == first)
        if message.role != "system":
            previous = message
    if not any(message.role == "assistant" for message in messages):
        return [Fault("no-assistant", "no assistant turn: nothing to train on"), *faults]
    if messages[-1].role in ("user", "tool"):
        number = first + len(messages) - 1
        cause = f"turn {number}: the last turn is the {messages[-1].role}'s; add the answer, or remove it"
        faults.append(Fault("no-answer", cause))
    return faults


def _is_orderly(messages: Sequence[Message]) -> bool:
    """Whether they are questions and answers in turns, behind a system turn or none: as most chats are."""
    start = 1 if messages and messages[0].role == "system" else 0
    asked, answered = messages[start::2], messages[start + 1 :: 2]
    return (
        0 < len(asked) == len(answered)
        and all([message.role == "user" and not _says_nothing(message) for message in asked])
        and all([message.role == "assistant" and not _says_nothing(message) for message in answered])
    )


def _turn_faults(message: Message, previous: Message | None, number: int, is_first: bool) -> list[Fault]:
    faults = []
    before = previous.role if previous else None
    if message.role == "system" and not is_first:
        faults.append(Fault("system-not-first", f"turn {number}: a system turn may only come first, and once"))
    if message.role == "assistant" and before is None:
        faults.append(Fault("assistant-first", f"turn {number}: the assistant speaks before any user turn"))
    if message.role == "user" and before == "user":
        faults.append(Fault("two-users", f"turn {number}: a second user turn in a row; join them"))
    if message.role == "assistant" and before == "assistant":
        faults.append(Fault("two-assistants", f"turn {number}: a second assistant turn in a row; join them"))
    if message.role == "tool" and not _may_precede_tool(previous):
        cause = f"turn {number}: a tool turn must follow an assistant turn with tool_calls"
        faults.append(Fault("tool-order", cause))
    if _says_nothing(message):
        kind = "empty-user" if message.role == "user" else "empty-answer"
        faults.append(Fault(kind, f"turn {number}: the {message.role}'s content is empty"))
    return faults


def _may_precede_tool(previous: Message | None) -> bool:
    return previous is not None and (previous.role == "tool" or bool(previous.tool_calls))


def _says_nothing(message: Message) -> bool:
    # A system turn or a tool's result may be empty on purpose; a question or an answer may not.
    if message.role not in ("user", "assistant") or message.tool_calls:
        return False
    return not message.content.strip()
