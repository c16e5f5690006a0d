"""Signals and sessions of processes, as each system has them.

On Windows no process can ask another one to stop: a signal ends it at once, and its handlers do not run. There a
process of ours ends in good order by Ctrl-C, or when its parent closes its standard input (`watchdog`).
"""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import TypedDict

from kolotune.foundation.errors import Terminated

_AGAIN_SECONDS = 0.05  # for Python to leave the code that can't raise
_CONTROL_C_EXIT = 0xC000013A  # what Windows says of a process that Ctrl-C ended


class Detached(TypedDict, total=False):
    """Arguments of `subprocess.Popen`."""

    start_new_session: bool
    creationflags: int


def interrupt_on_termination() -> None:
    """Handle a request to stop like Ctrl-C, so that child processes end and the state is recorded.

    Where Python calls code that can't raise, such as a callback of its import locks, or `__del__`, it drops what the
    handler raises, and the process would continue. There the signal is raised again.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    if sys.unraisablehook is not _raise_again:
        _report.append(sys.unraisablehook)
        sys.unraisablehook = _raise_again


def ignore_ctrl_c() -> None:
    """Leave Ctrl-C to the parent; a terminal sends it to all of its processes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def request_stop(process: int) -> None:
    """Ask a process to stop; on Windows, end it. It may have ended by itself."""
    gone = OSError if sys.platform == "win32" else ProcessLookupError
    with contextlib.suppress(gone):
        os.kill(process, signal.SIGTERM)


def stop_this_process() -> None:
    """Ask this process to stop, from any of its threads."""
    if sys.platform == "win32":  # a signal would end it before it could stop its own children
        _thread.interrupt_main()
    else:
        os.kill(os.getpid(), signal.SIGTERM)


def was_stopped(exit_code: int) -> bool:
    """Whether a process was stopped before it could handle the request."""
    if sys.platform == "win32":
        return exit_code in (signal.SIGTERM, _CONTROL_C_EXIT)
    return exit_code in (-signal.SIGTERM, -signal.SIGINT)


def leave_terminal() -> None:
    """Take this process out of reach of its terminal, and of Ctrl-C there."""
    if sys.platform != "win32":
        os.setsid()


def detached() -> Detached:
    """Return what starts a child process that is out of reach of the terminal and survives its end."""
    if sys.platform == "win32":
        return {"creationflags": subprocess.DETACHED_PROCESS | subprocess.CREATE_NEW_PROCESS_GROUP}
    return {"start_new_session": True}


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise Terminated


_report: list[Callable[[sys.UnraisableHookArgs], object]] = []
"""The hook before ours, which prints."""


def _signal_main_thread(number: signal.Signals) -> None:
    if sys.platform == "win32":
        _thread.interrupt_main(number)
    else:
        signal.pthread_kill(threading.main_thread().ident or 0, number)


def _raise_again(dropped: sys.UnraisableHookArgs) -> None:
    if issubclass(dropped.exc_type, KeyboardInterrupt):
        number = signal.SIGTERM if issubclass(dropped.exc_type, Terminated) else signal.SIGINT
        timer = threading.Timer(_AGAIN_SECONDS, _signal_main_thread, (number,))
        timer.daemon = True
        timer.start()
    else:
        _report[-1](dropped)
