"""What trials tell that are at work at the same time: each line says whose it is."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from kolotune.foundation.reporter import JsonReporter, PlainReporter, Progress, Reporter


class OneOfSeveral(PlainReporter):
    """Tells a reporter what one of several at work tells.

    Tables are left out: each would show the same settings. A failure is kept, to be told by whom it ends.

    Args:
        reporter: the one of all of them.
        name: of this one.
        lock: what all of them have in common.

    Attributes:
        cause: of the last failure; "" for none.
    """

    def __init__(self, reporter: Reporter, name: str, lock: threading.Lock) -> None:
        self._reporter, self._name, self._lock = reporter, name, lock
        self.cause = ""

    def doing(self, text: str) -> None:
        with self._lock:
            self._reporter.doing(f"{self._name}: {text}")

    def success(self, text: str) -> None:
        with self._lock:
            self._reporter.success(f"{self._name}: {text}")

    def note(self, text: str) -> None:
        with self._lock:
            self._reporter.note(f"{self._name}: {text}")

    def warning(self, text: str) -> None:
        with self._lock:
            self._reporter.warning(f"{self._name}: {text}")

    def failure(self, cause: str, hint: str, exit_code: int = 1) -> None:
        del hint, exit_code
        self.cause = cause

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        del title, columns, rows

    def result(self, text: str, **fields: Any) -> None:
        del fields
        self.note(text)

    @contextlib.contextmanager
    def progress(self, title: str) -> Iterator[Progress]:
        """Lines, as several bars would not stand still; for programs the events of a running count."""
        if not isinstance(self._reporter, JsonReporter):
            with super().progress(title) as lines:
                yield lines
            return
        with self._reporter.progress(f"{self._name}: {title}") as events:
            yield _Alone(events, self._lock)


class _Alone:
    """A running count that nobody else speaks into."""

    def __init__(self, progress: Progress, lock: threading.Lock) -> None:
        self._progress, self._lock = progress, lock

    def update(self, done: int, total: int, **fields: Any) -> None:
        with self._lock:
            self._progress.update(done, total, **fields)
