"""Colours and a live progress bar, in a terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from kolotune.foundation.formatting import format_fields

from .clean_text import clean
from .protocol import Progress

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID


class RichReporter:
    """Print with rich."""

    narrow = 70

    def __init__(self) -> None:
        from rich.console import Console

        self._out = Console(highlight=False)
        self._err = Console(stderr=True, highlight=False)

    def doing(self, text: str) -> None:
        self._print(text, "yellow")

    def success(self, text: str) -> None:
        self._print(text, "green")

    def note(self, text: str) -> None:
        self._print(text, "")

    def warning(self, text: str) -> None:
        self._print(f"warning: {text}", "bold yellow")

    def failure(self, cause: str, hint: str, exit_code: int = 1) -> None:
        del exit_code
        self._err.print(clean(f"error: {cause}"), style="bold red", markup=False, soft_wrap=True)
        if hint:
            self._err.print(clean(hint), markup=False, soft_wrap=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(clean(title)), title_justify="left")
        for column in columns:
            table.add_column(Text(clean(column)))
        for row in rows:
            table.add_row(*[Text(clean(cell)) for cell in row])
        self._out.print(table)

    def result(self, text: str, **fields: object) -> None:
        del fields
        self._print(text, "")

    @contextlib.contextmanager
    def progress(self, title: str) -> Iterator[Progress]:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar
        from rich.table import Column

        # The fields beside the count get the remaining width; a narrow window has no bar.
        rest = Column(no_wrap=True, overflow="ellipsis", ratio=1)
        columns = (
            TextColumn("{task.description}", style="yellow", markup=False),
            *([BarColumn(bar_width=20)] if self._out.width >= self.narrow else []),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            TextColumn("{task.fields[shown]}", markup=False, table_column=rest),
        )
        with Bar(*columns, console=self._out, transient=False, expand=True) as bar:
            yield _RichProgress(bar, bar.add_task(clean(title), total=None, shown=""))

    def _print(self, text: str, style: str) -> None:
        # The terminal wraps long lines itself, so that a path or a command can be copied whole.
        self._out.print(clean(text), style=style, markup=False, soft_wrap=True)


class _RichProgress:
    def __init__(self, bar: Bar, task: TaskID) -> None:
        self._bar, self._task = bar, task

    def update(self, done: int, total: int, **fields: object) -> None:
        self._bar.update(self._task, completed=done, total=total, shown=clean("  ".join(format_fields(fields))))
