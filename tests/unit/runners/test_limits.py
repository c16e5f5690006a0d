"""Limits of a process that runs strangers' programs; also as on Windows, which has neither timers nor `resource`."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from kolotune.runners import limits

CALL = """
import sys, types
from kolotune.runners import limits
if sys.argv[1] == "win32":
    limits.sys = types.SimpleNamespace(platform="win32")
limits.SECONDS = 0.3
limits._GRACE_SECONDS = 0.5
limits.confine()
print(limits.call(lambda: 1), flush=True)
exec(sys.argv[2])
"""
LOOP = "limits.call(lambda: [None for _ in iter(int, 1)])"
ONE_STEP = "limits.call(lambda: sum(range(10**11)))"


def run(system: str, code: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-c", CALL, system, code]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60)


def test_a_loop_is_interrupted() -> None:
    done = run("linux", f"try:\n    {LOOP}\nexcept limits.LimitExceeded as error:\n    print(error)")
    assert (done.returncode, done.stdout) == (0, f"1\n{limits.TIME_EXCEEDED}\n")


def test_a_single_step_of_python_is_ended() -> None:
    done = run("linux", ONE_STEP)
    assert (done.returncode, done.stdout) == (-signal.SIGVTALRM, "1\n")
    assert limits.exceeded_by(done.returncode) == limits.TIME_EXCEEDED


@pytest.mark.parametrize("code", [LOOP, ONE_STEP])
def test_on_windows_the_process_is_ended(code: str) -> None:
    began = time.monotonic()
    done = run("win32", code)
    assert (done.returncode, done.stdout) == (1, "1\n")
    assert "Timeout" in done.stderr
    assert time.monotonic() - began < 30


def test_on_windows_a_call_that_ends_leaves_no_timer() -> None:
    done = run("win32", "import time; time.sleep(1.5); print(2)")
    assert (done.returncode, done.stdout) == (0, "1\n2\n")


def test_on_windows_libraries_have_no_limits_and_exit_codes_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "sys", SimpleNamespace(platform="win32"))
    monkeypatch.setitem(sys.modules, "resource", None)
    with limits.library_limits(1, 1):
        pass
    assert limits.exceeded_by(1) == limits.exceeded_by(-signal.SIGVTALRM) == ""


def test_a_library_that_takes_too_long_is_ended() -> None:
    code = "from kolotune.runners import limits\nwith limits.library_limits(1, 1 << 34):\n    sum(iter(lambda: 1, 0))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGXCPU
