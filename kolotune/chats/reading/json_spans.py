"""Find the parts of a large JSON text without parsing it, and the line of each part.

Example: the parts of ``[{"a": 1}, {"b": [2, 3]}]`` are the spans of the two objects. One damaged record then costs
only itself: the records around it are still parsed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from .faults import Fault, FaultKind
from .lines import BLANK, MAX_LINE_BYTES, too_long
from .records import ParsedRecord, parsed_record

ByteSpan = tuple[int, int]

# A string ends at the end of its line even if it isn't closed: JSON has no line breaks in strings, and a lost quote
# then spoils one record and not the rest of the file.
_TOKEN = re.compile(rb'"[^"\\\n]*+(?:\\[^\n][^"\\\n]*+)*+"?|[\[\]{},]')
_KEY = re.compile(rb'\s*"([^"\\]*+)"\s*:\s*')
_BLANKS = re.compile(rb"[ \t\r\n\v\f]*+")
_OPENERS = {0x5D: 0x5B, 0x7D: 0x7B}


def skip_blank(data: bytes, position: int) -> int:
    """Return the position of the next byte that is not blank."""
    # Not lstrip(), which would copy a file of a gigabyte.
    match = _BLANKS.match(data, position)
    return match.end() if match else position


def split(data: bytes, opening: int) -> tuple[list[ByteSpan], int]:
    """Find the parts of a JSON array or object.

    Args:
        data: The text.
        opening: The position of its ``[`` or ``{``.

    Returns:
        The spans between its commas, and the position behind its closing bracket, or -1 if it has none. Brackets that
        don't match are skipped; parsing the part reports them.
    """
    parts: list[ByteSpan] = []
    open_brackets = bytearray()
    # Counted, since searching a deep stack at each bracket would take a hostile file forever.
    count = {0x5B: 0, 0x7B: 0}
    begin = opening + 1
    for token in _TOKEN.finditer(data, opening):
        byte = data[token.start()]
        if byte in b"[{":
            open_brackets.append(byte)
            count[byte] += 1
        elif byte in b"]}":
            _close(open_brackets, count, _OPENERS[byte])
            if not open_brackets:
                parts.append((begin, token.start()))
                return parts, token.end()
        elif byte == 0x2C and len(open_brackets) == 1:
            parts.append((begin, token.start()))
            begin = token.end()
    parts.append((begin, len(data)))
    return parts, -1


def _close(open_brackets: bytearray, count: dict[int, int], opener: int) -> None:
    """Remove the innermost `opener` and what is open inside it; a stray closing bracket removes nothing."""
    closed = 0 if count[opener] else opener
    while closed != opener:
        closed = open_brackets.pop()
        count[closed] -= 1


def keys_of(data: bytes, parts: list[ByteSpan]) -> set[bytes]:
    """Return the keys of the members at these spans of an object."""
    return {key[1] for begin, _ in parts if (key := _KEY.match(data, begin))}


def list_value(data: bytes, begin: int) -> int:
    """Return where the list opens that is the value of the member at `begin`, or -1 if the value is not a list."""
    key = _KEY.match(data, begin)
    return key.end() if key and data[key.end() : key.end() + 1] == b"[" else -1


class JsonText:
    """A JSON text whose spans are parsed one by one, in rising order."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self._line, self._line_start, self._counted = 1, 0, 0

    def line_at(self, position: int) -> int:
        """Return the line of a position, counted from 1."""
        newlines = self.data.count(b"\n", self._counted, position)
        if newlines:
            self._line += newlines
            self._line_start = self.data.rindex(b"\n", self._counted, position) + 1
        self._counted = max(self._counted, position)
        return self._line

    def record(self, first: int, stop: int, at_end: bool = False) -> ParsedRecord:
        """Parse the record between two positions."""
        line = self.line_at(first)
        if stop - first > MAX_LINE_BYTES:
            return ParsedRecord(line, fault=too_long())
        return parsed_record(line, self.data[first:stop].rstrip(BLANK), at_end, first - self._line_start + 1)

    def member_fault(self, begin: int, stop: int) -> Fault | None:
        """Return what is wrong with one ``"key": value`` of an object, or None."""
        return parsed_record(1, b"{" + self.data[begin:stop] + b"}").fault

    def trailing(self, end: int, stop: int, after: str) -> Iterator[ParsedRecord]:
        """Yield a fault if there is text between a closing bracket and the end."""
        first = skip_blank(self.data, end)
        if first < stop:
            several = self.data[first : first + 1] == b"{"
            hint = "write each record on one line (`jq -c .` does)" if several else "is a comma missing?"
            cause = f"not valid JSON: more text after {after}, none of it was read; {hint}"
            yield ParsedRecord(self.line_at(first), fault=Fault(FaultKind.BAD_JSON, cause))

    def unclosed(self) -> ParsedRecord:
        """Return the fault of a text that ends too early, at its last line."""
        last = self.line_at(len(self.data.rstrip(BLANK)))
        cause = "the file ends before its closing bracket; get the whole file"
        return ParsedRecord(last, fault=Fault(FaultKind.CUT, cause))
