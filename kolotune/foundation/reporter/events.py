"""The fields of the events that `JsonReporter` prints. docs/json-events.md describes them for users."""

from __future__ import annotations

from typing import TypedDict


class TextEvent(TypedDict):
    """``doing``, ``success``, ``note``, ``warning``: one message. `time` is UTC, to the second, as in every event."""

    event: str
    time: str
    text: str


class FailureEvent(TypedDict):
    """``failure``: the last event of a verb that failed."""

    event: str
    time: str
    cause: str
    hint: str
    exit_code: int


class TableEvent(TypedDict):
    """``table``: rows of text, each keyed by column name."""

    event: str
    time: str
    title: str
    rows: list[dict[str, str]]


class ResultEvent(TypedDict):
    """``result``: the answer to the user's question; a verb may add fields."""

    event: str
    time: str
    text: str


class ProgressEvent(TypedDict):
    """``progress``: a running count, with fields of what is counted, such as loss."""

    event: str
    time: str
    title: str
    done: int
    total: int


EVENTS: dict[str, type] = {
    **dict.fromkeys(("doing", "success", "note", "warning"), TextEvent),
    "failure": FailureEvent,
    "table": TableEvent,
    "result": ResultEvent,
    "progress": ProgressEvent,
}
"""The shape of an event, by the value of its `event` field."""
WITH_MORE_FIELDS = frozenset({"result", "progress"})
