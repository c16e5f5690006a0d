"""Read Parquet files, with pyarrow if it is installed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from kolotune.foundation.errors import DataError, ToolchainError

from .faults import Fault, FaultKind
from .printable import printable
from .records import ParsedRecord
from .shapes import KNOWN_COLUMNS, columns_fault
from .value_checks import value_fault

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

_BATCH = 128


def read_parquet(path: Path) -> Iterator[ParsedRecord]:
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
            fault = columns_fault(columns)
            if fault is not None:
                yield ParsedRecord(1, fault=fault)
                return
            yield from _records(file, [name for name in columns if name in KNOWN_COLUMNS])
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError):
            raise
        cause = printable(str(error), 120)
        raise DataError(f"{path}: can't be read as Parquet: {cause}", "Get the file again; it may be cut.") from error


def _records(file: pyarrow.parquet.ParquetFile, columns: list[str]) -> Iterator[ParsedRecord]:
    number = 0
    for batch in file.iter_batches(batch_size=_BATCH, columns=columns):
        for index in range(batch.num_rows):
            number += 1
            yield _record(number, batch.slice(index, 1))


def _record(number: int, one: pyarrow.RecordBatch) -> ParsedRecord:
    try:
        # A map column comes as a list of pairs, a dictionary column as its values; the rest as in JSON.
        record = one.to_pylist()[0]
    except UnicodeDecodeError:
        fault = Fault(FaultKind.BAD_UTF_8, "a text of this record is not UTF-8; write the file again")
        return ParsedRecord(number, fault=fault)
    return ParsedRecord(number, record, value_fault(record))
