"""A pool of worker processes."""

from __future__ import annotations

import operator
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import psutil
import pytest

from kolotune.foundation.errors import KolotuneError
from kolotune.runners import workers


@pytest.mark.parametrize("count", [1, 3])
def test_results_are_in_the_order_of_the_tasks(count: int) -> None:
    with workers.pool(count, "fractions") as pool:
        assert list(pool.map(partial(operator.mul, 3), range(50))) == [3 * number for number in range(50)]


def test_workers_without_work_end() -> None:
    before = psutil.Process().children()  # a process that renders templates, of an earlier test
    with workers.pool(2):
        children = [child for child in psutil.Process().children() if child not in before]
    assert len(children) == 2 and not any(child.is_running() for child in children)


def test_tasks_are_consumed_as_needed() -> None:
    consumed = []

    def tasks() -> object:
        for number in range(100):
            consumed.append(number)
            yield number

    with workers.pool(2) as pool:
        results = pool.map(operator.neg, tasks())
        assert next(results) == 0
        assert len(consumed) < 10
        results.close()


@pytest.mark.parametrize("count", [1, 2])
def test_an_error_of_the_work_is_raised(count: int) -> None:
    with workers.pool(count) as pool, pytest.raises(ZeroDivisionError):
        list(pool.map(partial(operator.truediv, 1), [1, 2, 0, 3]))


def test_a_dead_worker_is_an_error() -> None:
    with workers.pool(2) as pool, pytest.raises(KolotuneError):
        list(pool.map(os._exit, [3, 3]))


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no such signal here")
def test_a_killed_parent_leaves_no_worker(tmp_path: Path) -> None:
    program = (
        "import time, sys; from kolotune.runners import workers\n"
        "with workers.pool(2) as pool:\n"
        "    for _ in pool.map(time.sleep, [0.1] * 1000): print('working', flush=True)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        children = psutil.Process(parent.pid).children()
        assert len(children) == 2
        parent.kill()
    ended, alive = psutil.wait_procs(children, timeout=20)
    assert len(ended) == 2 and not alive
