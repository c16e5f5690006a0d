"""Every message as one JSON object a line, for programs."""

from __future__ import annotations

import contextlib
import datetime
import json
import math
from collections.abc import Iterator, Sequence

from .protocol import Progress


class JsonReporter:
    """Print every message as one JSON object a line; `events` has their fields."""

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

    def result(self, text: str, **fields: object) -> None:
        self._event("result", text=text, **fields)

    @contextlib.contextmanager
    def progress(self, title: str) -> Iterator[Progress]:
        yield _JsonProgress(self, title)

    def _event(self, kind: str, **fields: object) -> None:
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in fields.items()
        }
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        line = json.dumps({"event": kind, "time": now, **finite}, allow_nan=False)
        print(f"{line}\n", end="", flush=True)  # in one piece: threads report, too


class _JsonProgress:
    def __init__(self, reporter: JsonReporter, title: str) -> None:
        self._reporter, self._title = reporter, title

    def update(self, done: int, total: int, **fields: object) -> None:
        self._reporter._event("progress", title=self._title, done=done, total=total, **fields)
