"""The matrices that a compensated quantization has finished, so that one that was killed resumes behind them.

The file is a line with the hash of what the blocks depend on, then for each matrix a line with its name, size and
SHA-256, and its blocks. What a killed process left half-written at the end is cut off.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

_LONGEST_LINE = 4096


class CompensationJournal:
    """Finished matrices on the disk.

    Args:
        path: the file; None: nothing is kept.
        key: hash of all that the blocks depend on; another one starts the file from scratch.
    """

    def __init__(self, path: Path | None, key: str) -> None:
        self._path = path
        self._places: dict[str, tuple[int, int]] = {}
        if path is not None:
            self._end = self._read(path, key)
            if not self._end:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(key.encode() + b"\n")
                self._end = len(key) + 1
            os.truncate(path, self._end)

    def get(self, name: str) -> bytes | None:
        """Return the blocks of a finished matrix; None where it is not finished."""
        if self._path is None or name not in self._places:
            return None
        start, size = self._places[name]
        with self._path.open("rb") as file:
            file.seek(start)
            return file.read(size)

    def add(self, name: str, blocks: bytes) -> None:
        """Keep the blocks of a finished matrix."""
        if self._path is None:
            return
        line = _line(name, blocks)
        with self._path.open("ab") as file:
            file.write(
                line + blocks
            )  # not flushed to the disk: after a crash of the machine its hash says what is whole
        self._places[name] = (self._end + len(line), len(blocks))
        self._end += len(line) + len(blocks)

    def _read(self, path: Path, key: str) -> int:
        """Find the finished matrices; return where the last whole one ends, 0 where nothing can be used."""
        if not path.is_file():
            return 0
        with path.open("rb") as file:
            if file.readline(_LONGEST_LINE) != key.encode() + b"\n":
                return 0
            end = file.tell()
            while entry := _entry(file.readline(_LONGEST_LINE)):
                name, size, digest = entry
                start, blocks = file.tell(), file.read(size)
                if hashlib.sha256(blocks).hexdigest() != digest:
                    break
                self._places[name], end = (start, size), file.tell()
        return end


def _line(name: str, blocks: bytes) -> bytes:
    return f"{len(blocks)} {hashlib.sha256(blocks).hexdigest()} {name}\n".encode()


def _entry(line: bytes) -> tuple[str, int, str] | None:
    """Return name, size and hash of a line; None where it is not whole."""
    parts = line.decode("utf-8", errors="replace").split(" ", 2)
    if len(parts) != 3 or not parts[0].isdigit() or not line.endswith(b"\n"):
        return None
    return parts[2][:-1], int(parts[0]), parts[1]
