"""Texts that programs write for an empty cell, or for one that they could not compute."""

from __future__ import annotations

from collections.abc import Iterable

from ..chat import Message

_MARKERS = frozenset({
    "nan", "null", "none", "na", "n/a", "<na>", "nat", "\\n", "<noinput>", "#n/a", "#na", "#ref!", "#value!", "#div/0!",
    "#name?", "#num!", "#null!", "#error!", "#spill!", "#calc!",
})  # fmt: skip
_LONGEST = 12  # with white space around it


def is_marker(value: object) -> bool:
    """Whether a value says nothing but that its cell is empty or has an error."""
    return isinstance(value, str) and len(value) <= _LONGEST and value.strip().lower() in _MARKERS


def marked_answers(messages: Iterable[Message]) -> list[str]:
    """Return the answers that are such a marker; some may be meant, such as the label "None"."""
    return [
        message.content
        for message in messages
        if message.role == "assistant" and len(message.content) <= _LONGEST and is_marker(message.content)
    ]
