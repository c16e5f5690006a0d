"""Files of JSON records: one a line (JSONL), or an array of them (JSON). Tables stand in `tables`.

A reader yields one `Row` for each record and one for each place that holds none because it is damaged, so
that nothing is passed over in silence.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from kolotune.foundation.errors import DataError

from .faults import Fault, RecordError, printable, quoted
from .strict_json import parse

MAX_LINE_BYTES = 16 << 20
"""Longest line, or record of a JSON array; a longer one is no chat but a damaged file."""

MAX_JSON_BYTES = 1 << 30
"""Largest file that is read as one JSON text; JSON Lines has no such limit."""

_SKIP = 1 << 16
_BLANK = b" \t\r\n\v\f"
_BOM = b"\xef\xbb\xbf"
# A string ends at its line's end even when it isn't closed: JSON has no line breaks in strings, and a lost
# quote then spoils one record and not the rest of the file.
_TOKEN = re.compile(rb'"[^"\\\n]*+(?:\\[^\n][^"\\\n]*+)*+"?|[\[\]{},]')
_KEY = re.compile(rb'\s*"([^"\\]*+)"\s*:\s*')
_BLANKS = re.compile(rb"[ \t\r\n\v\f]*+")
_CHAT_KEYS = {b"instruction", b"prompt", b"question"}
_TURN_KEYS = {b"role", b"from", b"content", b"value"}
_OPENERS = {0x5D: 0x5B, 0x7D: 0x7B}


@dataclass(frozen=True)
class Row:
    """One record of a file, or one damaged place.

    Attributes:
        line: where it starts, counted from 1.
        value: the record as parsed; meaningless with a fault.
        fault: why there is no record here.
    """

    line: int
    value: Any = None
    fault: Fault | None = None


class Unparsed(NamedTuple):
    """One record of a file as bytes: small to send to another process, which parses it.

    Attributes:
        line: where it starts, counted from 1.
        data: the bytes of one JSON value.
        at_end: the file ends right after it, so that it may have been cut.
    """

    line: int
    data: bytes
    at_end: bool

    def row(self) -> Row:
        """The record, or why it is none."""
        return _row(self.line, self.data, self.at_end)


@dataclass(frozen=True)
class Line:
    """One line as bytes, with its line break; `too_long` ones are empty but for their quotes' parity."""

    number: int
    data: bytes
    too_long: bool = False


def bounded_lines(stream: BinaryIO) -> Iterator[Line]:
    """The lines of a file, never holding much more than `MAX_LINE_BYTES`.

    Args:
        stream: the file, opened for reading bytes.

    Yields:
        Each line. Of one that is too long only this is kept: a quote if it has an odd number of them.
    """
    number = 0
    while data := stream.readline(MAX_LINE_BYTES + 2):
        number += 1
        if len(data.rstrip(b"\r\n")) <= MAX_LINE_BYTES:
            yield Line(number, data)
            continue
        quotes = data.count(b'"')
        while data and not data.endswith(b"\n"):
            data = stream.readline(_SKIP)
            quotes += data.count(b'"')
        yield Line(number, b'"\n' if quotes % 2 else b"\n", too_long=True)


def too_long() -> Fault:
    """The fault of a line, or of a record, over the limit."""
    return Fault("too-long", f"longer than {MAX_LINE_BYTES >> 20} MiB, which is no chat; split it or remove it")


def foreign_encoding(stream: BinaryIO) -> Fault | None:
    """Recognises UTF-16 and UTF-32 by their first bytes, and leaves the stream at its start."""
    head = stream.read(4)
    stream.seek(0)
    name = ""
    # UTF-32 first: its little-endian mark starts with UTF-16's.
    if head in (b"\xff\xfe\0\0", b"\0\0\xfe\xff") or (len(head) == 4 and _zeros(head) in ("x000", "000x")):
        name = "UTF-32"
    elif head[:2] in (b"\xff\xfe", b"\xfe\xff") or (len(head) == 4 and _zeros(head) in ("x0x0", "0x0x")):
        name = "UTF-16"
    return Fault("encoding", f"the file is {name}; save it as UTF-8, all of it was left out") if name else None


def _zeros(head: bytes) -> str:
    return "".join("x" if byte else "0" for byte in head)


def read_jsonl(path: Path) -> Iterator[Row | Unparsed]:
    """Reads a file with one JSON value a line.

    Args:
        path: the file.

    Yields:
        Each line that is not blank.

    Raises:
        OSError: the file can't be read.
    """
    with path.open("rb") as stream:
        fault = foreign_encoding(stream)
        if fault is not None:
            yield Row(1, fault=fault)
            return
        for line in bounded_lines(stream):
            if line.too_long:
                yield Row(line.number, fault=too_long())
                continue
            content = line.data.removeprefix(_BOM).strip(_BLANK)
            if content:
                yield Unparsed(line.number, line.data.rstrip(_BLANK), at_end=not line.data.endswith(b"\n"))


def _row(line: int, data: bytes, at_end: bool = False, first_column: int = 1) -> Row:
    try:
        return Row(line, parse(data, at_end, first_column))
    except RecordError as error:
        return Row(line, fault=error.fault)


def is_array(path: Path) -> bool:
    """Tells whether a file named as JSON Lines starts with ``[`` and ends with ``]``."""
    with path.open("rb") as stream:
        head = stream.read(4096).removeprefix(_BOM).lstrip(_BLANK)
        stream.seek(max(0, path.stat().st_size - 4096))
        tail = stream.read().rstrip(_BLANK)
    return head.startswith(b"[") and tail.endswith(b"]")


def read_json(path: Path) -> tuple[str, Iterator[Row | Unparsed]]:
    """Reads a file that is named as JSON: an array, an object around one, one chat, or JSON Lines after all.

    Args:
        path: the file.

    Returns:
        The name of the container that it is, and its rows.

    Raises:
        DataError: the file is too large to be one JSON text.
        OSError: the file can't be read.
    """
    with path.open("rb") as stream:
        fault = foreign_encoding(stream)
        if fault is not None:
            return "JSON", iter([Row(1, fault=fault)])
        data = stream.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        cause = f"{printable(str(path), 200)}: over {MAX_JSON_BYTES >> 30} GiB, too large for one JSON text"
        raise DataError(cause, "Save it as JSON Lines (.jsonl).")
    start = _skip_blank(data, 3 if data.startswith(_BOM) else 0)
    if start == len(data):
        return "JSON", iter([])
    is_open = data[start : start + 1] in (b"[", b"{")
    parts, end = split(data, start) if is_open else ([], -1)
    if _is_lines(data, start, end):
        return "JSONL", read_jsonl(path)
    if not is_open:
        return "JSON", iter([_Places(data).row(start, len(data), at_end=True)])
    read = _array if data[start : start + 1] == b"[" else _object
    return "JSON", read(_Places(data), start, parts, end)


def _skip_blank(data: bytes, position: int) -> int:
    # Not lstrip(): it would copy a file of a gigabyte.
    found = _BLANKS.match(data, position)
    return found.end() if found else position


def _is_lines(data: bytes, start: int, end: int) -> bool:
    """Is this JSON Lines? `end` is where the first value ends, or -1 when it has no end."""
    is_list = data[start : start + 1] == b"["
    if end >= 0:
        more = _skip_blank(data, end)
        on_own_line = data.find(b"\n", start, end) < 0
        if is_list:
            # Not a stray bracket after an array, but a next value on a next line.
            return on_own_line and data.find(b"\n", end, more) >= 0 and data[more : more + 1] in (b"[", b"{")
        return on_own_line and more < len(data)
    if is_list:
        return False
    # A damaged record: its neighbours tell. A single record in one line is the same in both containers.
    head = data[start : start + 2 * MAX_LINE_BYTES]
    lines = [line.strip(_BLANK) for line in head.split(b"\n", 8)[:8] if line.strip(_BLANK)]
    if lines[0].endswith((b"[", b"{", b",")):
        return False  # goes on in the next line, as printed JSON does
    return any(isinstance(_row(1, line).value, dict) for line in lines[:2])


def split(data: bytes, opening: int) -> tuple[list[tuple[int, int]], int]:
    """Finds the parts of a JSON array or object without parsing them.

    Args:
        data: the text.
        opening: the place of its ``[`` or ``{``.

    Returns:
        The spans between its commas, and the place after its closing bracket, or -1 if it has none. Brackets
        that don't match are passed over: parsing the part tells them.
    """
    parts: list[tuple[int, int]] = []
    open_brackets = bytearray()
    # Counted, since searching a deep stack at each bracket would take a hostile file for ever.
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
    """Takes off the innermost `opener` and what was left open inside it; a stray closer takes off nothing."""
    closed = 0 if count[opener] else opener
    while closed != opener:
        closed = open_brackets.pop()
        count[closed] -= 1


class _Places:
    """A JSON text whose places become lines; each place must not stand before the last one asked for."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self._line, self._line_start, self._counted = 1, 0, 0

    def line(self, place: int) -> int:
        """The line of a place, counted from 1."""
        newlines = self.data.count(b"\n", self._counted, place)
        if newlines:
            self._line += newlines
            self._line_start = self.data.rindex(b"\n", self._counted, place) + 1
        self._counted = max(self._counted, place)
        return self._line

    def row(self, first: int, stop: int, at_end: bool = False) -> Row:
        """The record between two places, or why it is none."""
        line = self.line(first)
        if stop - first > MAX_LINE_BYTES:
            return Row(line, fault=too_long())
        return _row(line, self.data[first:stop].rstrip(_BLANK), at_end, first - self._line_start + 1)

    def member(self, begin: int, stop: int) -> Fault | None:
        """What is wrong with one ``"key": value`` of an object."""
        return _row(1, b"{" + self.data[begin:stop] + b"}").fault

    def trailing(self, end: int, stop: int, after: str) -> Iterator[Row]:
        """A fault if any text stands between a closing bracket and the end."""
        first = _skip_blank(self.data, end)
        if first < stop:
            cause = f"not valid JSON: more text after {after}, all of it was left out; is a comma missing?"
            yield Row(self.line(first), fault=Fault("bad-json", cause))

    def unclosed(self) -> Row:
        """The fault of a text that ends too early, at its last line."""
        last = self.line(len(self.data.rstrip(_BLANK)))
        return Row(last, fault=Fault("cut", "the file ends before its closing bracket; get the whole file"))


def _array(places: _Places, start: int, parts: list[tuple[int, int]], end: int) -> Iterator[Row]:
    yield from _elements(places, parts, end)
    if end >= 0:
        yield from places.trailing(end, len(places.data), "the closing bracket")


def _elements(places: _Places, parts: list[tuple[int, int]], end: int) -> Iterator[Row]:
    fault = None
    for number, (begin, stop) in enumerate(parts):
        first = min(_skip_blank(places.data, begin), stop)
        is_last = number == len(parts) - 1
        if first < stop:
            row = places.row(first, stop, at_end=is_last and end < 0)
            fault = row.fault
            if fault is not None and is_last and end < 0 and fault.kind != "cut":
                cause = f"{fault.message}; a bracket is never closed, so the rest of the file was left out"
                row = Row(row.line, fault=Fault(fault.kind, cause, fault.down))
            yield row
        elif not is_last or (number > 0 and end >= 0):
            cause = "not valid JSON: a comma with no record beside it; remove it"
            yield Row(places.line(first), fault=Fault("bad-json", cause))
    if end < 0 and fault is None:
        yield places.unclosed()


def _object(places: _Places, start: int, parts: list[tuple[int, int]], end: int) -> Iterator[Row]:
    """An object is a chat, or it holds the list of chats under one of its keys."""
    data = places.data
    keys = _keys(data, parts)
    lists = [opening for begin, _ in parts if (opening := _list_value(data, begin)) >= 0]
    is_chat = bool(keys & _CHAT_KEYS) or any(_holds_turns(data, opening) for opening in lists)
    if is_chat or not lists:
        yield places.row(start, end if end >= 0 else len(data), at_end=end < 0)
    elif len(lists) > 1:
        names = ", ".join(quoted(key.decode(errors="replace"), 20) for key in sorted(keys)[:8])
        cause = f"an object with {len(lists)} lists (keys {names}); put the one to train on into its own file"
        yield Row(places.line(start), fault=Fault("unknown-shape", cause))
    else:
        yield from _wrapped(places, parts, end)
    if end >= 0:
        yield from places.trailing(end, len(data), "the closing bracket")


def _wrapped(places: _Places, parts: list[tuple[int, int]], end: int) -> Iterator[Row]:
    closed = True
    for begin, stop in parts:
        opening = _list_value(places.data, begin)
        if opening >= 0:
            elements, after = split(places.data, opening)
            yield from _elements(places, elements, after)
            closed = after >= 0
            if closed:
                yield from places.trailing(after, stop, "the list")
            continue
        # What stands beside the list is not used, but damage there is damage of the file.
        fault = places.member(begin, stop)
        if fault is not None and end >= 0:
            yield Row(places.line(_skip_blank(places.data, begin)), fault=Fault(fault.kind, fault.message))
    if end < 0 and closed:
        yield places.unclosed()


def _keys(data: bytes, parts: list[tuple[int, int]]) -> set[bytes]:
    return {key[1] for begin, _ in parts if (key := _KEY.match(data, begin))}


def _list_value(data: bytes, begin: int) -> int:
    """Where the list opens that is the value of the member at `begin`, or -1."""
    key = _KEY.match(data, begin)
    return key.end() if key and data[key.end() : key.end() + 1] == b"[" else -1


def _holds_turns(data: bytes, opening: int) -> bool:
    """Are the elements of this list turns of one chat, and not chats?"""
    first = _skip_blank(data, opening + 1)
    # A turn shows its first key at once; a bound keeps unclosed brackets from costing the whole file.
    head = data[first : first + _SKIP]
    return head.startswith(b"{") and bool(_keys(head, split(head, 0)[0]) & _TURN_KEYS)
