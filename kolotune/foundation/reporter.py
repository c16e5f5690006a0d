"""The only place that prints: rich in a terminal, plain lines elsewhere, JSON lines for programs.

Errors are red, successes green, what is being done yellow. Text that comes from files or other programs is
stripped of control characters here, so that nothing can steer the terminal.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import sys
import time
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, TypedDict


class TextEvent(TypedDict):
    """``doing``, ``success``, ``note``, ``warning``: one message. `time` is UTC, to the second, as in every event."""

    event: str
    time: str
    text: str


class FailureEvent(TypedDict):
    """``failure``: the last event of a verb that failed."""

    event: str
    time: str
    cause: str
    hint: str
    exit_code: int


class TableEvent(TypedDict):
    """``table``: rows of text, each by the names of its columns."""

    event: str
    time: str
    title: str
    rows: list[dict[str, str]]


class ResultEvent(TypedDict):
    """``result``: what was asked for; the verb may add fields of its own."""

    event: str
    time: str
    text: str


class ProgressEvent(TypedDict):
    """``progress``: a running count; what is counted may add fields, as loss."""

    event: str
    time: str
    title: str
    done: int
    total: int


EVENTS: dict[str, type] = {
    **dict.fromkeys(("doing", "success", "note", "warning"), TextEvent),
    "failure": FailureEvent,
    "table": TableEvent,
    "result": ResultEvent,
    "progress": ProgressEvent,
}
"""What `JsonReporter` prints, by the value of `event`; docs/json-events.md describes it for its users."""
WITH_MORE_FIELDS = frozenset({"result", "progress"})


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

    def failure(self, cause: str, hint: str, exit_code: int = 1) -> None:
        """Says what went wrong and what to do; `exit_code` is for programs."""

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


def print_pieces(answer: Iterable[str]) -> None:
    """Prints what a model answers, piece by piece as it comes, without what could steer the terminal."""
    for piece in answer:
        # Joiners are kept: scripts need them, and so do many emojis.
        sys.stdout.write("".join(char if char in "\u200c\u200d" else clean(char) for char in piece))
        sys.stdout.flush()
    sys.stdout.write("\n")


def make_reporter(as_json: bool = False) -> Reporter:
    """The reporter that suits where the output goes."""
    if as_json:
        return JsonReporter()
    return RichReporter() if sys.stdout.isatty() else PlainReporter()


class PlainReporter:
    """One line a message, no colours; for files and pipes."""

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
        import textwrap

        cells = [[clean(cell) for cell in row] for row in (columns, *rows)]
        # Long texts share the width, so that a table stays one in a log file.
        widths = [max(len(row[index]) for row in cells) for index in range(len(columns))]
        if sum(widths) + 2 * len(widths) > self.table_width:
            most = max(12, self.table_width // max(1, len(columns)) - 2)
            widths = [min(most, width) for width in widths]
        widths = [max(1, width) for width in widths]
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
    """A line for every tenth that is done, and when nothing was said for a while: 30 s, later a twentieth of the time.

    So a log of hours stays short, and one of minutes shows that something goes on.
    """

    def __init__(self, reporter: PlainReporter, title: str) -> None:
        self._reporter, self._title = reporter, title
        self._begun = self._said = 0.0
        self._from: int | None = None
        self._tenth = -1

    def update(self, done: int, total: int, **fields: Any) -> None:
        now = time.monotonic()
        if self._from is None:  # a resumed count does not begin at nothing
            self._from, self._begun = done, now
        if not self._is_due(now, done, total):
            return
        self._said, self._tenth = now, _tenth(done, total)
        parts = [f"{self._title} {done}/{total}"]
        if total > 0:
            parts.append(f"{100 * done // total}%")
        elapsed, counted = now - self._begun, done - self._from
        if counted > 0 and done < total and elapsed >= self._reporter.least_seconds:
            parts.append(f"{duration_in_words(elapsed / counted * (total - done))} left")
        self._reporter.note(", ".join([*parts, *in_words(fields)]))

    def _is_due(self, now: float, done: int, total: int) -> bool:
        silent = now - self._said
        if self._tenth < 0 or done >= total:
            return True
        if _tenth(done, total) > self._tenth and silent >= self._reporter.least_seconds:
            return True
        return silent >= max(self._reporter.seconds_between, (now - self._begun) / 20)


def _tenth(done: int, total: int) -> int:
    return 10 * done // total if total > 0 else 0


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

    def failure(self, cause: str, hint: str, exit_code: int = 1) -> None:
        self._event("failure", cause=cause, hint=hint, exit_code=exit_code)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        self._event("table", title=title, rows=[dict(zip(columns, row, strict=True)) for row in rows])

    def result(self, text: str, **fields: Any) -> None:
        self._event("result", text=text, **fields)

    @contextlib.contextmanager
    def progress(self, title: str) -> Iterator[Progress]:
        yield _JsonProgress(self, title)

    def _event(self, kind: str, **fields: Any) -> None:
        known = {
            name: None if isinstance(each, float) and not math.isfinite(each) else each for name, each in fields.items()
        }
        print(json.dumps({"event": kind, "time": _now(), **known}, allow_nan=False), flush=True)


def _now() -> str:
    import datetime

    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


class _JsonProgress:
    def __init__(self, reporter: JsonReporter, title: str) -> None:
        self._reporter, self._title = reporter, title

    def update(self, done: int, total: int, **fields: Any) -> None:
        self._reporter._event("progress", title=self._title, done=done, total=total, **fields)


class RichReporter:
    """Colours and a live progress bar."""

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

    def result(self, text: str, **fields: Any) -> None:
        del fields
        self._out.print(clean(text), markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def progress(self, title: str) -> Iterator[Progress]:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar
        from rich.table import Column

        # What is shown beside the count takes the room that is left; in a narrow window there is no bar.
        rest = Column(no_wrap=True, overflow="ellipsis", ratio=1)
        columns = (
            TextColumn("{task.description}", style="yellow", markup=False),
            *([BarColumn(bar_width=20)] if self._out.width >= self.narrow else []),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            TextColumn("{task.fields[shown]}", markup=False, table_column=rest),
        )
        with Bar(*columns, console=self._out, transient=False, expand=True) as live:
            yield _RichProgress(live, live.add_task(clean(title), total=None, shown=""))

    def _print(self, text: str, style: str) -> None:
        # The terminal breaks the lines: a path or a command can then be copied whole.
        self._out.print(clean(text), style=style, markup=False, soft_wrap=True)


class _RichProgress:
    def __init__(self, bar: Any, task: Any) -> None:
        self._bar, self._task = bar, task

    def update(self, done: int, total: int, **fields: Any) -> None:
        self._bar.update(self._task, completed=done, total=total, shown=clean("  ".join(in_words(fields))))


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
        fields.pop("time", None)
        if kind == "progress":
            self._count(fields)
            return
        if kind not in ("note", "warning"):  # these stand beside a running count, others come after it
            self.close()
        if kind in ("doing", "success", "note", "warning"):
            getattr(self._reporter, kind)(str(fields.get("text", "")))
        elif kind == "failure":
            exit_code = int(fields.get("exit_code", 1))
            self._reporter.failure(str(fields.get("cause", "")), str(fields.get("hint", "")), exit_code)
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


def in_words(fields: dict[str, Any]) -> list[str]:
    """Fields of a running count as they are shown: ``loss 2.4109``, ``612 tokens/s``."""
    shown = []
    for name, value in fields.items():
        text = f"{value:.4f}" if isinstance(value, float) else str(value)
        unit, per, _ = name.partition("_per_second")
        shown.append(f"{text} {unit}/s" if per else f"{name.replace('_', ' ')} {text}")
    return shown


def duration_in_words(seconds: float) -> str:
    """A time as people read it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def size_in_words(count: float) -> str:
    """A number of bytes as people read it."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit in ("B", "KB") else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
