"""Read Parquet files, with pyarrow if it is installed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from kolotune.foundation.errors import DataError, ToolchainError

from .documents import text_keys
from .faults import Fault, FaultKind
from .json_values import is_filled
from .objective_records import objective_columns_fault
from .printable import printable
from .reading_options import ReadingOptions
from .record_keys import READ_KEYS, canonical
from .records import ParsedRecord
from .value_checks import value_fault

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

_BATCH = 128


def read_parquet(path: Path, options: ReadingOptions) -> Iterator[ParsedRecord]:
    """Yield the records of a Parquet file, with their number, starting at 1, as line.

    Raises:
        DataError: The file is not Parquet, or damaged.
        ToolchainError: pyarrow is not installed.
        OSError: The file can't be read.
    """
    shown = printable(str(path), 200)
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ToolchainError(f"{shown}: reading Parquet needs pyarrow", "pip install pyarrow") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = list(file.schema_arrow.names)
            fault = objective_columns_fault(columns, options)
            if fault is not None:
                yield ParsedRecord(1, fault=fault)
                return
            mapped = {key for key, _ in options.parts} | text_keys(options)
            read = {name for name in columns if canonical(name) in READ_KEYS | mapped}
            kept = [name for name in columns if name in read or canonical(name) not in options.ignored]
            yield from _records(file, kept, read)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError):
            raise
        cause = printable(str(error), 120)
        raise DataError(f"{path}: can't be read as Parquet: {cause}", "Get the file again; it may be cut.") from error


def _records(file: pyarrow.parquet.ParquetFile, columns: list[str], read: set[str]) -> Iterator[ParsedRecord]:
    number = 0
    for batch in file.iter_batches(batch_size=_BATCH, columns=columns):
        for index in range(batch.num_rows):
            number += 1
            yield _record(number, batch.slice(index, 1), read)


def _record(number: int, one: pyarrow.RecordBatch, read: set[str]) -> ParsedRecord:
    try:
        # A map column comes as a list of pairs, a dictionary column as its values; the rest as in JSON.
        row = one.to_pylist()[0]
    except UnicodeDecodeError:
        fault = Fault(FaultKind.BAD_UTF_8, "a text of this record is not UTF-8; write the file again")
        return ParsedRecord(number, fault=fault)
    # Dates, bytes and others are fine in a column that is not read.
    record = {name: _without_nulls(value) if name in read else _shown(value) for name, value in row.items()}
    return ParsedRecord(number, record, value_fault(record))


def _without_nulls(value: object) -> object:
    """Return a value without the keys that are null: a struct has every key that any record has."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _shown(value: object) -> object:
    """Return a value that is not read as a text, or nothing if it says nothing."""
    return str(value) if is_filled(value) else None
