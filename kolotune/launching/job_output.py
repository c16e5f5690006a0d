"""The output of a job: its events are shown here, as if the run were here."""

from __future__ import annotations

from collections import deque

from kolotune.foundation.reporter import PlainReporter, Replay, Reporter, parse_event
from kolotune.runners.container.path_map import PathMap

ENDED = "ended"
"""The last event of a machine of a job; its field `code` is the exit code."""
_KEPT_LINES = 3


class JobOutput:
    """Takes the output of one machine in chunks, and shows its events.

    Lines that are no events come from libraries. They are in the log; the last ones are kept for an error message.

    Args:
        reporter: shows the events; None: only look for the end and a failure.
        paths: translates the paths there.

    Attributes:
        code: the exit code, once it is known.
        cause: of the last failure event; "" for none.
    """

    def __init__(self, reporter: Reporter | None, paths: PathMap) -> None:
        self._replay = Replay(reporter) if reporter is not None else None
        self._paths = paths
        self._rest = b""
        self._other_lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self.code: int | None = None
        self.cause = ""

    def feed(self, chunk: bytes) -> None:
        """Take a chunk, which need not end where a line does."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            self._handle_line(line.decode("utf-8", "replace"))

    def last_lines(self) -> str:
        """Return the last lines that were no events; "" for none."""
        return " | ".join(self._other_lines)

    def close(self) -> None:
        """Finish a progress bar that is shown."""
        if self._replay is not None:
            self._replay.close()

    def _handle_line(self, line: str) -> None:
        event = parse_event(line)
        if event is None:
            if line.strip():
                self._other_lines.append(self._paths.to_host(line.strip()))
        elif event.get("event") == ENDED:
            self.code = int(str(event.get("code", 1)))
        else:
            event = self._paths.event_to_host(event)
            if event.get("event") == "failure":
                self.cause = str(event.get("cause", ""))
            if self._replay is not None:
                self._replay.show(event)


class SilentReporter(PlainReporter):
    """A reporter that shows nothing, for plans."""

    def _line(self, text: str) -> None:
        del text


def last_line(text: str) -> str:
    """Return the last line of a program's output that is not empty."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no reason was given")
