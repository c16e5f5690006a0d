"""Records of a table: its columns are the keys, and its cells are checked like parsed JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from kolotune.foundation.typed_storage import JsonObject

from .faults import Fault, FaultKind
from .printable import quoted
from .records import ParsedRecord
from .shapes import recognise, unknown_shape
from .value_checks import value_fault


def columns_fault(columns: Sequence[str]) -> Fault | None:
    """Return the fault of columns that fit no shape; it is reported once, not for each record."""
    twin = next((name for name, count in Counter(columns).items() if count > 1), None)
    if twin is not None:
        return Fault(
            FaultKind.DUPLICATE_KEY, f"two columns are named {quoted(twin)}, so no record was read; rename one"
        )
    if not recognise(dict.fromkeys(columns)):
        fault = unknown_shape(columns)
        return Fault(fault.kind, f"{fault.detail}; no record was read")
    return None


def table_record(line: int, record: JsonObject) -> ParsedRecord:
    """Return one record of a table, with the fault of its cells if there is one."""
    return ParsedRecord(line, record, value_fault(record))
