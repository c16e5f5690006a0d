"""Chats from standard input (``-``) or a pipe: kept in a file, since a run reads its chats more than once."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from pathlib import Path
from typing import BinaryIO

from kolotune.foundation.cache import cache_folder
from kolotune.foundation.errors import DataError

_HEAD_BYTES = 4096
_BOM = b"\xef\xbb\xbf"
_PIPE = re.compile(r"/dev/(?:fd|stdin)\b|/proc/self/fd/")
# The first bytes of files whose format is not JSON Lines.
_FORMATS = (
    (b"PAR1", ".parquet"), (b"\x1f\x8b", ".jsonl.gz"), (b"\x28\xb5\x2f\xfd", ".jsonl.zst"), (b"BZh", ".jsonl.bz2"),
    (b"\xfd7zX", ".jsonl.xz"), (b"PK\x03\x04", ".xlsx"),
)  # fmt: skip


def is_pipe(path: object) -> bool:
    """Whether a path names standard input or a pipe of this process."""
    return str(path) == "-" or _PIPE.match(str(path)) is not None


def saved_pipe(path: object) -> Path:
    """Read a pipe to its end, and return the file that it is kept in: the same for the same content.

    Raises:
        DataError: Nothing comes.
    """
    if str(path) in ("-", "/dev/stdin"):
        return _saved(sys.stdin.buffer)
    with open(str(path), "rb") as stream:
        return _saved(stream)


def _saved(stream: BinaryIO) -> Path:
    folder = cache_folder("piped")
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{os.getpid()}.partial"
    digest, head = hashlib.sha256(), b""
    try:
        with partial.open("wb") as out:
            while data := stream.read(1 << 20):
                head = head or data[:_HEAD_BYTES]
                digest.update(data)
                out.write(data)
        if not head:
            raise DataError("no chats came from standard input", "Pipe a file: cat chats.jsonl | kolotune run -")
        suffix = next((suffix for start, suffix in _FORMATS if head.startswith(start)), None)
        suffix = suffix or (".csv" if _is_table(head) else ".jsonl")
        path = folder / f"{digest.hexdigest()[:16]}{suffix}"
        partial.replace(path)
        return path
    finally:
        partial.unlink(missing_ok=True)


def _is_table(head: bytes) -> bool:
    """Whether the first line has columns, and nothing of JSON."""
    first = next(iter(head.removeprefix(_BOM).split(b"\n")))
    return not re.match(rb"\s*[\[{]", first) and b"{" not in first and re.search(rb"[,;\t|]", first) is not None
