"""llama.cpp's own server as a child process: on the loopback interface, with a key that only this process has."""

from __future__ import annotations

import contextlib
import json
import secrets
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping
from typing import IO

from kolotune.foundation.errors import ArtifactError, KolotuneError
from kolotune.runners import child_process, local

_LOG_BYTES = 4000


class ChildServer:
    """A server that runs until it is closed. It ends with this process, whatever ends that.

    Args:
        module: what runs in the child; it uses `server_library`.
        task: the first line of its standard input, to which ``key`` is added.
        data: what follows that line.
        seconds: how long its start may take.
        explain: makes an error of what llama.cpp wrote ("" for nothing) when the child ends as it starts.

    Attributes:
        address: where it listens.
        key: what requests must have.
        headers: the same as headers.

    Raises:
        KolotuneError: what the child reports, or what `explain` returns.
    """

    def __init__(
        self,
        module: str,
        task: Mapping[str, object],
        data: bytes = b"",
        *,
        seconds: float,
        explain: Callable[[str], KolotuneError],
    ) -> None:
        self.key = secrets.token_urlsafe()
        self.headers = {"Authorization": f"Bearer {self.key}"}
        self._open = contextlib.ExitStack()
        try:
            self._log = self._open.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 - closed with the rest
            self._process = self._open.enter_context(local.piped(local.python(module), {}, self._log))
            head = json.dumps({"key": self.key, **task}).encode()
            self.address = self._start(head + b"\n" + data, seconds, explain)
        except BaseException:
            self._open.close()
            raise

    @property
    def process_id(self) -> int:
        """The child's process id."""
        return self._process.pid

    def exit_code(self, seconds: float = 0.0) -> int | None:
        """Return the child's exit code, negative for a signal; None when it still runs after some seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(seconds)
        return None

    def close(self) -> None:
        """End the server."""
        self._open.close()

    def kill(self) -> None:
        """End a server that does not answer."""
        self._process.kill()

    def _start(self, given: bytes, seconds: float, explain: Callable[[str], KolotuneError]) -> str:
        """Give the child its task; return the address in its first event."""
        assert self._process.stdin is not None and self._process.stdout is not None
        watch = threading.Timer(seconds, self._process.kill)
        watch.start()
        try:
            with contextlib.suppress(BrokenPipeError):  # it ended, and says why
                self._process.stdin.write(given)
                self._process.stdin.flush()
            address = _address(self._process.stdout)
        finally:
            watch.cancel()
        if address is None:
            raise explain(self._said())
        return address

    def _said(self) -> str:
        self._log.seek(0)
        return self._log.read(_LOG_BYTES).decode("utf-8", "replace").strip()


def _address(events: IO[bytes]) -> str | None:
    """Return the address in the child's first event; None when it ends without one.

    Raises:
        KolotuneError: the error that it reports.
    """
    for line in events:
        event = child_process.event_in(line.decode("utf-8", "replace").strip())
        if event is None:
            continue
        name, fields = event
        if name == "error":
            raise child_process.error_in(fields, ArtifactError)
        return str(fields["address"])
    return None
