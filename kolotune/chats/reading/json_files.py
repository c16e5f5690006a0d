"""Read JSON files: an array of records, an object around one, a single chat, or JSON Lines with the wrong name.

Each record is yielded, and each damaged location, so that nothing is skipped silently.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from kolotune.foundation.errors import DataError

from .faults import Fault, FaultKind
from .json_spans import ByteSpan, JsonText, keys_of, list_value, skip_blank, split
from .jsonl_files import read_jsonl
from .lines import BLANK, BOM, MAX_LINE_BYTES, foreign_encoding
from .printable import printable, quoted
from .record_keys import CALL_KEYS, CONTENT_KEYS, PAIRS, ROLE_KEYS
from .records import AnyRecord, ParsedRecord, parsed_record

MAX_JSON_BYTES = 1 << 30
"""Largest file that is read as one JSON text; JSON Lines has no such limit."""

_HEAD_BYTES = 1 << 16
_CHAT_KEYS = {key.encode() for key in PAIRS}
_ROLES, _CONTENTS = ({key.encode() for key in keys} for keys in (ROLE_KEYS, (*CONTENT_KEYS, *CALL_KEYS)))
_TURN_KEYS = _ROLES | _CONTENTS


def read_json(path: Path) -> tuple[str, Iterator[AnyRecord]]:
    """Read a file that is named as JSON.

    Returns:
        The name of the file's format ("JSON" or "JSONL"), and its records.

    Raises:
        DataError: The file is too large for one JSON text.
        OSError: The file can't be read.
    """
    with path.open("rb") as stream:
        fault = foreign_encoding(stream)
        if fault is not None:
            return "JSON", iter([ParsedRecord(1, fault=fault)])
        data = stream.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        cause = f"{printable(str(path), 200)}: over {MAX_JSON_BYTES >> 30} GiB, too large for one JSON text"
        raise DataError(cause, "Save it as JSON Lines (.jsonl).")
    start = skip_blank(data, 3 if data.startswith(BOM) else 0)
    if start == len(data):
        return "JSON", iter([])
    is_open = data[start : start + 1] in (b"[", b"{")
    parts, end = split(data, start) if is_open else ([], -1)
    if _is_lines(data, start, end):
        return "JSONL", read_jsonl(path)
    if not is_open:
        return "JSON", iter([JsonText(data).record(start, len(data), at_end=True)])
    read = _array if data[start : start + 1] == b"[" else _object
    return "JSON", read(JsonText(data), start, parts, end)


def _is_lines(data: bytes, start: int, end: int) -> bool:
    """Whether this is JSON Lines; `end` is where the first value ends, or -1 if it has no end."""
    is_list = data[start : start + 1] == b"["
    if end >= 0:
        more = skip_blank(data, end)
        on_one_line = data.find(b"\n", start, end) < 0
        if is_list:
            # Not a stray bracket after an array, but a next value on a next line.
            return on_one_line and data.find(b"\n", end, more) >= 0 and data[more : more + 1] in (b"[", b"{")
        return on_one_line and more < len(data)
    if is_list:
        return False
    # A damaged record: look at its neighbours. A single record in one line is the same in both formats.
    head = data[start : start + 2 * MAX_LINE_BYTES]
    lines = [line.strip(BLANK) for line in head.split(b"\n", 8)[:8] if line.strip(BLANK)]
    if lines[0].endswith((b"[", b"{", b",")):
        return False  # continues in the next line, as indented JSON does
    return any(isinstance(parsed_record(1, line).value, dict) for line in lines[:2])


def _array(text: JsonText, start: int, parts: list[ByteSpan], end: int) -> Iterator[ParsedRecord]:
    if _is_one_chat(text.data, start):
        yield text.record(start, end if end >= 0 else len(text.data), at_end=end < 0)
    else:
        yield from _elements(text, parts, end)
    if end >= 0:
        yield from text.trailing(end, len(text.data), "the closing bracket")


def _elements(text: JsonText, parts: list[ByteSpan], end: int) -> Iterator[ParsedRecord]:
    fault = None
    for number, (begin, stop) in enumerate(parts):
        first = min(skip_blank(text.data, begin), stop)
        is_last = number == len(parts) - 1
        if first < stop:
            record = text.record(first, stop, at_end=is_last and end < 0)
            fault = record.fault
            if fault is not None and is_last and end < 0 and fault.kind != FaultKind.CUT:
                cause = f"{fault.detail}; a bracket is never closed, so the rest of the file was not read"
                record = dataclasses.replace(record, fault=dataclasses.replace(fault, detail=cause))
            yield record
        elif not is_last or (number > 0 and end >= 0):
            cause = "not valid JSON: a comma without a record next to it; remove it"
            yield ParsedRecord(text.line_at(first), fault=Fault(FaultKind.BAD_JSON, cause))
    if end < 0 and fault is None:
        yield text.unclosed()


def _object(text: JsonText, start: int, parts: list[ByteSpan], end: int) -> Iterator[ParsedRecord]:
    """Read an object that is a chat, or that has the list of chats under one of its keys."""
    data = text.data
    keys = keys_of(data, parts)
    lists = [opening for begin, _ in parts if (opening := list_value(data, begin)) >= 0]
    is_chat = bool({key.lower() for key in keys} & _CHAT_KEYS) or any(
        _contains_turns(data, opening) for opening in lists
    )
    if is_chat or not lists:
        yield text.record(start, end if end >= 0 else len(data), at_end=end < 0)
    elif len(lists) > 1:
        names = ", ".join(quoted(key.decode(errors="replace"), 20) for key in sorted(keys)[:8])
        cause = f"an object with {len(lists)} lists (keys {names}); move the list to train on into its own file"
        yield ParsedRecord(text.line_at(start), fault=Fault(FaultKind.UNKNOWN_SHAPE, cause))
    else:
        yield from _list_in_object(text, parts, end)
    if end >= 0:
        yield from text.trailing(end, len(data), "the closing bracket")


def _list_in_object(text: JsonText, parts: list[ByteSpan], end: int) -> Iterator[ParsedRecord]:
    closed = True
    for begin, stop in parts:
        opening = list_value(text.data, begin)
        if opening >= 0:
            elements, after = split(text.data, opening)
            yield from _elements(text, elements, after)
            closed = after >= 0
            if closed:
                yield from text.trailing(after, stop, "the list")
            continue
        # The other members are not used, but damage in them is damage of the file.
        fault = text.member_fault(begin, stop)
        if fault is not None and end >= 0:
            line = text.line_at(skip_blank(text.data, begin))
            yield ParsedRecord(line, fault=dataclasses.replace(fault, line_offset=0))
    if end < 0 and closed:
        yield text.unclosed()


def _contains_turns(data: bytes, opening: int) -> bool:
    """Whether the elements of this list are turns of one chat, not chats."""
    return bool(_keys_of_first(data, opening) & _TURN_KEYS)


def _is_one_chat(data: bytes, opening: int) -> bool:
    """Whether this list is the turns of one chat: its first element has a role and says something."""
    keys = _keys_of_first(data, opening)
    return bool(keys & _ROLES and keys & _CONTENTS)


def _keys_of_first(data: bytes, opening: int) -> set[bytes]:
    """Return the keys of the first element of a list, in lower case."""
    first = skip_blank(data, opening + 1)
    # The first key of a turn comes early; with a limit, unclosed brackets don't cost the whole file.
    head = data[first : first + _HEAD_BYTES]
    return {key.lower() for key in keys_of(head, split(head, 0)[0])} if head.startswith(b"{") else set()
