"""Values of a parsed record: their names in messages, and lists that are written as JSON text."""

from __future__ import annotations

import ast
import io
import json
import tokenize

from .faults import RecordError
from .strict_json import parse_text

_TYPE_NAMES: dict[type, str] = {
    str: "a text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object",
    type(None): "null",
}  # fmt: skip


def kind_of(value: object) -> str:
    """Return the JSON name of a value's type with its article, for messages."""
    return _TYPE_NAMES.get(type(value), type(value).__name__)


def json_or_value(value: object) -> object:
    """Parse a list that is written as JSON text, as in tables and some JSON Lines files; return other values as is.

    Raises:
        RecordError: The text is not JSON.
    """
    if isinstance(value, str) and value.strip():
        return parse_text(value)
    return value


def list_or_value(value: object) -> object:
    """Parse a list that is written as text, as JSON or as Python and NumPy print it; return other values as is.

    Raises:
        RecordError: The text is neither.
    """
    try:
        return json_or_value(value)
    except RecordError:
        if isinstance(value, str) and (parsed := _printed(value)) is not None:
            return parsed
        raise


def _printed(text: str) -> object:
    """Return what Python or NumPy printed; None for other texts."""
    if not text.lstrip().startswith(("[", "{", "(")):
        return None
    parts: list[str] = []
    try:
        for token in tokenize.generate_tokens(io.StringIO(text.strip()).readline):
            is_text = token.type == tokenize.STRING
            # NumPy has no commas, and Python would join the texts.
            if parts and ((is_text and parts[-1][-1] in "'\"") or (token.string == "[" and parts[-1] == "]")):
                parts.append(",")
            if token.string.strip():
                parts.append(token.string)
        literal = ast.literal_eval(" ".join(parts))
        return parse_text(json.dumps(literal))  # checked like any other: no lone surrogates, no huge numbers
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError, tokenize.TokenError, RecordError):
        return None


def is_filled(value: object) -> bool:
    """Whether a value says something. A table gives every record every key, most of them empty."""
    return value is not None and value != "" and value != [] and value != {}
