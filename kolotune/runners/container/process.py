"""A process inside the container: start it, read its output, stop it, and never leave it behind."""

from __future__ import annotations

import contextlib
import queue
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO

from kolotune.foundation.errors import ContainerError, ContainerLostError, Interrupted, SpaceError
from kolotune.foundation.reporter import Reporter

from ..watchdog import WATCH_STDIN
from . import names
from .docker import SPACE_HINT, Container, Docker, is_disk_full, lost_error, paused_error

_FRAME = struct.Struct(">BxxxL")  # which stream, three unused bytes, length
_STDERR = 2
_TICK_SECONDS = 0.5
_END_SECONDS = 10.0
_LOOK_SECONDS = 3.0
_PAUSED_SECONDS = 3600.0
_KILLED, _NOT_STARTED = 128 + 9, 126
_LATE_SECONDS = 3.0


class _SilenceMonitor:
    """Checks on the container while a process in it prints nothing: a paused one would do so for ever.

    Args:
        docker: the connection.
        container: the container.
        doing: what messages call the process.
        reporter: shows why the process prints nothing, and when that is over. None: don't wait for a paused container.
    """

    def __init__(self, docker: Docker, container: Container, doing: str, reporter: Reporter | None) -> None:
        self._docker, self._container, self._doing, self._reporter = docker, container, doing, reporter
        self._stalled_since: float | None = None
        self._next_look = time.monotonic() + _LOOK_SECONDS

    def check(self) -> None:
        """Look at the container from time to time; call this while there is no output.

        Raises:
            ContainerPausedError: it is paused, and there is no reporter, or an hour has passed.
            ContainerLostError: it went away.
            ContainerError: Docker does not answer, and there is no reporter, or an hour has passed.
        """
        if time.monotonic() < self._next_look:
            return
        if (problem := self._problem()) is None:
            self.reset()
            return
        now = time.monotonic()
        if self._reporter is None or (self._stalled_since is not None and now - self._stalled_since > _PAUSED_SECONDS):
            raise type(problem)(problem.cause, f"{problem.hint}; then run the same command again.")
        if self._stalled_since is None:
            self._stalled_since = now
            self._reporter.warning(f"{problem.cause}. {problem.hint}")
        self._next_look = now + _LOOK_SECONDS

    def _problem(self) -> ContainerError | None:
        """Return why there can be no output; None when the process may just be silent."""
        try:
            is_paused = self._docker.require_unchanged(self._container, self._doing).state == "paused"
        except ContainerLostError:
            raise
        except ContainerError as error:
            return error
        return paused_error(self._container.name, self._doing) if is_paused else None

    def reset(self) -> None:
        """Note that there is output, or that the container runs."""
        self._next_look = time.monotonic() + _LOOK_SECONDS
        if self._stalled_since is not None and self._reporter is not None:
            self._reporter.note(f"container {self._container.name}: {self._doing} continues")
        self._stalled_since = None


class ContainerProcess:
    """One process, which starts at once.

    Args:
        docker: the connection.
        container: the container.
        argv: program and arguments.
        env: variables in addition to the container's; no description that Docker gives contains them.
        doing: what messages call the process.
        reporter: shows that the container is paused, and that it continues; the wait for that ends after an hour.
            None: don't wait.
        stdin: what to send to its standard input. None: nothing, and the end of its input (when this client is gone,
            for whatever reason) stops a kolotune in there.

    Attributes:
        number: the process's id inside, once it has reported it (`watchdog.REPORT_PROCESS`); 0 until then.

    Raises:
        ContainerLostError, ContainerPausedError: the container went away, or is paused.
        ContainerError: the process can't be started for another reason.
    """

    def __init__(
        self,
        docker: Docker,
        container: Container,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        stdin: IO[bytes] | None = None,
        doing: str,
        reporter: Reporter | None = None,
    ) -> None:
        self._docker, self._container, self._doing = docker, container, doing
        self._silence = _SilenceMonitor(docker, container, doing, reporter)
        self._watches_stdin = stdin is None
        variables = {**(env or {}), **({WATCH_STDIN: "1"} if self._watches_stdin else {})}
        self.number = 0
        with docker.during(doing, container, f"start a process in {container.name}"):
            created = docker.api.exec_create(
                container.id, list(argv), stdin=True, environment=variables, workdir=names.HOME
            )
            self._id = created["Id"]
            stream = docker.api.exec_start(self._id, socket=True)
        # The client's own reader loses what arrives in one packet with the response's head: read where that is kept.
        self._reader: IO[bytes] = stream._response.raw._fp.fp
        self._stream, self._writer = stream, getattr(stream, "_sock", stream)
        self._writer.settimeout(None)
        self._frames: queue.SimpleQueue[tuple[int, bytes] | None] = queue.SimpleQueue()
        threading.Thread(target=self._read_frames, daemon=True).start()
        if stdin is not None:
            threading.Thread(target=self._send_input, args=(stdin,), daemon=True).start()

    def wait(self, on_output: Callable[[bytes, bool], None]) -> int:
        """Call `on_output(chunk, is_stderr)` until the process ends; return its exit code.

        The first Ctrl-C asks the process to stop and waits for that, the second one kills it.

        Raises:
            Interrupted: it was killed.
            ContainerLostError: the container went away meanwhile.
            ContainerPausedError: it is paused, and there is no reporter, or an hour has passed.
        """
        try:
            self._handle_output(on_output)
        except KeyboardInterrupt:
            self._ask_to_stop()
            try:
                self._handle_output(on_output)
            except KeyboardInterrupt:
                self._signal("KILL", "killpg")
                raise Interrupted("killed") from None
        finally:
            with contextlib.suppress(OSError):
                self._stream.close()
        return self._exit_code()

    def _handle_output(self, on_output: Callable[[bytes, bool], None]) -> None:
        while True:
            try:
                # On Windows a wait without a timeout can't be interrupted.
                frame = self._frames.get(timeout=_TICK_SECONDS)
            except queue.Empty:
                self._silence.check()
                continue
            if frame is None:
                return
            self._silence.reset()
            on_output(frame[1], frame[0] == _STDERR)

    def _read_frames(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            while len(head := self._reader.read(_FRAME.size)) == _FRAME.size:
                kind, length = _FRAME.unpack(head)
                self._frames.put((kind, self._reader.read(length)))
        self._frames.put(None)

    def _send_input(self, stdin: IO[bytes]) -> None:
        with contextlib.suppress(OSError, ValueError):
            while line := stdin.readline():
                self._writer.sendall(line)
        self._end_input()

    def _end_input(self) -> None:
        with contextlib.suppress(OSError):
            self._writer.shutdown(socket.SHUT_WR)

    def _ask_to_stop(self) -> None:
        if self._watches_stdin and sys.platform != "win32":  # pipes there can't be closed in one direction only
            self._end_input()
        else:
            self._signal("TERM", "kill")

    def _signal(self, name: str, how: str) -> None:
        """Send a signal to the process ("kill"), or also to all that it started ("killpg")."""
        if not self.number:
            return
        code = (
            "import os, signal, sys; getattr(os, sys.argv[1])(int(sys.argv[2]), getattr(signal, 'SIG' + sys.argv[3]))"
        )
        argv = [names.PYTHON, "-P", "-c", code, how, str(self.number), name]
        with contextlib.suppress(Exception):  # the process has ended already, or the container has
            created = self._docker.api.exec_create(self._container.id, argv)
            self._docker.api.exec_start(created["Id"])

    def _exit_code(self) -> int:
        import docker.errors

        container, deadline = self._container, time.monotonic() + _END_SECONDS
        while True:
            self._docker.require_unchanged(container, self._doing)
            with self._docker.during(self._doing, container, "ask for the exit code"):
                try:
                    answer = self._docker.api.exec_inspect(self._id)
                except docker.errors.NotFound:  # Docker forgets processes when it is restarted
                    self._docker.require_unchanged(container, self._doing)
                    reason = f"Docker was restarted during {self._doing}"
                    raise lost_error(container.name, reason, "Start it") from None
            if not answer["Running"] and answer["ExitCode"] is not None:
                if answer["ExitCode"] in (_KILLED, _NOT_STARTED):
                    self._require_survived(answer["ExitCode"])
                return int(answer["ExitCode"])
            if time.monotonic() > deadline:
                raise ContainerError(f"container {container.name}: lost contact with the process in it")
            time.sleep(0.05)

    def _require_survived(self, code: int) -> None:
        """Check the container for some seconds: one that is being stopped kills the process first, and then says so."""
        deadline = time.monotonic() + _LATE_SECONDS
        while time.monotonic() < deadline:
            now = self._docker.require_unchanged(self._container, self._doing)
            if now.state == "paused" and code == _NOT_STARTED:  # it was paused just before the process started
                raise paused_error(self._container.name, self._doing)
            time.sleep(0.2)


def output_of(docker: Docker, container: Container, argv: Sequence[str], doing: str) -> str:
    """Run a short program inside; return its standard output.

    Raises:
        ContainerLostError, ContainerPausedError: the container went away, or is paused.
        SpaceError: the program finds the disk full.
        ContainerError: it fails for another reason.
    """
    chunks: tuple[list[bytes], list[bytes]] = ([], [])
    process = ContainerProcess(docker, container, argv, doing=doing)
    code = process.wait(lambda chunk, is_stderr: chunks[is_stderr].append(chunk))
    if code != 0:
        lines = b"".join(chunks[True]).decode("utf-8", "replace").strip().splitlines()
        reason = lines[-1] if lines else "no message"
        if is_disk_full(reason):
            raise SpaceError(f"{doing} with {container.name}: the container's disk is full", SPACE_HINT)
        raise ContainerError(f"container {container.name}: {argv[-1]} failed with code {code}: {reason}")
    return b"".join(chunks[False]).decode("utf-8")
