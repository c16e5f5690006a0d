"""One line a message, without colours, for files and pipes."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence

from kolotune.foundation.formatting import format_duration, format_fields

from .clean_text import clean
from .protocol import Progress


class PlainReporter:
    """Print one line a message."""

    seconds_between, least_seconds = 30.0, 2.0
    table_width = 118

    def doing(self, text: str) -> None:
        self._line(f"... {text}")

    def success(self, text: str) -> None:
        self._line(f"ok  {text}")

    def note(self, text: str) -> None:
        self._line(f"    {text}")

    def warning(self, text: str) -> None:
        self._line(f"warning: {text}")

    def failure(self, cause: str, hint: str, exit_code: int = 1) -> None:
        del exit_code
        print(clean(f"error: {cause}"), file=sys.stderr)
        if hint:
            print(clean(f"       {hint}"), file=sys.stderr, flush=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        cells = [[Text(clean(cell)) for cell in row] for row in (columns, *rows)]
        grid = Table.grid(padding=(0, 2, 0, 0))
        for column in zip(*cells, strict=True):
            # Long texts are wrapped; names and paths stay whole, to be copied, however wide that makes the table.
            grid.add_column(min_width=max(len(word) for cell in column for word in ["", *cell.plain.split()]))
        for row in cells:
            grid.add_row(*row)
        console = Console(width=self.table_width, color_system=None, force_terminal=False)
        with console.capture() as captured:
            console.print(grid, crop=False)
        self._line(title)
        for line in captured.get().splitlines():
            self._line(f"  {line}".rstrip())

    def result(self, text: str, **fields: object) -> None:
        del fields
        self._line(text)

    @contextlib.contextmanager
    def progress(self, title: str) -> Iterator[Progress]:
        yield _PlainProgress(self, title)

    def _line(self, text: str) -> None:
        print(f"{clean(text)}\n", end="", flush=True)  # in one piece: threads report, too


class _PlainProgress:
    """Print a line for every tenth that is done, and after some silence: 30 s, later a twentieth of the time so far.

    So a log of hours stays short, and one of minutes shows that work continues.
    """

    def __init__(self, reporter: PlainReporter, title: str) -> None:
        self._reporter, self._title = reporter, title
        self._started = self._printed = 0.0
        self._first: int | None = None
        self._tenth = -1

    def update(self, done: int, total: int, **fields: object) -> None:
        now = time.monotonic()
        if self._first is None:  # a resumed count does not start at 0
            self._first, self._started = done, now
        if not self._is_due(now, done, total):
            return
        self._printed, self._tenth = now, _tenth(done, total)
        parts = [f"{self._title} {done}/{total}"]
        if total > 0:
            parts.append(f"{100 * done // total}%")
        elapsed, counted = now - self._started, done - self._first
        if counted > 0 and done < total and elapsed >= self._reporter.least_seconds:
            parts.append(f"{format_duration(elapsed / counted * (total - done))} left")
        self._reporter.note(", ".join([*parts, *format_fields(fields)]))

    def _is_due(self, now: float, done: int, total: int) -> bool:
        silent = now - self._printed
        if self._tenth < 0 or done >= total:
            return True
        if _tenth(done, total) > self._tenth and silent >= self._reporter.least_seconds:
            return True
        return silent >= max(self._reporter.seconds_between, (now - self._started) / 20)


def _tenth(done: int, total: int) -> int:
    return 10 * done // total if total > 0 else 0
