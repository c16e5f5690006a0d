"""What readers of files yield: one record each, parsed or still as bytes, or one damaged location."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from .faults import Fault, RecordError
from .strict_json import parse


@dataclass(frozen=True)
class ParsedRecord:
    """One record of a file, or one damaged location.

    Attributes:
        line: The line where it starts, counted from 1; in a Parquet file, the number of the record.
        value: The parsed record; meaningless if there is a fault.
        fault: Why there is no record, or None.
    """

    line: int
    value: object = None
    fault: Fault | None = None


class RawRecord(NamedTuple):
    """One record of a file as bytes: small to send to a worker process, which parses it.

    Attributes:
        line: The line where it starts, counted from 1.
        data: The bytes of one JSON value.
        at_end: The file ends right after them, so the record may be cut.
    """

    line: int
    data: bytes
    at_end: bool

    def parse(self) -> ParsedRecord:
        """Parse the record."""
        return parsed_record(self.line, self.data, self.at_end)


AnyRecord: TypeAlias = ParsedRecord | RawRecord


def parsed_record(line: int, data: bytes, at_end: bool = False, first_column: int = 1) -> ParsedRecord:
    """Parse the bytes of one JSON value; see `strict_json.parse` for the arguments."""
    try:
        return ParsedRecord(line, parse(data, at_end, first_column))
    except RecordError as error:
        return ParsedRecord(line, fault=error.fault)
