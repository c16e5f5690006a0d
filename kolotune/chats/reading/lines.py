"""Lines of a file as bytes, in bounded memory, and files in an encoding other than UTF-8."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from .faults import Fault, FaultKind

MAX_LINE_BYTES = 16 << 20
"""Longest line, or record of a JSON array. Anything longer is not a chat but a damaged file."""

BLANK = b" \t\r\n\v\f"
BOM = b"\xef\xbb\xbf"
_SKIP_BYTES = 1 << 16


@dataclass(frozen=True)
class Line:
    """One line as bytes, with its line break."""

    number: int
    data: bytes
    too_long: bool = False


def bounded_lines(stream: BinaryIO) -> Iterator[Line]:
    """Yield the lines of a binary file, never holding much more than `MAX_LINE_BYTES`.

    The data of a line that is too long is only a quote if it has an odd number of quotes, so that a CSV reader still
    finds where the record ends.
    """
    number = 0
    while data := stream.readline(MAX_LINE_BYTES + 2):
        number += 1
        if len(data.rstrip(b"\r\n")) <= MAX_LINE_BYTES:
            yield Line(number, data)
            continue
        quotes = data.count(b'"')
        while data and not data.endswith(b"\n"):
            data = stream.readline(_SKIP_BYTES)
            quotes += data.count(b'"')
        yield Line(number, b'"\n' if quotes % 2 else b"\n", too_long=True)


def too_long() -> Fault:
    """Return the fault of a line, or of a record, over the limit."""
    limit = MAX_LINE_BYTES >> 20
    return Fault(FaultKind.TOO_LONG, f"longer than {limit} MiB, which is too long for a chat; split it or remove it")


def foreign_encoding(stream: BinaryIO) -> Fault | None:
    """Recognise UTF-16 and UTF-32 by their first bytes; leave the stream at its start."""
    head = stream.read(4)
    stream.seek(0)
    zeros = "".join("x" if byte else "0" for byte in head)
    # UTF-32 first: its little-endian mark starts with UTF-16's.
    if head in (b"\xff\xfe\0\0", b"\0\0\xfe\xff") or zeros in ("x000", "000x"):
        name = "UTF-32"
    elif head[:2] in (b"\xff\xfe", b"\xfe\xff") or zeros in ("x0x0", "0x0x"):
        name = "UTF-16"
    else:
        return None
    return Fault(FaultKind.ENCODING, f"the file is {name}, so none of it was read; save it as UTF-8")
