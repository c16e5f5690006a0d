"""``python -m kolotune_recipe TASK``: trains as the JSON file TASK says, and answers in lines of JSON."""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from pathlib import Path

from .events import NotFiniteError, emit

_STDIN = 0


def main(task_file: str) -> int:
    """Runs the task; returns the exit code. What goes wrong is told as an event of kind `error`."""
    _end_with_parent()
    try:
        task = json.loads(Path(task_file).read_text(encoding="utf-8"))
        from .recipe import run

        run(task)
    except Exception as error:
        traceback.print_exc()
        emit("error", kind=_kind_of(error), text=(str(error).splitlines() or [type(error).__name__])[0])
        return 1
    return 0


def _kind_of(error: Exception) -> str:
    if isinstance(error, NotFiniteError):
        return "not finite"
    text = str(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        return "memory"
    return "other"


def _end_with_parent() -> None:
    """Ends this process when the driver is gone: its end of the pipe on standard input closes then."""
    if os.environ.pop("KOLOTUNE_WATCH_STDIN", "") == "1":
        threading.Thread(target=_wait_for_the_end, daemon=True).start()


def _wait_for_the_end() -> None:
    while os.read(_STDIN, 65536):
        pass
    os._exit(1)  # at once: checkpoints are whole or invisible at every moment


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
