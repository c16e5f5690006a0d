"""Ends this process when the one that started it is gone, however that one ended."""

from __future__ import annotations

import json
import os
import signal
import threading
import time

WATCH_STDIN = "KOLOTUNE_WATCH_STDIN"
"""Set to 1 for a process whose standard input is a pipe that stays open as long as its parent lives."""

SAY_PROCESS = "KOLOTUNE_SAY_PROCESS"
"""Set to 1 for a process that tells its number in its first line of output, to be signalled by it."""

_STDIN = 0
_PATIENCE_SECONDS = 20.0


def end_with_parent() -> bool:
    """Watches standard input from a thread, if the parent asks for it; at its end, stops this process.

    Returns whether it does: children that get the same standard input may be asked to watch it too.

    A killed parent can tell nobody, but the system closes its pipes: that works on every system and through a
    container's engine, where process numbers and death signals don't. The process is asked to stop (SIGTERM), so
    that it can end its own children, and is ended for good when it takes longer than 20 seconds.
    """
    asked = os.environ.pop(WATCH_STDIN, "") == "1"
    if asked:
        threading.Thread(target=_wait_for_the_end, name="end-with-parent", daemon=True).start()
    return asked


def say_process() -> None:
    """Tells this process's number as a line of JSON, if the one that started it asks for it."""
    if os.environ.pop(SAY_PROCESS, "") == "1":
        print(json.dumps({"event": "process", "number": os.getpid()}), flush=True)


def _wait_for_the_end() -> None:
    # Not through sys.stdin: its lock, held by a thread that waits, would abort the interpreter at its end.
    while os.read(_STDIN, 65536):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_PATIENCE_SECONDS)
    os._exit(1)
