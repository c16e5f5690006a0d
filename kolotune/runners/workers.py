"""Work shared out to processes of this machine: pure work, whose results come back in the order of the tasks.

A worker is this module, started by `local`. It gets what it is to do, then one task after another, pickled, on its
standard input, and answers on its standard output. The input's end is its end: a parent that was killed leaves none.
"""

from __future__ import annotations

import gc
import importlib
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from queue import SimpleQueue
from typing import Any, BinaryIO, TypeVar

from kolotune.foundation.errors import KolotuneError, TemplateError
from kolotune.foundation.files import results

from . import limits, local

_MOST = 4  # each takes some 80 MB
_AHEAD = 2  # tasks that wait for each worker

Task = TypeVar("Task")
Result = TypeVar("Result")


def available() -> int:
    """How many workers this machine has room for."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _MOST)


class Pool:
    """Processes that do work for this one; made by `pool`."""

    def __init__(self, workers: Sequence[_Worker]) -> None:
        self._workers = workers

    def in_order(self, work: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """Does each task in one of the processes; here when there are fewer than 2.

        Args:
            work: what is done with a task; it, the tasks and the results must be picklable, and come from modules that
                a new process can import.
            tasks: taken as they are needed, a few ahead.

        Yields:
            The results, in the order of the tasks.

        Raises:
            KolotuneError: a worker came to an end of its own.
            Exception: whatever `work` raised.
        """
        if not self._workers:
            yield from map(work, tasks)
            return
        free: SimpleQueue[_Worker] = SimpleQueue()
        for worker in self._workers:
            worker.work = work
            free.put(worker)

        def do(task: Task) -> Result:
            worker = free.get()
            try:
                result: Result = worker.do(task)
            finally:
                free.put(worker)
            return result

        count = len(self._workers)
        with ThreadPoolExecutor(count) as threads:  # they only wait for the processes
            yield from results(threads, (partial(do, task) for task in tasks), count * _AHEAD)


@contextmanager
def pool(count: int, *modules: str) -> Iterator[Pool]:
    """`count` processes for the time of the block; with fewer than 2, the work is done here.

    Args:
        count: how many.
        modules: what they load at once, while this process gets the work ready.
    """
    with ExitStack() as stack:
        yield Pool([stack.enter_context(_started(modules)) for _ in range(count if count > 1 else 0)])


class _Worker:
    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None and process.stdout is not None
        self._process = process
        self._in, self._out = process.stdin, process.stdout
        self.work: Any = None  # what it is to do, until it knows

    def do(self, task: Any) -> Any:
        try:
            if self.work is not None:
                self._send(self.work)
                self.work = None
            self._send(task)
            good, result = pickle.load(self._out)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            if reason := limits.verdict(self._process.wait()):
                raise TemplateError(f"the chat template can't be used: {reason} for one chat") from None
            raise KolotuneError("a worker process ended before its work was done", "Is there memory left?") from error
        if not good:
            raise result
        return result

    def _send(self, what: Any) -> None:
        pickle.dump(what, self._in, pickle.HIGHEST_PROTOCOL)
        self._in.flush()


@contextmanager
def _started(modules: Sequence[str]) -> Iterator[_Worker]:
    # One thread of the tokenizers' own in each: there is a process for each core.
    with local.piped(local.python(__name__, *modules), {"TOKENIZERS_PARALLELISM": "false"}) as process:
        yield _Worker(process)


def _main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    limits.confine()  # what it is to do may include a chat template
    tasks, answers = sys.stdin.buffer, _own_output()
    for name in sys.argv[1:]:
        importlib.import_module(name)
    try:
        work = pickle.load(tasks)
    except EOFError:  # there was nothing to do
        return
    # Looking for cycles among a chunk's many objects takes a tenth of the time, and there are hardly any.
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)
    while True:
        try:
            task = pickle.load(tasks)
        except EOFError:
            return
        try:
            answer: Any = (True, work(task))
        except Exception as error:
            answer = (False, error)
        try:
            pickle.dump(answer, answers, pickle.HIGHEST_PROTOCOL)
            answers.flush()
        except OSError:  # the parent is gone
            return


def _own_output() -> BinaryIO:
    """Standard output for the answers alone: what anything prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return answers


if __name__ == "__main__":
    _main()
