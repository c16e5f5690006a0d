"""``python -m kolotune_recipe TASK``: train as the JSON file TASK says, and report events as lines of JSON."""

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
_TORCHRUN_FAILURES = (
    "ChildFailedError", "RendezvousTimeoutError", "RendezvousConnectionError", "SignalException"
)  # fmt: skip


def main(task_file: str) -> int:
    """Run the task; return the exit code. An error is reported as an event."""
    watched = _end_with_parent()
    try:
        task = json.loads(Path(task_file).read_text(encoding="utf-8"))
        if task["torchrun"] and "RANK" not in os.environ:
            return _start_processes(task["torchrun"], watched)
        if os.environ.get("LOCAL_RANK") == "0" and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
            emit("again")
        from .run import run

        run(task)
    except Exception as error:
        traceback.print_exc()
        if not _is_lost_peer(error):  # after a lost peer torchrun restarts all processes
            emit("error", kind=_kind_of(error), text=(str(error).splitlines() or [type(error).__name__])[0])
        return 1
    return 0


def _start_processes(arguments: list[str], watched: bool) -> int:
    """Start this machine's processes with torchrun and wait for them; return the exit code."""
    os.environ[_WATCH_STDIN] = str(int(watched))
    from torch.distributed import run

    try:
        run.main(arguments)
    except Exception as error:
        if type(error).__name__ not in _TORCHRUN_FAILURES:
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


def _is_lost_peer(error: Exception) -> bool:
    """Return whether another process is gone. PyTorch has classes for that with NCCL; gloo only says so in words."""
    if "RANK" not in os.environ:
        return False
    from torch.distributed import DistError

    return isinstance(error, DistError) or "gloo" in str(error).lower()


def _end_with_parent() -> bool:
    """End this process when the driver is gone, which closes the pipe on standard input.

    Returns whether the driver asks for that: children with the same standard input may watch it too.
    """
    watched = os.environ.pop(_WATCH_STDIN, "") == "1"
    if watched:
        threading.Thread(target=_exit_when_stdin_closes, daemon=True).start()
    return watched


def _exit_when_stdin_closes() -> None:
    while os.read(_STDIN, 65536):
        pass
    os._exit(1)  # at once: checkpoints are whole or invisible at every moment


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
