"""Turns that a table has as text: as JSON, or as Python and NumPy print lists of them (pandas writes CSV so)."""

from __future__ import annotations

import ast
import json
import re

from .faults import RecordError
from .record_keys import CONTENT_KEYS, ROLE_KEYS
from .roles import role_of
from .strict_json import parse_text

_FIRST_KEY = re.compile(rf"\s*\[?\s*\{{\s*[\"'](?:{'|'.join((*ROLE_KEYS, *CONTENT_KEYS))})[\"']\s*:")
_NUMPY_GAP = re.compile(r"\}\s*\n\s*\{")  # NumPy has no commas; in the texts of a printed list, line ends are escaped


def turns_as_text(value: object) -> list[object] | None:
    """Return the turns that a text is, or the one turn; None for every other value.

    Only what has turns with known roles counts, so that answers that are other JSON stay texts.
    """
    if not isinstance(value, str) or _FIRST_KEY.match(value) is None:
        return None
    parsed = _parsed(value)
    turns = [parsed] if isinstance(parsed, dict) else parsed
    return turns if isinstance(turns, list) and turns and all([_is_turn(turn) for turn in turns]) else None


def first_role(turns: list[object]) -> str | None:
    """Return the role of the first turn; None if there is none that is known."""
    first = turns[0] if turns else None
    if not isinstance(first, dict):
        return None
    return next((role_of(role) for key in ROLE_KEYS if isinstance(role := first.get(key), str)), None)


def _parsed(text: str) -> object:
    try:
        return parse_text(text)
    except RecordError:
        pass
    try:
        literal = ast.literal_eval(_NUMPY_GAP.sub("}, {", text.strip()))
        return parse_text(json.dumps(literal))  # checked like any other: no lone surrogates, no huge numbers
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError, RecordError):
        return None


def _is_turn(turn: object) -> bool:
    return isinstance(turn, dict) and first_role([turn]) is not None
