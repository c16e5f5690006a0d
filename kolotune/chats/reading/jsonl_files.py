"""Read JSON Lines files: one JSON value a line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from .faults import Fault, FaultKind
from .lines import BLANK, BOM, bounded_lines, foreign_encoding, too_long
from .records import AnyRecord, ParsedRecord, RawRecord
from .strict_json import ON_ONE_LINE


def read_jsonl(path: Path) -> Iterator[AnyRecord]:
    """Yield every line that is not blank; of indented objects nothing but one fault.

    Raises:
        OSError: The file can't be read.
    """
    with path.open("rb") as stream:
        fault = foreign_encoding(stream)
        if fault is not None:
            yield ParsedRecord(1, fault=fault)
            return
        if (number := _indented(stream)) is not None:
            cause = f"not valid JSON Lines: {ON_ONE_LINE}; nothing was read"
            yield ParsedRecord(number, fault=Fault(FaultKind.BAD_JSON, cause))
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


def _indented(stream: BinaryIO) -> int | None:
    """Return the line of the first record if it opens there and continues in the next line; None for JSON Lines."""
    head = stream.read(4096).removeprefix(BOM)
    stream.seek(0)
    lines = [(number, line.strip(BLANK)) for number, line in enumerate(head.split(b"\n"), 1) if line.strip(BLANK)]
    if len(lines) < 2:
        return None
    (number, first), (_, second) = lines[:2]
    opens = first.startswith(b"{") and first.endswith((b"{", b"["))
    return number if opens and (second.startswith(b'"') or (first.endswith(b"[") and second == b"{")) else None
