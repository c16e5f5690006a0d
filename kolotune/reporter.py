"""The only place that prints: rich in a terminal, plain lines elsewhere, JSON lines for programs.

Errors are red, successes green, what is being done yellow. Text that comes from files or other programs is
stripped of control characters here, so that nothing can steer the terminal.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
import time
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any, Protocol


class Progress(Protocol):
    """A running count."""

    def update(self, done: int, total: int, **fields: Any) -> None:
        """Shows that `done` of `total` are done; `fields` are shown beside it."""


class Reporter(Protocol):
    """What the rest of kolotune says to the user."""

    def doing(self, text: str) -> None:
        """Says what is being done now."""

    def success(self, text: str) -> None:
        """Says that something is finished."""

    def note(self, text: str) -> None:
        """Says something worth knowing."""

    def warning(self, text: str) -> None:
        """Says something that the user should look at."""

    def failure(self, cause: str, hint: str) -> None:
        """Says what went wrong and what to do."""

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Shows rows of text."""

    def result(self, text: str, **fields: Any) -> None:
        """Prints what was asked for, without any ornament."""

    def progress(self, title: str) -> contextlib.AbstractContextManager[Progress]:
        """Shows a running count while the block runs."""


def clean(text: str) -> str:
    """`text` without control and formatting characters other than newline and tab."""
    return "".join(
        char for char in text if char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
    )


def make_reporter(as_json: bool = False) -> Reporter:
    """The reporter that suits where the output goes."""
    if as_json:
        return JsonReporter()
    return RichReporter() if sys.stdout.isatty() else PlainReporter()


class PlainReporter:
    """One line a message, no colours; for files and pipes."""

    seconds_between = 10.0
    table_width = 118

    def doing(self, text: str) -> None:
        self._line(f"... {text}")

    def success(self, text: str) -> None:
        self._line(f"ok  {text}")

    def note(self, text: str) -> None:
        self._line(f"    {text}")

    def warning(self, text: str) -> None:
        self._line(f"warning: {text}")

    def failure(self, cause: str, hint: str) -> None:
        print(clean(f"error: {cause}"), file=sys.stderr)
        if hint:
            print(clean(f"       {hint}"), file=sys.stderr, flush=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        import textwrap

        cells = [[clean(cell) for cell in row] for row in (columns, *rows)]
        # Long texts share the width, so that a table stays one in a log file.
        widths = [max(len(row[index]) for row in cells) for index in range(len(columns))]
        if sum(widths) + 2 * len(widths) > self.table_width:
            most = max(12, self.table_width // max(1, len(columns)) - 2)
            widths = [min(most, width) for width in widths]
        room = self.table_width - sum(widths) - 2 * len(widths)
        self._line(title)
        for row in cells:
            wrapped = [
                # Names and paths stay whole, to be copied.
                textwrap.wrap(
                    cell,
                    width + (room if index == len(widths) - 1 and room > 0 else 0),
                    break_on_hyphens=False,
                    break_long_words=False,
                )
                or [""]
                for index, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            for parts in itertools.zip_longest(*wrapped, fillvalue=""):
                line = "  ".join(part.ljust(width) for part, width in zip(parts, widths, strict=True))
                self._line(f"  {line}".rstrip())

    def result(self, text: str, **fields: Any) -> None:
        del fields
        self._line(text)

    @contextlib.contextmanager
    def progress(self, title: str) -> Iterator[Progress]:
        yield _PlainProgress(self, title)

    def _line(self, text: str) -> None:
        print(clean(text), flush=True)


class _PlainProgress:
    def __init__(self, reporter: PlainReporter, title: str) -> None:
        self._reporter, self._title = reporter, title
        self._next = 0.0

    def update(self, done: int, total: int, **fields: Any) -> None:
        if time.monotonic() < self._next and done < total:
            return
        self._next = time.monotonic() + self._reporter.seconds_between
        shown = " ".join(f"{name} {value}" for name, value in fields.items())
        self._reporter.note(f"{self._title} {done}/{total} {shown}")


class JsonReporter:
    """Every message as one JSON object a line."""

    def doing(self, text: str) -> None:
        self._event("doing", text=text)

    def success(self, text: str) -> None:
        self._event("success", text=text)

    def note(self, text: str) -> None:
        self._event("note", text=text)

    def warning(self, text: str) -> None:
        self._event("warning", text=text)

    def failure(self, cause: str, hint: str) -> None:
        self._event("failure", cause=cause, hint=hint)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        self._event("table", title=title, rows=[dict(zip(columns, row, strict=True)) for row in rows])

    def result(self, text: str, **fields: Any) -> None:
        self._event("result", text=text, **fields)

    @contextlib.contextmanager
    def progress(self, title: str) -> Iterator[Progress]:
        yield _JsonProgress(self, title)

    def _event(self, kind: str, **fields: Any) -> None:
        print(json.dumps({"event": kind, **fields}), flush=True)


class _JsonProgress:
    def __init__(self, reporter: JsonReporter, title: str) -> None:
        self._reporter, self._title = reporter, title

    def update(self, done: int, total: int, **fields: Any) -> None:
        self._reporter._event("progress", title=self._title, done=done, total=total, **fields)


class RichReporter:
    """Colours and a live progress bar."""

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

    def failure(self, cause: str, hint: str) -> None:
        self._err.print(clean(f"error: {cause}"), style="bold red", markup=False)
        if hint:
            self._err.print(clean(hint), markup=False)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(clean(title)), title_justify="left")
        for column in columns:
            table.add_column(Text(clean(column)))
        for row in rows:
            table.add_row(*[Text(clean(cell)) for cell in row])
        self._out.print(table)

    def result(self, text: str, **fields: Any) -> None:
        del fields
        self._out.print(clean(text), markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def progress(self, title: str) -> Iterator[Progress]:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (
            TextColumn("[yellow]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[shown]}"),
        )
        with Bar(*columns, console=self._out, transient=False) as bar:
            yield _RichProgress(bar, bar.add_task(title, total=None, shown=""))

    def _print(self, text: str, style: str) -> None:
        self._out.print(clean(text), style=style, markup=False)


class _RichProgress:
    def __init__(self, bar: Any, task: Any) -> None:
        self._bar, self._task = bar, task

    def update(self, done: int, total: int, **fields: Any) -> None:
        shown = "  ".join(f"{name} {value}" for name, value in fields.items())
        self._bar.update(self._task, completed=done, total=total, shown=shown)


class Replay:
    """Tells a reporter what a `JsonReporter` elsewhere was told, from its lines.

    A running count stays open from its first event to its last, so that a terminal shows it as a bar.
    """

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._open: contextlib.ExitStack | None = None
        self._title = ""
        self._progress: Progress | None = None

    def tell(self, event: dict[str, Any]) -> None:
        """Repeats one event; one that is of no known kind is shown as a note, so that nothing gets lost."""
        fields = dict(event)
        kind = str(fields.pop("event", ""))
        if kind == "progress":
            self._count(fields)
            return
        if kind not in ("note", "warning"):  # these stand beside a running count, others come after it
            self.close()
        if kind in ("doing", "success", "note", "warning"):
            getattr(self._reporter, kind)(str(fields.get("text", "")))
        elif kind == "failure":
            self._reporter.failure(str(fields.get("cause", "")), str(fields.get("hint", "")))
        elif kind == "table":
            rows = [row for row in fields.get("rows", []) if isinstance(row, dict)]
            columns = list(rows[0]) if rows else []
            cells = [[str(row.get(column, "")) for column in columns] for row in rows]
            self._reporter.table(str(fields.get("title", "")), columns, cells)
        elif kind == "result":
            self._reporter.result(str(fields.pop("text", "")), **{str(name): value for name, value in fields.items()})
        else:
            self._reporter.note(json.dumps(event, ensure_ascii=False))

    def close(self) -> None:
        """Ends a running count, whether it came to its end or not."""
        if self._open is not None:
            self._open.close()
        self._open, self._progress = None, None

    def _count(self, fields: dict[str, Any]) -> None:
        title = str(fields.pop("title", ""))
        done, total = (int(fields.pop(name, 0)) for name in ("done", "total"))
        if self._progress is None or title != self._title:
            self.close()
            self._open, self._title = contextlib.ExitStack(), title
            self._progress = self._open.enter_context(self._reporter.progress(title))
        self._progress.update(done, total, **fields)
        if done >= total:
            self.close()


def event_of(line: str) -> dict[str, Any] | None:
    """The event in a line that a `JsonReporter` printed; None when the line is something else."""
    if not line.startswith('{"event"'):
        return None
    try:
        loaded = json.loads(line)
    except ValueError:
        return None
    return loaded if isinstance(loaded, dict) else None


def size_in_words(count: float) -> str:
    """A number of bytes as people read it."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit in ("B", "KB") else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
