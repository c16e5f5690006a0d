"""The training side of tracking: hand the lines of the metrics file to the tracker's process as they are written."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from kolotune.foundation import typed_storage
from kolotune.foundation.reporter import Reporter
from kolotune.foundation.secrets import STARS, is_secret_variable
from kolotune.runners import local

from .__main__ import TrackingTask

_PATIENCE_SECONDS = 120.0  # for what is still to be sent when the training is done
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@")
_SHORTEST_SECRET = 6


class Follower:
    """Follows a metrics file.

    Args:
        task: what is tracked.
        file: for the task.
        metrics: the file that is followed.
        log: what the tracker's client prints.
        reporter: gets a warning if tracking fails, which does not stop the training.
    """

    def __init__(self, task: TrackingTask, file: Path, metrics: Path, log: Path, reporter: Reporter) -> None:
        self._task, self._file, self._metrics, self._log, self._reporter = task, file, metrics, log, reporter
        self._exits = contextlib.ExitStack()
        self._child: local.FedProgram | None = None
        self._position, self._has_failed = 0, False

    def update(self) -> None:
        """Hand on what was written since the last time; the tracker's process starts with the first line."""
        if self._has_failed or not self._metrics.is_file():
            return
        if self._metrics.stat().st_size < self._position:
            self._position = 0  # written again by a resumed training; the tracker knows what it has
        with self._metrics.open("rb") as file:
            file.seek(self._position)
            lines = file.read()
        lines = lines[: lines.rfind(b"\n") + 1]
        self._position += len(lines)
        if not lines:
            return
        try:
            if self._child is None:
                typed_storage.write(self._file, self._task)
                argv = local.python("kolotune.tracking", str(self._file))
                self._child = self._exits.enter_context(local.fed(argv, self._log, _PATIENCE_SECONDS))
            self._child.write(lines)
        except OSError:
            self._fail()

    def close(self) -> None:
        """Wait until everything is sent."""
        self._exits.close()
        if self._child is not None and self._child.code != 0:
            self._fail()

    def _fail(self) -> None:
        if not self._has_failed:
            reason = masked(local.last_lines(self._log)) or "its process ended"
            self._reporter.warning(f"{self._task.tracker} no longer tracks this run: {reason}; the log is {self._log}")
        self._has_failed = True


@contextlib.contextmanager
def following(follower: Follower | None) -> Iterator[None]:
    """Close a follower, if there is one, when the block ends, however it ends."""
    try:
        yield
    finally:
        if follower is not None:
            follower.close()


def masked(text: str) -> str:
    """Return a client's message without the secrets that the environment has, and without credentials in addresses."""
    for name, value in os.environ.items():
        if is_secret_variable(name) and len(value) >= _SHORTEST_SECRET:
            text = text.replace(value, STARS)
    return _CREDENTIALS.sub(f"{STARS}@", text)
