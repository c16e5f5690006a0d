"""Records as the training's objective wants them: chats, pairs of answers, or answers that are labelled."""

from __future__ import annotations

from collections.abc import Sequence

from kolotune.foundation.objectives import LearnsFrom

from .documents import document_columns_fault
from .faults import Fault
from .preferences import preference_columns_fault, read_preference
from .reading_options import DEFAULT, ReadingOptions
from .shapes import ShapedRecord, columns_fault, read_record


def read_objective_record(record: object, options: ReadingOptions = DEFAULT) -> ShapedRecord:
    """Read a parsed record, or the faults that keep it from being what the objective learns from."""
    return read_record(record, options) if _wants_chats(options) else read_preference(record, options)


def objective_columns_fault(columns: Sequence[str], options: ReadingOptions = DEFAULT) -> Fault | None:
    """Return the fault of a table's columns that fit no record that the objective learns from."""
    if options.learns_from is LearnsFrom.TEXT:
        return document_columns_fault(columns, options)
    return columns_fault(columns, options) if _wants_chats(options) else preference_columns_fault(columns, options)


def _wants_chats(options: ReadingOptions) -> bool:
    return options.learns_from is LearnsFrom.CHATS
