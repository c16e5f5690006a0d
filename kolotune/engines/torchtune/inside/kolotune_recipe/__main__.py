"""``python -m kolotune_recipe TASK``: trains as the JSON file TASK says, and answers in lines of JSON."""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from pathlib import Path

from .events import DisagreementError, NotFiniteError, emit

_WATCH_STDIN = "KOLOTUNE_WATCH_STDIN"
_STDIN = 0
_ENDINGS = ("ChildFailedError", "RendezvousTimeoutError", "RendezvousConnectionError", "SignalException")


def main(task_file: str) -> int:
    """Runs the task; returns the exit code. What goes wrong is told as an event of kind `error`."""
    watched = _end_with_parent()
    try:
        task = json.loads(Path(task_file).read_text(encoding="utf-8"))
        if task["torchrun"] and "RANK" not in os.environ:
            return _start_processes(task["torchrun"], watched)
        if os.environ.get("LOCAL_RANK") == "0" and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
            emit("again")
        from .recipe import run

        run(task)
    except Exception as error:
        traceback.print_exc()
        if not _lost_another(error):  # else torchrun starts all of them again
            emit("error", kind=_kind_of(error), text=(str(error).splitlines() or [type(error).__name__])[0])
        return 1
    return 0


def _start_processes(arguments: list[str], watched: bool) -> int:
    """Starts this machine's processes by torchrun, and waits for them; returns the exit code."""
    os.environ[_WATCH_STDIN] = str(int(watched))
    from torch.distributed import run

    try:
        run.main(arguments)
    except Exception as error:
        if type(error).__name__ not in _ENDINGS:
            raise
        emit("lost", text=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
        return 1
    return 0


def _kind_of(error: Exception) -> str:
    if isinstance(error, NotFiniteError):
        return "not finite"
    if isinstance(error, DisagreementError):
        return "disagreement"
    text = str(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        return "memory"
    return "other"


def _lost_another(error: Exception) -> bool:
    """Whether it says that another process is gone. PyTorch has its own classes for that with NCCL; gloo has words."""
    if "RANK" not in os.environ:
        return False
    from torch.distributed import DistError

    return isinstance(error, DistError) or "gloo" in str(error).lower()


def _end_with_parent() -> bool:
    """Ends this process when the driver is gone: its end of the pipe on standard input closes then.

    Returns whether the driver asks for that: children that get the same standard input may watch it too.
    """
    asked = os.environ.pop(_WATCH_STDIN, "") == "1"
    if asked:
        threading.Thread(target=_wait_for_the_end, daemon=True).start()
    return asked


def _wait_for_the_end() -> None:
    while os.read(_STDIN, 65536):
        pass
    os._exit(1)  # at once: checkpoints are whole or invisible at every moment


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
