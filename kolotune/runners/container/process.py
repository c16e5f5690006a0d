"""A process inside the container: started, listened to, asked to stop, and never left behind."""

from __future__ import annotations

import contextlib
import queue
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

from kolotune.foundation.errors import ContainerError, ContainerLostError, Interrupted, SpaceError
from kolotune.foundation.reporter import Reporter

from ..watchdog import WATCH_STDIN
from . import names
from .docker import SPACE_HINT, Docker, Found, is_full, lost, paused

_FRAME = struct.Struct(">BxxxL")  # which stream, three bytes of nothing, length
_STDERR = 2
_TICK_SECONDS = 0.5
_END_SECONDS = 10.0
_LOOK_SECONDS = 3.0
_STILL_SECONDS = 3600.0
_KILLED, _NOT_STARTED = 128 + 9, 126
_LATE_SECONDS = 3.0


class _Silence:
    """Looks after the container while nothing is heard of a process in it: a paused one says nothing, for ever.

    Args:
        docker: the connection.
        found: the container.
        doing: what messages call the process.
        reporter: is told why nothing is heard, and when that is over. None: nobody waits for that.
    """

    def __init__(self, docker: Docker, found: Found, doing: str, reporter: Reporter | None) -> None:
        self._docker, self._found, self._doing, self._reporter = docker, found, doing, reporter
        self._still_since: float | None = None
        self._next_look = time.monotonic() + _LOOK_SECONDS

    def goes_on(self) -> None:
        """Nothing is heard; looks at the container from time to time.

        Raises:
            ContainerPausedError: it is paused, and nobody waits, or has waited for an hour.
            ContainerLostError: it went away.
            ContainerError: Docker does not answer, and nobody waits, or has waited for an hour.
        """
        if time.monotonic() < self._next_look:
            return
        if (why := self._why()) is None:
            self.ends()
            return
        now = time.monotonic()
        if self._reporter is None or (self._still_since is not None and now - self._still_since > _STILL_SECONDS):
            raise type(why)(why.cause, f"{why.hint}; then run the same command again.")
        if self._still_since is None:
            self._still_since = now
            self._reporter.warning(f"{why.cause}. {why.hint}")
        self._next_look = now + _LOOK_SECONDS

    def _why(self) -> ContainerError | None:
        """Why nothing can be heard; None when the process may just be silent."""
        try:
            is_paused = self._docker.require_unchanged(self._found, self._doing).state == "paused"
        except ContainerLostError:
            raise
        except ContainerError as error:
            return error
        return paused(self._found.name, self._doing) if is_paused else None

    def ends(self) -> None:
        """Something is heard, or the container was seen to run."""
        self._next_look = time.monotonic() + _LOOK_SECONDS
        if self._still_since is not None and self._reporter is not None:
            self._reporter.note(f"container {self._found.name}: {self._doing} goes on")
        self._still_since = None


class Process:
    """One process, started at once.

    Args:
        docker: the connection.
        found: the container.
        argv: program and arguments.
        env: its variables beyond the container's; they are in no description that Docker gives.
        doing: what messages call it.
        reporter: is told when the container is paused meanwhile, and when it goes on; an hour is waited for that.
            None: it isn't waited for.
        typed: where its standard input comes from. None: nothing is typed, and the input's end (when this client
            is gone, however it went) makes a kolotune in there stop by itself.

    Raises:
        ContainerLostError, ContainerPausedError: the container went away, or is paused.
        ContainerError: it can't be started for another reason.
    """

    def __init__(
        self,
        docker: Docker,
        found: Found,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        typed: IO[bytes] | None = None,
        doing: str,
        reporter: Reporter | None = None,
    ) -> None:
        self._docker, self._found, self._doing = docker, found, doing
        self._silence = _Silence(docker, found, doing, reporter)
        self._watched = typed is None
        variables = {**(env or {}), **({WATCH_STDIN: "1"} if self._watched else {})}
        self.number = 0
        """The process's number inside, when it has told it (`watchdog.REPORT_PROCESS`)."""
        with docker.working(found, doing, f"start a process in {found.name}"):
            created = docker.api.exec_create(
                found.id, list(argv), stdin=True, environment=variables, workdir=names.HOME
            )
            self._id = created["Id"]
            stream = docker.api.exec_start(self._id, socket=True)
        # The client's own reader loses what came in one packet with the answer's head: read where that is kept.
        self._reader: Any = stream._response.raw._fp.fp
        self._stream, self._writer = stream, getattr(stream, "_sock", stream)
        self._writer.settimeout(None)
        self._frames: queue.SimpleQueue[tuple[int, bytes] | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()
        if typed is not None:
            threading.Thread(target=self._type, args=(typed,), daemon=True).start()

    def wait(self, listen: Callable[[bytes, bool], None]) -> int:
        """Hands every piece of output to `listen(piece, is_stderr)` until the process ends; returns its exit code.

        The first Ctrl-C asks it to stop and waits for that, a second one kills it.

        Raises:
            Interrupted: it was killed.
            ContainerLostError: the container went away meanwhile.
            ContainerPausedError: it is paused, and nobody waits, or has waited for an hour.
        """
        try:
            self._listen(listen)
        except KeyboardInterrupt:
            self._ask_to_stop()
            try:
                self._listen(listen)
            except KeyboardInterrupt:
                self._signal("KILL", "killpg")
                raise Interrupted("killed") from None
        finally:
            with contextlib.suppress(OSError):
                self._stream.close()
        return self._exit_code()

    def _listen(self, listen: Callable[[bytes, bool], None]) -> None:
        while True:
            try:
                # Windows lets nobody interrupt a wait without an end.
                frame = self._frames.get(timeout=_TICK_SECONDS)
            except queue.Empty:
                self._silence.goes_on()
                continue
            if frame is None:
                return
            self._silence.ends()
            listen(frame[1], frame[0] == _STDERR)

    def _read(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            while len(head := self._reader.read(_FRAME.size)) == _FRAME.size:
                kind, length = _FRAME.unpack(head)
                self._frames.put((kind, self._reader.read(length)))
        self._frames.put(None)

    def _type(self, typed: IO[bytes]) -> None:
        with contextlib.suppress(OSError, ValueError):
            while piece := typed.readline():
                self._writer.sendall(piece)
        self._end_input()

    def _end_input(self) -> None:
        with contextlib.suppress(OSError):
            self._writer.shutdown(socket.SHUT_WR)

    def _ask_to_stop(self) -> None:
        if self._watched and sys.platform != "win32":  # its pipes can't be closed in one direction only
            self._end_input()
        else:
            self._signal("TERM", "kill")

    def _signal(self, name: str, how: str) -> None:
        """Sends a signal to the process ("kill"), or to it and all that it started ("killpg")."""
        if not self.number:
            return
        code = (
            "import os, signal, sys; getattr(os, sys.argv[1])(int(sys.argv[2]), getattr(signal, 'SIG' + sys.argv[3]))"
        )
        argv = [names.PYTHON, "-P", "-c", code, how, str(self.number), name]
        with contextlib.suppress(Exception):  # it has ended by itself, or the container has
            created = self._docker.api.exec_create(self._found.id, argv)
            self._docker.api.exec_start(created["Id"])

    def _exit_code(self) -> int:
        import docker.errors

        deadline = time.monotonic() + _END_SECONDS
        while True:
            self._docker.require_unchanged(self._found, self._doing)
            with self._docker.working(self._found, self._doing, "ask how it ended"):
                try:
                    seen = self._docker.api.exec_inspect(self._id)
                except docker.errors.NotFound:  # Docker forgets processes when it is started again
                    self._docker.require_unchanged(self._found, self._doing)
                    raise lost(self._found.name, f"Docker was restarted during {self._doing}", "Start it") from None
            if not seen["Running"] and seen["ExitCode"] is not None:
                if seen["ExitCode"] in (_KILLED, _NOT_STARTED):
                    self._require_survived(seen["ExitCode"])
                return int(seen["ExitCode"])
            if time.monotonic() > deadline:
                raise ContainerError(f"container {self._found.name}: lost sight of the process in it")
            time.sleep(0.05)

    def _require_survived(self, code: int) -> None:
        """A container that is being stopped kills the process first and says so a moment later."""
        late = time.monotonic() + _LATE_SECONDS
        while time.monotonic() < late:
            now = self._docker.require_unchanged(self._found, self._doing)
            if now.state == "paused" and code == _NOT_STARTED:  # it was, between Docker's word and the deed
                raise paused(self._found.name, self._doing)
            time.sleep(0.2)


def output_of(docker: Docker, found: Found, argv: Sequence[str], doing: str) -> str:
    """What a short program inside prints.

    Raises:
        ContainerLostError, ContainerPausedError: the container went away, or is paused.
        SpaceError: the program finds the disk full.
        ContainerError: it fails otherwise.
    """
    pieces: tuple[list[bytes], list[bytes]] = ([], [])
    code = Process(docker, found, argv, doing=doing).wait(lambda piece, is_stderr: pieces[is_stderr].append(piece))
    if code != 0:
        last = (b"".join(pieces[True]).decode("utf-8", "replace").strip().splitlines() or ["no word"])[-1]
        if is_full(last):
            raise SpaceError(f"{doing} with {found.name}: the container's disk is full", SPACE_HINT)
        raise ContainerError(f"container {found.name}: {argv[-1]} failed with code {code}: {last}")
    return b"".join(pieces[False]).decode("utf-8")
