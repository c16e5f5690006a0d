"""What a stranger's program may take of this machine: a model's chat template is a program that came from somewhere.

Such a program runs in a process that can be lost (`confine`), and each call of it within `within`. Processor time is
watched by the system's own timers. The first raises where Python comes to see it; the second ends the process, as it
must where one step of Python's (a power, say) would take for hours. Memory is a limit on the address space, which
Linux enforces; macOS and Windows don't, and there the time is what ends a program that takes too much of it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

SECONDS = 4.0
"""Processor time of one call."""
BYTES = 768 << 20
"""Memory that one call may take beyond what the process has."""
_GRACE_SECONDS = 1.0  # from the limit that raises to the one that ends the process
_SIZES = Path("/proc/self/statm")

TOO_LONG = f"it takes more than {SECONDS:.0f} s of processor time"
TOO_MUCH = f"it takes more than {BYTES >> 20} MB of memory"

Result = TypeVar("Result")

_confined = False
_base = 0  # the process's address space when it was looked at last


class Overrun(BaseException):
    """A call took too much. No `Exception`: the program that is stopped must not be able to catch it."""


def confine() -> None:
    """Makes this process one in which strangers' programs may run. Call it in the main thread."""
    global _confined
    _confined = True
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGPROF, _raise)
        signal.signal(signal.SIGVTALRM, signal.SIG_DFL)


def confined() -> bool:
    """Whether `confine` was called here."""
    return _confined


def within(work: Callable[[], Result]) -> Result:
    """The result of `work`, which may take `SECONDS` and `BYTES`; in a process that is confined.

    Raises:
        Overrun: it took more. A second later the process is ended: see `verdict`.
    """
    assert _confined
    try:
        return _watched(work)
    except MemoryError:
        # Other work may have made the process larger since it was looked at: once more, with all that is promised.
        if not _measure():
            raise Overrun(TOO_MUCH) from None
    try:
        return _watched(work)
    except MemoryError:
        raise Overrun(TOO_MUCH) from None


def verdict(exit_code: int | None) -> str:
    """What a confined process was ended for, by its exit code; "" when no limit ended it."""
    return TOO_LONG if hasattr(signal, "SIGVTALRM") and exit_code == -signal.SIGVTALRM else ""


def _watched(work: Callable[[], Result]) -> Result:
    _arm(SECONDS)
    _allow(BYTES)
    try:
        return work()
    finally:
        _arm(0)
        _allow(0)


def _arm(seconds: float) -> None:
    """Starts the timers, or stops them with 0; the first one goes off again and again."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds, _GRACE_SECONDS if seconds else 0)
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds + _GRACE_SECONDS if seconds else 0)
        return
    import faulthandler  # Windows has no such timers; this thread ends the process too

    if seconds:
        faulthandler.dump_traceback_later(seconds + _GRACE_SECONDS, exit=True)
    else:
        faulthandler.cancel_dump_traceback_later()


def _allow(more: int) -> None:
    """Limits the address space to what there was and `more`; 0 takes the limit away."""
    if not (_base or _measure()):
        return
    import resource

    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    wanted = _base + more if more else hard
    resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def _measure() -> bool:
    """Looks how large the process is; False where that is not to be seen, or not more than before."""
    global _base
    try:
        size = int(_SIZES.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return False
    grown, _base = size > _base, max(size, _base)
    return grown


def _raise(*_: Any) -> NoReturn:
    raise Overrun(TOO_LONG)
