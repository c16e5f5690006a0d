"""Tasks on several threads, with results in the order of the tasks."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def run_in_order(tasks: Iterable[Callable[[], T]]) -> Iterator[T]:
    """Return the results of `tasks` in their order, computed by a thread for each core; few results wait in memory."""
    threads = min(os.cpu_count() or 1, 8)
    with ThreadPoolExecutor(threads) as pool:
        yield from results_in_order(pool, tasks, 4 * threads)


def results_in_order(pool: ThreadPoolExecutor, tasks: Iterable[Callable[[], T]], ahead: int) -> Iterator[T]:
    """Return the results of tasks in their order, computed by a pool.

    Args:
        pool: the threads.
        tasks: started as their results are needed.
        ahead: how many, at most, are started or done before their result is needed.
    """
    waiting: deque[Future[T]] = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(task))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for each in waiting:
            each.cancel()
