"""Read JSON Lines files: one JSON value a line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from .lines import BLANK, BOM, bounded_lines, foreign_encoding, too_long
from .records import AnyRecord, ParsedRecord, RawRecord


def read_jsonl(path: Path) -> Iterator[AnyRecord]:
    """Yield every line that is not blank.

    Raises:
        OSError: The file can't be read.
    """
    with path.open("rb") as stream:
        fault = foreign_encoding(stream)
        if fault is not None:
            yield ParsedRecord(1, fault=fault)
            return
        for line in bounded_lines(stream):
            if line.too_long:
                yield ParsedRecord(line.number, fault=too_long())
            elif line.data.removeprefix(BOM).strip(BLANK):
                yield RawRecord(line.number, line.data.rstrip(BLANK), at_end=not line.data.endswith(b"\n"))


def is_array(path: Path) -> bool:
    """Whether a file that is named as JSON Lines starts with ``[`` and ends with ``]``."""
    with path.open("rb") as stream:
        head = stream.read(4096).removeprefix(BOM).lstrip(BLANK)
        stream.seek(max(0, path.stat().st_size - 4096))
        tail = stream.read().rstrip(BLANK)
    return head.startswith(b"[") and tail.endswith(b"]")
