"""Limits of time and memory for programs that strangers wrote: a model's chat template is such a program.

Such a program runs in a process that may be lost (`confine`), and each call of it through `call`. The system's own
timers watch processor time. The first timer raises an exception where Python gets to see it; the second one ends the
process, because a single step of Python (a power, say) may take hours. Memory is limited by the size of the address
space, which Linux enforces. macOS and Windows don't: there the time limit stops a program that takes too much.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn, TypeVar

SECONDS = 4.0
"""Processor time of one call."""
BYTES = 768 << 20
"""Memory that one call may take beyond what the process has."""
_GRACE_SECONDS = 1.0  # between the timer that raises and the one that ends the process
_SIZES = Path("/proc/self/statm")

TIME_EXCEEDED = f"it takes more than {SECONDS:.0f} s of processor time"
MEMORY_EXCEEDED = f"it takes more than {BYTES >> 20} MB of memory"

Result = TypeVar("Result")

_confined = False
_base_bytes = 0  # the process's address space when it was measured last


class LimitExceeded(BaseException):
    """A call took too much. Not an `Exception`: the program that is stopped must not be able to catch it."""


def confine() -> None:
    """Prepare this process for running strangers' programs. Call it in the main thread."""
    global _confined
    _confined = True
    if sys.platform != "win32":
        signal.signal(signal.SIGPROF, _raise)
        signal.signal(signal.SIGVTALRM, signal.SIG_DFL)


def is_confined() -> bool:
    """Whether `confine` was called in this process."""
    return _confined


def call(work: Callable[[], Result]) -> Result:
    """Return the result of `work`, which may take `SECONDS` and `BYTES`; only in a confined process.

    Raises:
        LimitExceeded: it took more. One second later the process is ended: see `exceeded_by`.
    """
    assert _confined
    try:
        return _limited(work)
    except MemoryError:
        # Other work may have made the process larger since it was measured: try once more with the full allowance.
        if not _measure():
            raise LimitExceeded(MEMORY_EXCEEDED) from None
    try:
        return _limited(work)
    except MemoryError:
        raise LimitExceeded(MEMORY_EXCEEDED) from None


@contextlib.contextmanager
def library_limits(seconds: int, memory: int) -> Iterator[None]:
    """Limit a process that runs a stranger's program in a library, which no exception reaches: the system ends it.

    Args:
        seconds: processor time within the block.
        memory: bytes that the process may write to, in the block and afterwards; only Linux enforces it.
    """
    if sys.platform == "win32":  # which has no such limits for a process
        yield
        return
    import resource

    for limit, most in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_DATA, memory)):
        resource.setrlimit(limit, (most, most))
    soft, hard = resource.getrlimit(resource.RLIMIT_CPU)
    used = math.ceil(time.process_time())
    resource.setrlimit(resource.RLIMIT_CPU, (used + seconds, hard))
    yield
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


def exceeded_by(exit_code: int | None) -> str:
    """Describe the limit that ended a confined process, from its exit code; "" when no limit did, or on Windows."""
    if sys.platform == "win32":  # the exit code there is that of any failure
        return ""
    return TIME_EXCEEDED if exit_code == -signal.SIGVTALRM else ""


def _limited(work: Callable[[], Result]) -> Result:
    _set_timers(SECONDS)
    _limit_memory(BYTES)
    try:
        return work()
    finally:
        _set_timers(0)
        _limit_memory(0)


def _set_timers(seconds: float) -> None:
    """Start the timers, or stop them with 0; the first one repeats."""
    if sys.platform != "win32":
        signal.setitimer(signal.ITIMER_PROF, seconds, _GRACE_SECONDS if seconds else 0)
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds + _GRACE_SECONDS if seconds else 0)
        return
    import faulthandler  # it has no such timers; this thread ends the process too

    if seconds:
        faulthandler.dump_traceback_later(seconds + _GRACE_SECONDS, exit=True)
    else:
        faulthandler.cancel_dump_traceback_later()


def _limit_memory(more: int) -> None:
    """Limit the address space to its size plus `more` bytes, where that can be measured; 0 removes the limit."""
    if sys.platform == "win32" or not (_base_bytes or _measure()):
        return
    import resource

    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    soft = _base_bytes + more if more else hard
    resource.setrlimit(resource.RLIMIT_AS, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def _measure() -> bool:
    """Measure the process; False where that is not possible, or it has not grown."""
    global _base_bytes
    if sys.platform == "win32":
        return False
    try:
        size = int(_SIZES.read_text(encoding="ascii").split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return False
    has_grown, _base_bytes = size > _base_bytes, max(size, _base_bytes)
    return has_grown


def _raise(*_: object) -> NoReturn:
    raise LimitExceeded(TIME_EXCEEDED)
