"""Faults of records and of chats: what is wrong, and where.

A reader reports a `Fault` of a record. `Problem` adds the file and line, and is what users see.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import NoReturn

from .printable import printable


class FaultKind(StrEnum):
    """What can be wrong with a record, or with the chat in it."""

    # The bytes and the JSON, CSV or Parquet in a file
    ENCODING = "encoding"
    BAD_UTF_8 = "bad-utf-8"
    BAD_JSON = "bad-json"
    BAD_CSV = "bad-csv"
    FIELD_COUNT = "field-count"
    NO_HEADER = "no-header"
    CUT = "cut"
    TOO_LONG = "too-long"
    TOO_DEEP = "too-deep"
    DUPLICATE_KEY = "duplicate-key"
    HUGE_NUMBER = "huge-number"
    NOT_FINITE = "not-finite"
    BAD_VALUE = "bad-value"
    NUL = "nul"
    LONE_SURROGATE = "lone-surrogate"
    # The shape of a record
    NOT_AN_OBJECT = "not-an-object"
    UNKNOWN_SHAPE = "unknown-shape"
    NO_MESSAGES = "no-messages"
    BAD_HISTORY = "bad-history"
    BAD_TOOLS = "bad-tools"
    NO_PREFERENCE = "no-preference"
    NO_TEXT = "no-text"
    DIFFERENT_PROMPTS = "different-prompts"
    # One turn
    BAD_MESSAGE = "bad-message"
    MISSING_ROLE = "missing-role"
    UNKNOWN_ROLE = "unknown-role"
    MISSING_CONTENT = "missing-content"
    BAD_CONTENT = "bad-content"
    UNSUPPORTED_CONTENT = "unsupported-content"
    BAD_REASONING = "bad-reasoning"
    BAD_TOOL_CALL = "bad-tool-call"
    BAD_TOOL_TURN = "bad-tool-turn"
    NOT_SUPPORTED = "not-supported"
    # The order of the turns
    EMPTY_USER = "empty-user"
    EMPTY_ANSWER = "empty-answer"
    SYSTEM_NOT_FIRST = "system-not-first"
    ASSISTANT_FIRST = "assistant-first"
    TWO_USERS = "two-users"
    TWO_ASSISTANTS = "two-assistants"
    TOOL_ORDER = "tool-order"
    NO_ASSISTANT = "no-assistant"
    NO_ANSWER = "no-answer"
    # A good chat that this base model can't be trained on
    TEMPLATE = "template"
    NO_LABEL = "no-label"


@dataclass(frozen=True)
class Fault:
    """One thing wrong with a record.

    Attributes:
        kind: What is wrong.
        detail: The cause and, briefly, what to do.
        line_offset: Lines between the start of the record and the fault.
        turn: Number of the turn that it is about, or None.
        field: Name of the field that it is about, or "".
        subject: What it is about, where faults of one kind are about several things: a role, a key; or "".
    """

    kind: FaultKind
    detail: str
    line_offset: int = 0
    turn: int | None = None
    field: str = ""
    subject: str = ""

    @property
    def message(self) -> str:
        """The fault as one sentence, with its turn and field."""
        parts = [f"turn {self.turn}"] if self.turn is not None else []
        return ": ".join([*parts, *([self.field] if self.field else []), self.detail])


class RecordError(Exception):
    """Carries a fault out of a parser; never leaves `kolotune.chats`."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.message)
        self.fault = fault

    def within(self, kind: FaultKind | None = None, field: str = "") -> RecordError:
        """Return the same error with a broader kind, or with the field whose text was parsed."""
        fault = self.fault
        return RecordError(dataclasses.replace(fault, kind=kind or fault.kind, field=field or fault.field))


def fail(kind: FaultKind, detail: str, line_offset: int = 0, subject: str = "") -> NoReturn:
    """Raise a `RecordError` with a fault of this kind."""
    raise RecordError(Fault(kind, detail, line_offset, subject=subject))


@dataclass(frozen=True)
class Problem:
    """A fault and its location.

    Attributes:
        source: The file.
        line: The line, starting at 1; in a Parquet file, the number of the record.
        fault: What is wrong; its message is safe to show in a terminal.
    """

    source: Path
    line: int
    fault: Fault

    @property
    def kind(self) -> FaultKind:
        """What is wrong."""
        return self.fault.kind

    def __str__(self) -> str:
        return f"{printable(str(self.source), 200)}:{self.line}: {self.fault.message}"
