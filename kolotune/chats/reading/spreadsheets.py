"""Read spreadsheets (Excel, OpenDocument), with calamine if it is installed: the first row names the columns."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from kolotune.foundation.errors import DataError, ToolchainError
from kolotune.foundation.installation import install_command

from .faults import Fault, FaultKind
from .objective_records import objective_columns_fault
from .printable import printable, quoted
from .reading_options import ReadingOptions
from .records import ParsedRecord
from .value_checks import value_fault

SPREADSHEETS = (".xlsx", ".xls", ".ods")
_MOST_BYTES = 1 << 30
"""The most that a packed workbook may unpack to; it is read into memory."""
_AS_CSV = "Save the table as CSV (UTF-8); its first line names the columns."


def read_spreadsheet(path: Path, options: ReadingOptions) -> Iterator[ParsedRecord]:
    """Yield the records of the one sheet that has rows, with the number of their row as line.

    Raises:
        DataError: The file is no workbook, is too large, or several of its sheets have rows.
        ToolchainError: calamine is not installed.
        OSError: The file can't be read.
    """
    header: list[str] = []
    for number, cells in enumerate(_rows(path), 1):
        texts = [_text(cell) for cell in cells]
        if not any(texts):
            continue
        if not header:
            header = [text.strip() for text in texts]
            columns = [name for name in header if name]
            if (fault := objective_columns_fault(columns, options)) is not None:
                yield ParsedRecord(number, fault=fault)
                return
            continue
        if any(text for name, text in zip(header, texts, strict=True) if not name):
            cause = "a cell is filled in a column without a name; name the column in the first row"
            yield ParsedRecord(number, fault=Fault(FaultKind.FIELD_COUNT, cause))
            continue
        record = {name: text for name, text in zip(header, texts, strict=True) if name}
        yield ParsedRecord(number, record, value_fault(record))


def _rows(path: Path) -> Sequence[Sequence[object]]:
    shown = printable(str(path), 200)
    try:
        import python_calamine
    except ImportError:
        hint = f"To install it, {install_command('spreadsheets')}. Or: {_AS_CSV}"
        raise ToolchainError(f"{shown}: reading spreadsheets needs python-calamine", hint) from None
    _require_bounded(path, shown)
    try:
        with python_calamine.load_workbook(path) as workbook:
            names = workbook.sheet_names
            sheets = {name: workbook.get_sheet_by_name(name).to_python(skip_empty_area=False) for name in names}
    except (python_calamine.CalamineError, ValueError) as error:
        cause = f"{shown}: can't be read as a spreadsheet: {printable(str(error), 100)}"
        raise DataError(cause, "If it has a password, remove it. " + _AS_CSV) from error
    filled = [name for name, rows in sheets.items() if any(cell != "" for row in rows for cell in row)]
    if not filled:
        raise DataError(f"{shown}: has no rows", "Give a file with at least one chat.")
    if len(filled) > 1:
        several = ", ".join(quoted(name, 30) for name in filled[:4]) + (", …" if len(filled) > 4 else "")
        raise DataError(f"{shown}: {len(filled)} sheets have rows: {several}", f"Keep one. Or: {_AS_CSV}")
    return sheets[filled[0]]


def _require_bounded(path: Path, shown: str) -> None:
    if path.suffix.lower() == ".xls" or not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as packed:
        size = sum(entry.file_size for entry in packed.infolist())
    if size > _MOST_BYTES:
        raise DataError(f"{shown}: unpacks to {size >> 20:,} MiB, too much to be read into memory", _AS_CSV)


def _text(cell: object) -> str:
    """Return what a cell shows; whole numbers are fractions in the file."""
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))
    return str(cell).upper() if isinstance(cell, bool) else str(cell)
