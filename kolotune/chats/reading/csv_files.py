"""Read CSV and TSV files: the first line names the columns."""

from __future__ import annotations

import csv
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

from .faults import Fault, FaultKind
from .lines import BOM, MAX_LINE_BYTES, Line, bounded_lines, foreign_encoding, too_long
from .objective_records import objective_columns_fault
from .printable import printable
from .reading_options import ReadingOptions
from .records import ParsedRecord
from .value_checks import value_fault

_NAMED_DELIMITER = re.compile(rb'"?sep=([,;\t|])"?\r?\n?')


class _TextLines:
    """Lines as text for `csv.reader`, with the faults of those that are damaged.

    The CSV reader needs damaged lines too, since their quotes decide where records end. The fault is reported
    once the record is complete.
    """

    def __init__(self, lines: Iterator[Line]) -> None:
        self._lines = lines
        self._faults: dict[int, Fault] = {}

    def __iter__(self) -> Iterator[str]:
        for line in self._lines:
            data = line.data.removeprefix(BOM) if line.number == 1 else line.data
            if line.too_long:
                self._faults[line.number] = too_long()
            try:
                yield data.decode()
            except UnicodeDecodeError as error:
                cause = f"byte {error.start + 1} of the line (0x{data[error.start]:02x}) is not UTF-8"
                self._faults[line.number] = Fault(FaultKind.BAD_UTF_8, f"{cause}; save the file as UTF-8")
                yield data.decode(errors="replace")

    def pop_fault(self, start: int, end: int) -> Fault | None:
        """Return the first fault of the lines from `start` to `end`, and forget all."""
        number = next((number for number in sorted(self._faults) if start <= number <= end), 0)
        fault = self._faults.get(number)
        self._faults.clear()
        return fault and dataclasses.replace(fault, line_offset=number - start)


def read_csv(path: Path, options: ReadingOptions) -> Iterator[ParsedRecord]:
    """Yield the records of a CSV or TSV file. After a broken quote nothing more is read, and the fault says so.

    The suffix ``.tsv`` means tabs; in other files the separator is recognised by the header, or named in a line such as
    ``sep=;`` before it, as Excel writes it.

    Raises:
        OSError: The file can't be read.
    """
    # The limit is the process's, and 128 KiB unless set: less than a long chat.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_BYTES))
    with path.open("rb") as stream:
        fault = foreign_encoding(stream)
        if fault is not None:
            yield ParsedRecord(1, fault=fault)
            return
        yield from _records(_TextLines(bounded_lines(stream)), _delimiter(path), options)


def _delimiter(path: Path) -> str:
    if path.suffix.lower() == ".tsv":
        return "\t"
    with path.open("rb") as stream:
        first = stream.readline(4096).removeprefix(BOM)
    if named := _NAMED_DELIMITER.fullmatch(first):
        return named[1].decode()
    # Spreadsheets write semicolons where the comma is the decimal sign.
    return next((mark for mark in ",;\t|" if mark.encode() in first), ",")


def _records(lines: _TextLines, delimiter: str, options: ReadingOptions) -> Iterator[ParsedRecord]:
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    columns: list[str] = []
    while True:
        start = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield ParsedRecord(start, fault=_syntax_fault(error))
            return
        fault = lines.pop_fault(start, reader.line_num)
        if fault is None and not any(map(str.strip, cells)):  # spreadsheets leave rows of separators alone
            continue
        if not columns and _NAMED_DELIMITER.fullmatch(delimiter.join(cells).encode()):
            continue
        if not columns:
            columns = [cell.strip() for cell in cells]
            fault = fault or objective_columns_fault(columns, options)
            if fault is not None:
                yield ParsedRecord(start, fault=fault)
                return
        elif fault is not None:
            yield ParsedRecord(start, fault=fault)
        else:
            yield _record(start, columns, cells)


def _syntax_fault(error: csv.Error) -> Fault:
    if "unexpected end" in str(error):
        return Fault(FaultKind.CUT, "a quote is never closed, or the file is cut; from here on nothing was read")
    return Fault(FaultKind.BAD_CSV, f"not valid CSV: {printable(str(error), 80)}; from here on nothing was read")


def _record(line: int, columns: list[str], cells: list[str]) -> ParsedRecord:
    if len(cells) != len(columns):
        cause = f"{len(cells)} fields where the header has {len(columns)}; quote fields that contain commas"
        return ParsedRecord(line, fault=Fault(FaultKind.FIELD_COUNT, cause))
    record = dict(zip(columns, cells, strict=True))
    return ParsedRecord(line, record, value_fault(record))
