"""Tables of chats: CSV, TSV and Parquet; one row is one record, its columns are the keys."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kolotune.foundation.errors import DataError, ToolchainError

from .faults import Fault, printable, quoted, value_fault
from .json_files import MAX_LINE_BYTES, Line, Row, bounded_lines, foreign_encoding, too_long
from .records import KNOWN_COLUMNS, recognise, unknown_shape

_BATCH = 128


class _Lines:
    """Lines of a CSV file as text for `csv.reader`, which remembers the lines that are no good.

    A bad line must still reach the reader, for its quotes say where records end; its fault is asked for when
    the record is whole.
    """

    def __init__(self, lines: Iterator[Line]) -> None:
        self._lines = lines
        self._faults: dict[int, Fault] = {}

    def __iter__(self) -> Iterator[str]:
        for line in self._lines:
            data = line.data.removeprefix(b"\xef\xbb\xbf") if line.number == 1 else line.data
            if line.too_long:
                self._faults[line.number] = too_long()
            try:
                yield data.decode()
            except UnicodeDecodeError as error:
                cause = f"byte {error.start + 1} of the line (0x{data[error.start]:02x}) is no UTF-8"
                self._faults[line.number] = Fault("bad-utf-8", f"{cause}; save the file as UTF-8")
                yield data.decode(errors="replace")

    def fault(self, start: int, end: int) -> Fault | None:
        """The first fault of the lines from `start` to `end`, with its distance from `start`."""
        number = next((number for number in sorted(self._faults) if start <= number <= end), 0)
        fault = self._faults.get(number)
        self._faults.clear()
        return fault and Fault(fault.kind, fault.message, number - start)


def read_csv(path: Path) -> Iterator[Row]:
    """Reads a CSV or TSV file; its first row names the columns.

    Args:
        path: the file; ``.tsv`` means tabs, in others a semicolon is recognised by the header.

    Yields:
        A row for each record. After a broken quote nothing more is read, and the fault says so.

    Raises:
        OSError: the file can't be read.
    """
    # A limit for the process, and 128 KiB unless set: less than a long chat.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_BYTES))
    with path.open("rb") as stream:
        fault = foreign_encoding(stream)
        if fault is not None:
            yield Row(1, fault=fault)
            return
        lines = _Lines(bounded_lines(stream))
        reader = csv.reader(lines, delimiter=_delimiter(path), strict=True)
        yield from _csv_rows(lines, reader)


def _delimiter(path: Path) -> str:
    if path.suffix.lower() == ".tsv":
        return "\t"
    with path.open("rb") as stream:
        header = stream.readline(4096)
    # Spreadsheets write semicolons where the comma is the decimal sign.
    return next((mark for mark in ",;\t" if mark.encode() in header), ",")


def _csv_rows(lines: _Lines, reader: Any) -> Iterator[Row]:
    columns: list[str] = []
    while True:
        start = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Row(start, fault=_csv_fault(error))
            return
        fault = lines.fault(start, reader.line_num)
        if fault is None and not cells:
            continue
        if not columns:
            columns = [cell.strip() for cell in cells]
            fault = fault or _columns_fault(columns)
            if fault is not None:
                yield Row(start, fault=fault)
                return
        elif fault is not None:
            yield Row(start, fault=fault)
        else:
            yield _csv_row(start, columns, cells)


def _csv_fault(error: csv.Error) -> Fault:
    if "unexpected end" in str(error):
        return Fault("cut", "a quote is opened and never closed, or the file is cut; from here nothing was read")
    return Fault("bad-csv", f"not valid CSV: {printable(str(error), 80)}; from here on nothing was read")


def _csv_row(line: int, columns: list[str], cells: list[str]) -> Row:
    if len(cells) != len(columns):
        cause = f"{len(cells)} fields where the header has {len(columns)}; quote fields that hold commas"
        return Row(line, fault=Fault("field-count", cause))
    return _checked(line, dict(zip(columns, cells, strict=True)))


def _checked(line: int, record: dict[str, Any]) -> Row:
    return Row(line, record, value_fault(record))


def _columns_fault(columns: list[str]) -> Fault | None:
    """Columns that fit no shape are told once, and not again for each row."""
    twin = next((name for name, count in Counter(columns).items() if count > 1), None)
    if twin is not None:
        return Fault("duplicate-key", f"two columns are named {quoted(twin)}; all rows were left out, rename one")
    if not recognise(dict.fromkeys(columns)):
        fault = unknown_shape(columns)
        return Fault(fault.kind, f"{fault.message}; all rows were left out")
    return None


def read_parquet(path: Path) -> Iterator[Row]:
    """Reads a Parquet file.

    Args:
        path: the file.

    Yields:
        A row for each record; `Row.line` is the number of the row, counted from 1.

    Raises:
        DataError: it is no Parquet file, or a damaged one.
        ToolchainError: pyarrow is not installed.
        OSError: the file can't be read.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ToolchainError(
            f"{printable(str(path), 200)}: reading Parquet needs pyarrow", "pip install pyarrow"
        ) from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = list(file.schema_arrow.names)
            fault = _columns_fault(columns)
            if fault is not None:
                yield Row(1, fault=fault)
                return
            used = [name for name in columns if name in KNOWN_COLUMNS]
            yield from _parquet_rows(file, used)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError):
            raise
        cause = printable(str(error), 120)
        raise DataError(f"{path}: can't be read as Parquet: {cause}", "Get the file anew; it may be cut.") from error


def _parquet_rows(file: Any, columns: list[str]) -> Iterator[Row]:
    number = 0
    for batch in file.iter_batches(batch_size=_BATCH, columns=columns):
        for index in range(batch.num_rows):
            number += 1
            yield _parquet_row(number, batch.slice(index, 1))


def _parquet_row(number: int, one: Any) -> Row:
    try:
        # A map column comes as a list of pairs, a dictionary column as its values; the rest is as in JSON.
        return _checked(number, one.to_pylist()[0])
    except UnicodeDecodeError:
        return Row(number, fault=Fault("bad-utf-8", "a text of this row is no UTF-8; write the file anew"))
