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

from ...errors import ContainerError, Interrupted
from ..watchdog import WATCH_STDIN
from . import places
from .docker import Docker, Found

_FRAME = struct.Struct(">BxxxL")  # which stream, three bytes of nothing, length
_STDERR = 2
_TICK_SECONDS = 0.5
_END_SECONDS = 10.0


class Process:
    """One process, started at once.

    Args:
        docker: the connection.
        found: the container.
        argv: program and arguments.
        env: its variables beyond the container's; they are in no description that Docker gives.
        doing: what messages call it.
        typed: where its standard input comes from. None: nothing is typed, and the input's end (when this client
            is gone, however it went) makes a kolotune in there stop by itself.

    Raises:
        ContainerError: it can't be started.
    """

    def __init__(
        self,
        docker: Docker,
        found: Found,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        typed: IO[bytes] | None = None,
        doing: str = "",
    ) -> None:
        self._docker, self._found, self._doing = docker, found, doing or argv[0]
        self._watched = typed is None
        variables = {**(env or {}), **({WATCH_STDIN: "1"} if self._watched else {})}
        self.number = 0
        """The process's number inside, when it has told it (`watchdog.SAY_PROCESS`)."""
        with docker.told(f"start a process in {found.name}"):
            created = docker.api.exec_create(
                found.id, list(argv), stdin=True, environment=variables, workdir=places.HOME
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
                continue
            if frame is None:
                return
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
        argv = [places.PYTHON, "-P", "-c", code, how, str(self.number), name]
        with contextlib.suppress(Exception):  # it has ended by itself, or the container has
            created = self._docker.api.exec_create(self._found.id, argv)
            self._docker.api.exec_start(created["Id"])

    def _exit_code(self) -> int:
        self._docker.require_unchanged(self._found, self._doing)
        deadline = time.monotonic() + _END_SECONDS
        while True:
            with self._docker.told("ask how it ended"):
                seen = self._docker.api.exec_inspect(self._id)
            if not seen["Running"] and seen["ExitCode"] is not None:
                # A container that is being stopped kills the process first and says so a moment later.
                if seen["ExitCode"] == 137:
                    time.sleep(1)
                    self._docker.require_unchanged(self._found, self._doing)
                return int(seen["ExitCode"])
            if time.monotonic() > deadline:
                raise ContainerError(f"container {self._found.name}: lost sight of the process in it")
            time.sleep(0.05)


def output_of(docker: Docker, found: Found, argv: Sequence[str]) -> str:
    """What a short program inside prints.

    Raises:
        SpaceError: the disk in there is full.
        ContainerError: it fails otherwise.
    """
    pieces: tuple[list[bytes], list[bytes]] = ([], [])
    code = Process(docker, found, argv).wait(lambda piece, is_stderr: pieces[is_stderr].append(piece))
    if code != 0:
        last = (b"".join(pieces[True]).decode("utf-8", "replace").strip().splitlines() or ["no word"])[-1]
        raise ContainerError(f"container {found.name}: {argv[-1]} failed with code {code}: {last}")
    return b"".join(pieces[False]).decode("utf-8")
