"""Locks between processes, on a file. The system frees the lock of a process that dies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class LockHeld(Exception):
    """Another process holds the lock."""


@contextmanager
def hold(file: Path, seconds: float | None = None) -> Iterator[None]:
    """Hold the lock of a file while the block runs. The file is made, and stays.

    Args:
        file: its content is of no importance; on Windows nobody can read it meanwhile.
        seconds: how long to wait for another process; None waits until it is done.

    Raises:
        LockHeld: another process holds it for longer.
        OSError: the file can't be made.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(file)
    try:
        lock.acquire(timeout=-1 if seconds is None else seconds)
    except Timeout:
        raise LockHeld(file) from None
    try:
        yield
    finally:
        lock.release()


def is_held(file: Path) -> bool:
    """Whether a process holds the lock of a file."""
    try:
        with hold(file, 0):
            return False
    except LockHeld:
        return True
