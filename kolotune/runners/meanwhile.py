"""Work that child processes or the network do while this process does something else."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from kolotune.foundation.errors import KolotuneError

from . import local


@contextmanager
def done_meanwhile(tasks: Sequence[Callable[[], object]]) -> Iterator[None]:
    """Do tasks while the block runs, each in a thread; wait for them at its end.

    Their purpose is what they leave in the cache: one that fails is left to whoever needs it, and fails there. If the
    block raises, what they run is stopped.
    """

    def attempt(task: Callable[[], object]) -> None:
        with suppress(KolotuneError, OSError):
            task()

    threads = [threading.Thread(target=attempt, args=(task,), daemon=True) for task in tasks]
    for thread in threads:
        thread.start()
    try:
        yield
        for thread in threads:
            thread.join()
    except BaseException:
        for thread in threads:
            local.stop_child_of(thread.ident or 0)
        for thread in threads:
            thread.join()
        raise
