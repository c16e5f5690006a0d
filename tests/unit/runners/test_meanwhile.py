"""Work of child processes while this process does something else."""

from __future__ import annotations

import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from kolotune.foundation.errors import ToolchainError
from kolotune.runners import local
from kolotune.runners.meanwhile import done_meanwhile


def test_tasks_run_beside_the_block_and_are_waited_for() -> None:
    started, done = threading.Event(), []

    def task() -> None:
        started.wait(10)
        done.append(1)

    with done_meanwhile([task, task]):
        assert not done
        started.set()
    assert done == [1, 1]


def test_a_task_that_fails_is_left_to_whoever_needs_it() -> None:
    def task() -> None:
        raise ToolchainError("it fails")

    with done_meanwhile([task]):
        pass


def test_what_runs_is_stopped_when_the_block_raises(tmp_path: Path) -> None:
    program = [sys.executable, "-c", "import time; print(1, flush=True); time.sleep(60)"]
    runs, began = threading.Event(), time.monotonic()
    task = partial(local.run, program, log=tmp_path / "log", on_line=lambda line: runs.set() or True)
    with pytest.raises(KeyboardInterrupt), done_meanwhile([task]):
        runs.wait(30)
        raise KeyboardInterrupt
    assert time.monotonic() - began < 30
