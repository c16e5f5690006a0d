"""Messages of a `JsonReporter` in another process, repeated here."""

from __future__ import annotations

import contextlib
import json

from kolotune.foundation.typed_storage import JsonObject, StorageError, parse_object

from .protocol import Progress, Reporter


def parse_event(line: str) -> JsonObject | None:
    """Return the event in a line that a `JsonReporter` printed; None when the line is something else."""
    if not line.startswith('{"event"'):
        return None
    try:
        return parse_object(line)
    except StorageError:
        return None


class Replay:
    """Pass the events of a `JsonReporter` elsewhere to a reporter here.

    A running count stays open from its first event to its last, so that a terminal shows it as a bar.
    """

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._open: contextlib.ExitStack | None = None
        self._title = ""
        self._progress: Progress | None = None

    def show(self, event: JsonObject) -> None:
        """Repeat one event; an unknown kind is shown as a note, so that nothing is lost."""
        fields = dict(event)
        kind = str(fields.pop("event", ""))
        fields.pop("time", None)
        if kind == "progress":
            self._count(fields)
            return
        if kind not in ("note", "warning"):  # only these appear while a count is running
            self.close()
        if kind in ("doing", "success", "note", "warning"):
            getattr(self._reporter, kind)(str(fields.get("text", "")))
        elif kind == "failure":
            exit_code = _whole_number(fields.get("exit_code", 1))
            self._reporter.failure(str(fields.get("cause", "")), str(fields.get("hint", "")), exit_code)
        elif kind == "table":
            self._table(str(fields.get("title", "")), fields.get("rows"))
        elif kind == "result":
            self._reporter.result(str(fields.pop("text", "")), **fields)
        else:
            self._reporter.note(json.dumps(event, ensure_ascii=False))

    def close(self) -> None:
        """End a running count, complete or not."""
        if self._open is not None:
            self._open.close()
        self._open, self._progress = None, None

    def _table(self, title: str, value: object) -> None:
        rows = [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []
        columns = list(rows[0]) if rows else []
        self._reporter.table(title, columns, [[str(row.get(column, "")) for column in columns] for row in rows])

    def _count(self, fields: JsonObject) -> None:
        title = str(fields.pop("title", ""))
        done, total = (_whole_number(fields.pop(name, 0)) for name in ("done", "total"))
        if self._progress is None or title != self._title:
            self.close()
            self._open, self._title = contextlib.ExitStack(), title
            self._progress = self._open.enter_context(self._reporter.progress(title))
        self._progress.update(done, total, **fields)
        if done >= total:
            self.close()


def _whole_number(value: object) -> int:
    return int(value) if isinstance(value, (int, float, str)) else 0
