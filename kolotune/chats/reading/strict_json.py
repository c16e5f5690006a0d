"""JSON, stricter than Python's: what it would take in silence is a fault here, with its place."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from .faults import MAX_DEPTH, RecordError, printable, quoted, value_fault

MAX_DIGITS = 400
"""Longest integer; longer ones are slow to convert, and Python refuses them from 4,300 digits on."""

_MENDS = {
    "Expecting property name": "keys stand in double quotes, with no comma after the last one",
    "Invalid control character": "write line breaks in a text as \\n; or is a quote missing?",
    "Invalid \\escape": "write a backslash as \\\\",
    "Extra data": "one record ends here and more text follows; is a comma or a line break missing?",
}


_BOM = b"\xef\xbb\xbf"
_ESCAPE = re.compile("\\\\u(?:0000|[dD][89a-fA-F])")
_HALF = re.compile("[\ud800-\udfff]")
_SPACED_KEY = re.compile('"[ \\t\\n\\r]+:')


def parse(data: bytes, at_end: bool = False, first_column: int = 1) -> Any:
    """Parses one record.

    Args:
        data: the bytes of one JSON value.
        at_end: the file ends right after it, so that it may have been cut.
        first_column: the column of its first byte, for messages.

    Returns:
        The value.

    Raises:
        RecordError: it is no UTF-8 or no JSON, or JSON that can't be trained on.
    """
    text = _decode(data, at_end, first_column)
    return _parse(text, at_end, first_column)


def parse_text(text: str) -> Any:
    """Parses JSON that stands inside a text: a cell of a table, or the arguments of a tool call.

    Args:
        text: the JSON.

    Returns:
        The value.

    Raises:
        RecordError: it is no JSON, or JSON that can't be trained on.
    """
    try:
        return _parse(text, at_end=False, first_column=1)
    except RecordError as error:
        # A line inside the cell says nothing about the line in the file.
        raise RecordError(error.fault.kind, error.fault.message) from None


def _decode(data: bytes, at_end: bool, first_column: int) -> str:
    nul = data.find(b"\0")
    if nul >= 0:
        down, column = _place(data, nul, first_column)
        raise RecordError("nul", f"a NUL byte at byte {column} of the line; remove it", down)
    try:
        # A byte order mark may also stand in mid-file, where two files were joined.
        return data.removeprefix(_BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        if at_end and error.reason == "unexpected end of data":
            raise _cut(data.count(b"\n")) from None
        start = error.start + len(_BOM) * data.startswith(_BOM)
        down, column = _place(data, start, first_column)
        cause = f"byte {column} of the line (0x{data[start]:02x}) is no UTF-8; save the file as UTF-8"
        raise RecordError("bad-utf-8", cause, down) from None


def _place(data: bytes, position: int, first_column: int) -> tuple[int, int]:
    """How many lines down, and which byte of that line counted from 1."""
    line_start = data.rfind(b"\n", 0, position) + 1
    column = position - line_start + (1 if line_start else first_column)
    return data.count(b"\n", 0, position), column


def _parse(text: str, at_end: bool, first_column: int) -> Any:
    try:
        value = _quickly(text) or _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise _syntax(error, at_end, first_column) from None
    except RecursionError:
        raise RecordError("too-deep", "nested too deep to be read; a chat needs a few levels") from None
    # What `value_fault` looks for can only come from such an escape, or where more is open than it allows.
    if _suspect(text) or text.count("[") + text.count("{") > MAX_DEPTH:
        fault = value_fault(value)
        if fault is not None:
            raise RecordError(fault.kind, fault.message)
    return value


def _quickly(text: str) -> Any:
    """The value of an object in which no key stands twice; None where that, or anything else, takes a closer look."""
    if not text.startswith("{") or _SPACED_KEY.search(text):
        return None
    try:
        value = _QUICK.decode(text)
    except (ValueError, RecursionError, RecordError):
        return None
    # Each key is a quote and a colon in the text; a text may begin with a colon too, but then there are more of these.
    return value if text.count('":') == _keys(value) else None


def _keys(value: Any) -> int:
    """How many keys a value has, at all depths."""
    count, waiting = 0, [value]
    while waiting:
        item = waiting.pop()
        if type(item) is dict:
            count += len(item)
            waiting += item.values()
        elif type(item) is list:
            waiting += item
    return count


def _suspect(text: str) -> bool:
    """Whether a NUL or half a character may be in its values."""
    return bool("\0" in text or ("\\u" in text and _ESCAPE.search(text)) or (not text.isascii() and _HALF.search(text)))


def _syntax(error: json.JSONDecodeError, at_end: bool, first_column: int) -> RecordError:
    if at_end and _stops_short(error):
        return _cut(error.doc.count("\n"))
    column = error.colno + (first_column - 1 if error.lineno == 1 else 0)
    mend = next((mend for start, mend in _MENDS.items() if error.msg.startswith(start)), "")
    if error.doc[error.pos : error.pos + 1] == "'":
        mend = "JSON knows only double quotes"
    cause = error.msg.removesuffix(" at").removesuffix(" starting")
    message = f"not valid JSON at column {column}: {printable(cause)}"
    return RecordError("bad-json", f"{message}; {mend}" if mend else message, error.lineno - 1)


def _stops_short(error: json.JSONDecodeError) -> bool:
    """Does an object break off where the text ends, rather than go wrong before?"""
    text = error.doc.rstrip()
    if not text.startswith("{"):
        return False
    # A literal or an escape that is cut in two is told at its start, a few characters before the end.
    in_token = len(text) - error.pos < 10 and not text.endswith(("}", "]"))
    return error.pos >= len(text) or in_token or error.msg.startswith("Unterminated")


def _cut(down: int) -> RecordError:
    return RecordError("cut", "the file ends in the middle of a record; get the whole file", down)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise RecordError("duplicate-key", f"the key {quoted(_twin(pairs))} stands twice in one object; keep one")
    return found


def _twin(pairs: list[tuple[str, Any]]) -> str:
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            return key
        seen.add(key)
    return ""


def _constant(name: str) -> NoReturn:
    raise RecordError("not-finite", f"{name} is no JSON number; use null, or leave the key out")


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise RecordError("huge-number", f"an integer of {len(digits)} digits; write it as a text")
    return int(digits)


def _float(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise RecordError("not-finite", f"the number {printable(digits, 20)} is too large; write it as a text")
    return number


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_int=_integer, parse_float=_float)
# Takes a third of the time, since it makes no list of each object's keys; of two that are the same it keeps one.
_QUICK = json.JSONDecoder(parse_constant=_constant, parse_int=_integer, parse_float=_float)
