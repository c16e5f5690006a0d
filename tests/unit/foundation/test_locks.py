"""Locks between processes: one holds it, others wait or are refused, and a killed process holds none."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kolotune.foundation import locks

HOLD = """
import sys, time
from pathlib import Path
from kolotune.foundation import locks
with locks.hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "a.lock"


def holder(file: Path, seconds: float) -> Iterator[subprocess.Popen[str]]:
    argv = [sys.executable, "-c", HOLD, str(file), str(seconds)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def other(file: Path) -> Iterator[subprocess.Popen[str]]:
    yield from holder(file, 60)


def test_a_lock_is_free_before_and_after(file: Path) -> None:
    assert not locks.is_held(file)
    with locks.hold(file, 0):
        assert locks.is_held(file)
    assert not locks.is_held(file)


def test_an_error_in_the_block_frees_it(file: Path) -> None:
    with pytest.raises(ZeroDivisionError), locks.hold(file):
        raise ZeroDivisionError
    assert not locks.is_held(file)


def test_another_process_is_refused_until_the_holder_is_killed(file: Path, other: subprocess.Popen[str]) -> None:
    with pytest.raises(locks.LockHeld), locks.hold(file, 0.2):
        pytest.fail("two processes hold it")
    assert locks.is_held(file)
    other.kill()
    other.wait()
    with locks.hold(file, 0):
        pass


def test_a_process_waits_for_another(file: Path) -> None:
    for process in holder(file, 1):
        began = time.monotonic()
        with locks.hold(file):
            assert time.monotonic() - began > 0.2
        assert process.wait() == 0


def test_a_file_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(OSError):
        locks.is_held(tmp_path / "file" / "a.lock")
