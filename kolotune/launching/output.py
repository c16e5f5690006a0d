"""What a job prints, told here as if it were done here."""

from __future__ import annotations

from collections import deque

from kolotune.foundation.reporter import Replay, Reporter, parse_event
from kolotune.runners.container.paths import Paths, deep

ENDED = "ended"
"""The event that ends what a machine of a job prints; it has a `code`."""
_KEPT_LINES = 3


class Listener:
    """Takes pieces of a job's output, and tells its events.

    What is no event is what libraries print: it is in the log, and its last lines are kept for an error message.

    Args:
        reporter: is told; None: nobody is, and only the end is looked for.
        paths: puts the paths of here in the place of those there.

    Attributes:
        code: the exit code, once it is known.
        cause: of a failure that was told.
    """

    def __init__(self, reporter: Reporter | None, paths: Paths) -> None:
        self._replay = Replay(reporter) if reporter is not None else None
        self._paths = paths
        self._rest = b""
        self._others: deque[str] = deque(maxlen=_KEPT_LINES)
        self.code: int | None = None
        self.cause = ""

    def feed(self, piece: bytes) -> None:
        """Takes a piece that need not end where a line does."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            self._line(line.decode("utf-8", "replace"))

    def last_words(self) -> str:
        """The last lines that were no events; "" for none."""
        return " | ".join(self._others)

    def close(self) -> None:
        """Ends a running count that was told."""
        if self._replay is not None:
            self._replay.close()

    def _line(self, line: str) -> None:
        event = parse_event(line)
        if event is None:
            if line.strip():
                self._others.append(self._paths.host(line.strip()))
        elif event.get("event") == ENDED:
            self.code = int(str(event.get("code", 1)))
        else:
            told = deep(event, self._paths.host)
            if told.get("event") == "failure":
                self.cause = str(told.get("cause", ""))
            if self._replay is not None:
                self._replay.show(told)
