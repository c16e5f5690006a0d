"""Parse JSON more strictly than Python does: what it accepts silently is a fault here, with its line and column.

Most records are parsed by a fast decoder, which keeps one of two equal keys; the keys are then counted in the text.
Where the count differs, or anything else looks unusual, a slower decoder that sees every key parses the record again.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from typing import NoReturn

from .faults import Fault, FaultKind, RecordError, fail
from .printable import printable, quoted
from .value_checks import MAX_DEPTH, value_fault

MAX_DIGITS = 400
"""Most digits of an integer; longer ones are slow to convert, and Python refuses them from 4,300 digits on."""

_HINTS = {
    "Expecting property name": "keys need double quotes, and no comma follows the last one",
    "Invalid control character": "write line breaks in a text as \\n; or is a quote missing?",
    "Invalid \\escape": "write a backslash as \\\\",
    "Extra data": "one record ends here and more text follows; is a comma or a line break missing?",
}


ON_ONE_LINE = "the record goes over several lines; write each on one line (`jq -c .` does)"
"""What to do about indented objects in JSON Lines."""

_BOM = b"\xef\xbb\xbf"
_SUSPICIOUS_ESCAPE = re.compile("\\\\u(?:0000|[dD][89a-fA-F])")
_SURROGATE = re.compile("[\ud800-\udfff]")
_SPACED_KEY = re.compile('"[ \\t\\n\\r]+:')


def parse(data: bytes, at_end: bool = False, first_column: int = 1) -> object:
    """Parse one record.

    Args:
        data: The bytes of one JSON value.
        at_end: The file ends right after them, so the record may be cut.
        first_column: The column of the first byte, for messages.

    Raises:
        RecordError: The bytes are not UTF-8 or not JSON, or JSON that can't be trained on.
    """
    return _parse(_decode(data, at_end, first_column), at_end, first_column)


def parse_text(text: str) -> object:
    """Parse JSON inside a text: the cell of a table, or the arguments of a tool call.

    Raises:
        RecordError: The text is not JSON, or JSON that can't be trained on.
    """
    try:
        return _parse(text, at_end=False, first_column=1)
    except RecordError as error:
        # A line inside the cell says nothing about the line in the file.
        raise RecordError(dataclasses.replace(error.fault, line_offset=0)) from None


def _decode(data: bytes, at_end: bool, first_column: int) -> str:
    nul = data.find(b"\0")
    if nul >= 0:
        line_offset, column = _line_and_column(data, nul, first_column)
        fail(FaultKind.NUL, f"a NUL byte at byte {column} of the line; remove it", line_offset)
    try:
        # A byte order mark may also be in mid-file, where two files were joined.
        return data.removeprefix(_BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        if at_end and error.reason == "unexpected end of data":
            raise _cut(data.count(b"\n")) from None
        start = error.start + len(_BOM) * data.startswith(_BOM)
        line_offset, column = _line_and_column(data, start, first_column)
        cause = f"byte {column} of the line (0x{data[start]:02x}) is not UTF-8; save the file as UTF-8"
        raise RecordError(Fault(FaultKind.BAD_UTF_8, cause, line_offset)) from None


def _line_and_column(data: bytes, position: int, first_column: int) -> tuple[int, int]:
    """Return the number of lines before a position, and which byte of its line it is, starting at 1."""
    line_start = data.rfind(b"\n", 0, position) + 1
    column = position - line_start + (1 if line_start else first_column)
    return data.count(b"\n", 0, position), column


def _parse(text: str, at_end: bool, first_column: int) -> object:
    try:
        value = parse_fast(text) or STRICT.decode(text)
    except json.JSONDecodeError as error:
        raise _syntax_error(error, at_end, first_column) from None
    except RecursionError:
        raise RecordError(Fault(FaultKind.TOO_DEEP, "nested too deeply; a chat needs a few levels")) from None
    # `value_fault` can only find something behind such an escape, or where more brackets open than it allows.
    if _is_suspicious(text) or text.count("[") + text.count("{") > MAX_DEPTH:
        fault = value_fault(value)
        if fault is not None:
            raise RecordError(fault)
    return value


def parse_fast(text: str) -> object:
    """Return an object in which no key occurs twice; None where that, or anything else, needs a closer look."""
    if not text.startswith("{") or _SPACED_KEY.search(text):
        return None
    try:
        value: object = _FAST.decode(text)
    except (ValueError, RecursionError, RecordError):
        return None
    # Each key is a quote and a colon in the text. A text may begin with a colon too, but then the counts differ.
    return value if text.count('":') == _count_keys(value) else None


def _count_keys(value: object) -> int:
    """Count the keys of a value at all depths."""
    count, pending = 0, [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            count += len(item)
            pending += item.values()
        elif isinstance(item, list):
            pending += item
    return count


def _is_suspicious(text: str) -> bool:
    """Whether the values may contain a NUL or half a character."""
    return bool(
        "\0" in text
        or ("\\u" in text and _SUSPICIOUS_ESCAPE.search(text))
        or (not text.isascii() and _SURROGATE.search(text))
    )


def _syntax_error(error: json.JSONDecodeError, at_end: bool, first_column: int) -> RecordError:
    if at_end and _breaks_off(error):
        return _cut(error.doc.count("\n"))
    column = error.colno + (first_column - 1 if error.lineno == 1 else 0)
    hint = next((hint for start, hint in _HINTS.items() if error.msg.startswith(start)), "")
    if error.doc[error.pos : error.pos + 1] == "'":
        hint = "JSON has double quotes only"
    elif error.doc.strip() == "{":
        hint = ON_ONE_LINE
    elif error.doc[error.pos :].strip() == ",":
        hint = "remove the comma behind the record; lines have none between them"
    cause = error.msg.removesuffix(" at").removesuffix(" starting")
    message = f"not valid JSON at column {column}: {printable(cause)}"
    return RecordError(Fault(FaultKind.BAD_JSON, f"{message}; {hint}" if hint else message, error.lineno - 1))


def _breaks_off(error: json.JSONDecodeError) -> bool:
    """Whether an object breaks off at the end of the text, rather than going wrong before it."""
    text = error.doc.rstrip()
    if not text.startswith("{"):
        return False
    # A literal or an escape that is cut in two is reported at its start, a few characters before the end.
    in_token = len(text) - error.pos < 10 and not text.endswith(("}", "]"))
    return error.pos >= len(text) or in_token or error.msg.startswith("Unterminated")


def _cut(line_offset: int) -> RecordError:
    return RecordError(Fault(FaultKind.CUT, "the file ends in the middle of a record; get the whole file", line_offset))


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        twin = next(key for at, key in enumerate(keys) if key in keys[:at])
        fail(FaultKind.DUPLICATE_KEY, f"the key {quoted(twin)} occurs twice in one object; keep one")
    return value


def _constant(name: str) -> NoReturn:
    fail(FaultKind.NOT_FINITE, f"{name} is not a JSON number; use null, or leave the key out")


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        fail(FaultKind.HUGE_NUMBER, f"an integer of {len(digits)} digits; write it as a text")
    return int(digits)


def _float(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        fail(FaultKind.NOT_FINITE, f"the number {printable(digits, 20)} is too large; write it as a text")
    return number


STRICT = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_int=_integer, parse_float=_float)
# Three times as fast, since it does not list the keys of each object.
_FAST = json.JSONDecoder(parse_constant=_constant, parse_int=_integer, parse_float=_float)
