"""Read documents: a plain text or Markdown file is one, and so is a record with a text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from .faults import Fault, FaultKind, Problem
from .json_values import is_filled, kind_of
from .lines import BOM, MAX_LINE_BYTES, foreign_encoding
from .printable import printable, quoted
from .reading_options import ReadingOptions
from .record_keys import RecordPart, canonical
from .records import AnyRecord, ParsedRecord, RawRecord
from .value_checks import value_fault

TEXT_KEY = "text"
"""The key of a document's text, unless `--map` names another one."""


class Document(NamedTuple):
    """What a record says.

    Attributes:
        line: Its line.
        text: Its text; None if there is a problem.
        problem: What is wrong with it.
        key: The key of the text, as it is spelled; "" if there is none.
        unread: The other keys that are filled.
    """

    line: int
    text: str | None = None
    problem: Problem | None = None
    key: str = ""
    unread: tuple[str, ...] = ()


def read_text_file(path: Path) -> Iterator[ParsedRecord]:
    """Yield the whole file as one record with a text.

    Raises:
        OSError: The file can't be read.
    """
    with path.open("rb") as stream:
        fault = foreign_encoding(stream)
        data = b"" if fault else stream.read(MAX_LINE_BYTES + 1)
    if len(data) > MAX_LINE_BYTES:
        fault = Fault(FaultKind.TOO_LONG, f"longer than {MAX_LINE_BYTES >> 20} MiB; split it into several files")
    try:
        text = "" if fault else data.removeprefix(BOM).decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start)
        fault = Fault(FaultKind.BAD_UTF_8, "not UTF-8; save the file as UTF-8", line_offset=line)
    if fault:
        yield ParsedRecord(1, fault=fault)
    else:
        record = {TEXT_KEY: text}
        yield ParsedRecord(1, record, value_fault(record))


def read_document(path: Path, record: AnyRecord, options: ReadingOptions) -> Document:
    """Read a record as a document."""
    parsed = record.parse() if isinstance(record, RawRecord) else record
    fault = parsed.fault or _fault(parsed.value, options)
    if fault is not None:
        return Document(parsed.line, problem=Problem(path, parsed.line + fault.line_offset, fault))
    assert isinstance(parsed.value, dict)
    key = _key(list(parsed.value), options)
    others = (name for name, value in parsed.value.items() if name != key and is_filled(value))
    unread = tuple([printable(name, 40) for name in others if canonical(name) not in options.ignored])
    return Document(parsed.line, parsed.value[key], key=key, unread=unread)


def document_columns_fault(columns: Sequence[str], options: ReadingOptions) -> Fault | None:
    """Return the fault of a table without a column of texts."""
    return None if _key(columns, options) else _no_text(columns, options)


def _fault(value: object, options: ReadingOptions) -> Fault | None:
    if not isinstance(value, dict):
        return Fault(FaultKind.NOT_AN_OBJECT, f"is {kind_of(value)}; a document is an object with a text")
    key = _key(list(value), options)
    if not key:
        return _no_text(list(value), options)
    if not isinstance(value[key], str):
        return Fault(FaultKind.NO_TEXT, f"is {kind_of(value[key])}, not a text", field=printable(key, 40))
    if not value[key].strip():
        return Fault(FaultKind.NO_TEXT, "is empty", field=printable(key, 40))
    return None


def _key(keys: Sequence[str], options: ReadingOptions) -> str:
    """Return the key of the text as it is spelled; "" if there is none."""
    names = text_keys(options)
    return next((key for key in keys if canonical(key) in names), "")


def text_keys(options: ReadingOptions) -> frozenset[str]:
    """Return the keys that a text may have, in canonical form."""
    return frozenset(key for key, part in options.parts if part is RecordPart.TEXT) or frozenset({TEXT_KEY})


def _no_text(keys: Sequence[str], options: ReadingOptions) -> Fault:
    wanted = " or ".join(sorted(map(quoted, text_keys(options))))
    given = ", ".join(quoted(key) for key in keys[:6]) or "nothing"
    return Fault(FaultKind.NO_TEXT, f"has no {wanted}, only {given}; --map text=KEY names the key of the text")
