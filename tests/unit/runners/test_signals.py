"""Signals and sessions: both branches, the one of Windows with what can be had of it here."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from kolotune.runners import signals

WAITS = "import signal, sys, time; print(1, flush=True); time.sleep(60)"


@pytest.fixture
def on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "sys", SimpleNamespace(platform="win32"))


@pytest.fixture
def child() -> subprocess.Popen[str]:
    """A process that waits."""
    process = subprocess.Popen([sys.executable, "-c", WAITS], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "1\n"
    return process


def test_a_process_that_is_asked_to_stop_stops(child: subprocess.Popen[str]) -> None:
    signals.request_stop(child.pid)
    code = child.wait(20)
    assert code == -signal.SIGTERM and signals.was_stopped(code)
    signals.request_stop(child.pid)  # it is gone


def test_a_process_that_is_gone_is_no_error_on_windows(on_windows: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(process: int, number: int) -> None:
        raise OSError(22, "The parameter is incorrect")

    monkeypatch.setattr(os, "kill", kill)
    signals.request_stop(1)


def test_an_error_other_than_that_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(process: int, number: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "kill", kill)
    with pytest.raises(PermissionError):
        signals.request_stop(1)


@pytest.mark.parametrize("code", [0, 1, 2, 137, -signal.SIGKILL, -signal.SIGSEGV])
def test_other_exit_codes_are_not_those_of_a_stop(code: int) -> None:
    assert not signals.was_stopped(code)


def test_exit_codes_of_windows(on_windows: None) -> None:
    assert signals.was_stopped(15) and signals.was_stopped(0xC000013A)
    assert not signals.was_stopped(1) and not signals.was_stopped(-signal.SIGTERM)


def test_a_request_to_stop_is_like_ctrl_c() -> None:
    code = (
        "from kolotune.runners import signals; import time; signals.interrupt_on_termination()\n"
        "try:\n    print(1, flush=True); time.sleep(60)\nexcept KeyboardInterrupt:\n    print('interrupted')"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "1\n"
    signals.request_stop(process.pid)
    assert process.communicate(timeout=20)[0] == "interrupted\n" and process.returncode == 0


def test_ctrl_c_is_left_to_the_parent() -> None:
    code = "from kolotune.runners import signals; import os, signal; signals.ignore_ctrl_c(); os.kill(os.getpid(), 2)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_thread_stops_its_process() -> None:
    code = (
        "from kolotune.runners import signals; import threading, time\n"
        "threading.Thread(target=signals.stop_this_process).start(); time.sleep(60)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGTERM


def test_on_windows_a_thread_interrupts_the_main_thread(on_windows: None) -> None:
    with pytest.raises(KeyboardInterrupt):
        threading.Thread(target=signals.stop_this_process).start()
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            time.sleep(0.01)


def test_a_detached_process_has_a_session_of_its_own() -> None:
    argv = [sys.executable, "-c", "import os; print(os.getsid(0) == os.getpid())"]
    assert subprocess.run(argv, stdout=subprocess.PIPE, text=True, **signals.detached()).stdout == "True\n"
    leave = (
        "from kolotune.runners import signals; import os; signals.leave_terminal(); print(os.getsid(0)==os.getpid())"
    )
    assert subprocess.run([sys.executable, "-c", leave], stdout=subprocess.PIPE, text=True).stdout == "True\n"


def test_a_detached_process_on_windows_has_no_console(on_windows: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "DETACHED_PROCESS", 0x8, raising=False)
    monkeypatch.setattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0x200, raising=False)
    assert signals.detached() == {"creationflags": 0x208}
    before = os.getsid(0)
    signals.leave_terminal()
    assert os.getsid(0) == before


DROPS = """
import os, signal, sys, time, weakref
from kolotune.runners import signals

class Thing:
    def __del__(self):
        if sys.argv[1] == "del":
            stop()

def stop(*_):
    os.kill(os.getpid(), getattr(signal, sys.argv[2]))
    for _ in range(1000):
        pass  # here the handler runs

signals.interrupt_on_termination()
thing = Thing()
watched = weakref.ref(thing, stop if sys.argv[1] == "callback" else None)
try:
    del thing
    time.sleep(30)
except KeyboardInterrupt as error:
    print(type(error).__name__)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="its signals end a process")
@pytest.mark.parametrize("place", ["callback", "del"])
@pytest.mark.parametrize(("number", "expected"), [("SIGTERM", "Terminated"), ("SIGINT", "KeyboardInterrupt")])
def test_a_request_to_stop_is_never_dropped(place: str, number: str, expected: str) -> None:
    """Python drops exceptions in callbacks, such as those of its import locks."""
    ended = subprocess.run(
        [sys.executable, "-c", DROPS, place, number], capture_output=True, text=True, timeout=20, check=True
    )
    assert (ended.stdout.strip(), ended.stderr) == (expected, "")


def test_other_dropped_errors_are_reported() -> None:
    code = (
        "from kolotune.runners import signals; signals.interrupt_on_termination()\n"
        "class Thing:\n    def __del__(self): raise ValueError('seen')\nThing()"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=True)
    assert "ValueError: seen" in ended.stderr
