"""Records as the training's objective wants them: chats, pairs of answers, or answers that are labelled."""

from __future__ import annotations

from collections.abc import Sequence

from kolotune.foundation.objectives import LearnsFrom

from .documents import document_columns_fault
from .faults import Fault, FaultKind
from .preferences import preference_columns_fault, read_preference
from .printable import quoted
from .reading_options import DEFAULT, ReadingOptions
from .shapes import ShapedRecord, columns_fault, read_record

_MOST_WORDS = 6  # of a column's name


def read_objective_record(record: object, options: ReadingOptions = DEFAULT) -> ShapedRecord:
    """Read a parsed record, or the faults that keep it from being what the objective learns from."""
    return read_record(record, options) if _wants_chats(options) else read_preference(record, options)


def objective_columns_fault(columns: Sequence[str], options: ReadingOptions = DEFAULT) -> Fault | None:
    """Return the fault of a table's columns that fit no record that the objective learns from."""
    if options.learns_from is LearnsFrom.TEXT:
        fault = document_columns_fault(columns, options)
    elif _wants_chats(options):
        fault = columns_fault(columns, options)
    else:
        fault = preference_columns_fault(columns, options)
    if fault is None or not any(map(_is_sentence, columns)):
        return fault
    shown = ", ".join(quoted(column, 40) for column in columns[:4]) + (", …" if len(columns) > 4 else "")
    cause = f"the first line should name the columns, but looks like a record: {shown}; no record was read"
    return Fault(FaultKind.NO_HEADER, cause)


def _is_sentence(column: str) -> bool:
    """Whether a column's name is none, but a text that somebody would say."""
    return column.rstrip().endswith((".", "?", "!")) or len(column.split()) >= _MOST_WORDS


def _wants_chats(options: ReadingOptions) -> bool:
    return options.learns_from is LearnsFrom.CHATS
