"""A pool of worker processes for pure work, with results in the order of the tasks.

A worker is this module, started by `local`. It reads the function and then one task after another, pickled, from its
standard input, and answers on its standard output. It exits at the end of its input, so a killed parent leaves none.

`concurrent.futures.ProcessPoolExecutor` does not do this. Its workers survive a killed parent, because they hold both
ends of their queue. A broken pool does not report the exit code of a worker, by which `limits` recognizes a chat
template that ran too long. And before Python 3.14, `map` consumes all tasks at once.
"""

from __future__ import annotations

import gc
import importlib
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from queue import SimpleQueue
from typing import BinaryIO, TypeVar, cast

from kolotune.foundation.errors import KolotuneError, TemplateError
from kolotune.foundation.free_memory import return_free_memory
from kolotune.foundation.hardware import cores
from kolotune.foundation.ordered_tasks import results_in_order

from . import limits, local, signals

_MAX_WORKERS = 4  # each takes some 80 MB
_LOOK_AHEAD = 2  # tasks that wait for each worker

Task = TypeVar("Task")
Result = TypeVar("Result")


def available() -> int:
    """Return how many workers this machine can run at the same time."""
    return min(cores(), _MAX_WORKERS)


class Pool:
    """Worker processes; made by `pool`."""

    def __init__(self, workers: Sequence[_Worker]) -> None:
        self._workers = workers

    def map(self, work: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """Do each task in one of the workers, or in this process when there are fewer than 2.

        Args:
            work: the function to call with each task. It, the tasks and the results must be picklable, and come from
                modules that a new process can import.
            tasks: consumed as needed, a few ahead.

        Yields:
            The results, in the order of the tasks.

        Raises:
            KolotuneError: a worker died.
            Exception: whatever `work` raised.
        """
        if not self._workers:
            yield from map(work, tasks)
            return
        idle: SimpleQueue[_Worker] = SimpleQueue()
        for worker in self._workers:
            worker.work = work
            idle.put(worker)

        def do(task: Task) -> Result:
            worker = idle.get()
            try:
                return cast(Result, worker.do(task))
            finally:
                idle.put(worker)

        count = len(self._workers)
        with ThreadPoolExecutor(count) as threads:  # they only wait for the processes
            yield from results_in_order(threads, (partial(do, task) for task in tasks), count * _LOOK_AHEAD)


@contextmanager
def pool(count: int, *modules: str) -> Iterator[Pool]:
    """Run `count` workers while the block runs; with fewer than 2, this process does the work.

    Args:
        count: the number of processes.
        modules: what they import at once, while this process prepares the tasks.
    """
    with ExitStack() as stack:
        yield Pool([stack.enter_context(_started(modules)) for _ in range(count if count > 1 else 0)])


class _Worker:
    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None and process.stdout is not None
        self._process = process
        self._in, self._out = process.stdin, process.stdout
        self.work: object = None  # the function, until it has been sent

    def do(self, task: object) -> object:
        try:
            if self.work is not None:
                self._send(self.work)
                self.work = None
            self._send(task)
            is_done, result = pickle.load(self._out)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            if reason := limits.exceeded_by(self._process.wait()):
                raise TemplateError(f"the chat template can't be used: {reason} for one chat") from None
            raise KolotuneError("a worker process ended before its work was done", "Is there memory left?") from error
        if not is_done:
            raise result
        return result

    def _send(self, value: object) -> None:
        pickle.dump(value, self._in, pickle.HIGHEST_PROTOCOL)
        self._in.flush()


@contextmanager
def _started(modules: Sequence[str]) -> Iterator[_Worker]:
    # The tokenizers library gets one thread in each: there is one process per core.
    with local.piped(local.python(__name__, *modules), {"TOKENIZERS_PARALLELISM": "false"}) as process:
        yield _Worker(process)


def _main() -> None:
    signals.ignore_ctrl_c()
    limits.confine()  # the work may include a chat template
    tasks, answers = sys.stdin.buffer, _own_output()
    for name in sys.argv[1:]:
        importlib.import_module(name)
    try:
        work = pickle.load(tasks)
    except EOFError:  # there was nothing to do
        return
    return_free_memory()
    # Looking for cycles among a chunk's many objects takes a tenth of the time, and there are hardly any.
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)
    while True:
        try:
            task = pickle.load(tasks)
        except EOFError:
            return
        answer: tuple[bool, object]
        try:
            answer = (True, work(task))
        except Exception as error:
            answer = (False, error)
        try:
            pickle.dump(answer, answers, pickle.HIGHEST_PROTOCOL)
            answers.flush()
        except OSError:  # the parent is gone
            return


def _own_output() -> BinaryIO:
    """Return standard output for the answers alone; whatever else is printed goes to standard error."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return answers


if __name__ == "__main__":
    _main()
