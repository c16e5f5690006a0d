"""Messages of trials that run at the same time: each line names its trial."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence

from kolotune.foundation.reporter import JsonReporter, PlainReporter, Progress, Reporter


class TrialReporter(PlainReporter):
    """Passes the messages of one trial on to a shared reporter.

    Tables are dropped: all trials would show the same settings. A failure is kept in `cause`, and whoever ends the
    trial reports it.

    Args:
        reporter: shared by all trials.
        name: of the trial.
        lock: shared by all trials.

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

    def result(self, text: str, **fields: object) -> None:
        del fields
        self.note(text)

    @contextlib.contextmanager
    def progress(self, title: str) -> Iterator[Progress]:
        """Show lines, because several progress bars would overwrite each other; or progress events for programs."""
        if not isinstance(self._reporter, JsonReporter):
            with super().progress(title) as lines:
                yield lines
            return
        with self._reporter.progress(f"{self._name}: {title}") as events:
            yield _LockedProgress(events, self._lock)


class _LockedProgress:
    def __init__(self, progress: Progress, lock: threading.Lock) -> None:
        self._progress, self._lock = progress, lock

    def update(self, done: int, total: int, **fields: object) -> None:
        with self._lock:
            self._progress.update(done, total, **fields)
