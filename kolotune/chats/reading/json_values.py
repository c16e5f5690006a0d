"""Values of a parsed record: their names in messages, and lists that are written as JSON text."""

from __future__ import annotations

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


def is_filled(value: object) -> bool:
    """Whether a value says something. A table gives every record every key, most of them empty."""
    return value is not None and value != "" and value != [] and value != {}
