"""The lock of a run folder: one process at a time works in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from kolotune.foundation import locks
from kolotune.foundation.errors import RunFolderError
from kolotune.foundation.files import explained, write_text
from kolotune.run_folder.layout import RunFolder


@contextmanager
def locked(folder: RunFolder) -> Iterator[None]:
    """Keep other processes out of the folder. The system frees the lock of a process that dies.

    Raises:
        RunFolderError: another process works in it.
        SpaceError, ArtifactError: the folder can't be made or written to.
    """
    try:
        folder.state.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise explained(error, folder.root) from error
    holder = folder.lock_holder
    with ExitStack() as held:
        try:
            held.enter_context(locks.hold(folder.lock, 0))
        except locks.LockHeld:
            user = holder.read_text(encoding="utf-8") if holder.is_file() else "another process"
            raise RunFolderError(
                f"{folder.root}: is in use by {user.strip()}", "Wait for it to end, or choose another --output-dir."
            ) from None
        except OSError as error:
            raise explained(error, folder.lock) from error
        held.callback(holder.unlink, missing_ok=True)
        write_text(holder, f"process {os.getpid()}\n")
        yield


def is_locked(folder: RunFolder) -> bool:
    """Whether a process works in the folder. Only the lock knows: a killed process leaves its name behind."""
    if not folder.lock_holder.is_file():
        return False
    try:
        return locks.is_held(folder.lock)
    except OSError:
        return False
