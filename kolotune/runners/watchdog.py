"""Stop this process when its parent is gone, whatever ended the parent."""

from __future__ import annotations

import json
import os
import threading
import time

from . import signals

WATCH_STDIN = "KOLOTUNE_WATCH_STDIN"
"""Variable that is 1 for a process whose standard input is a pipe that stays open as long as its parent lives."""

REPORT_PROCESS = "KOLOTUNE_SAY_PROCESS"
"""Variable that is 1 for a process that reports its id in its first line of output, so that it can be signalled."""

_STDIN = 0
_PATIENCE_SECONDS = 20.0


def end_with_parent() -> bool:
    """Watch standard input in a thread, if the parent asks for it, and stop this process when it closes.

    A killed parent can't notify its children, but the system closes its pipes. Unlike process ids and death signals,
    this works on every system and through a container engine. The process is asked to stop, so that it can stop its
    own children, and exits without further ado after 20 seconds.

    Returns:
        Whether standard input is watched; children that inherit it may be asked to watch it too.
    """
    is_watched = os.environ.pop(WATCH_STDIN, "") == "1"
    if is_watched:
        threading.Thread(target=_stop_at_end_of_input, name="end-with-parent", daemon=True).start()
    return is_watched


def report_process() -> None:
    """Print this process's id as a line of JSON, if the parent asks for it."""
    if os.environ.pop(REPORT_PROCESS, "") == "1":
        print(json.dumps({"event": "process", "number": os.getpid()}), flush=True)


def _stop_at_end_of_input() -> None:
    # Not sys.stdin: a waiting thread would hold its lock, and the interpreter would abort when it exits.
    while os.read(_STDIN, 65536):
        pass
    signals.stop_this_process()
    time.sleep(_PATIENCE_SECONDS)
    os._exit(1)
