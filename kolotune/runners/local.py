"""Processes on this machine. No other module of kolotune starts one."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from kolotune.foundation.errors import SpaceError
from kolotune.foundation.files import explained
from kolotune.foundation.secrets import HUB_TOKEN_VARIABLES
from kolotune.foundation.waiting_threads import SHORT_WAITS

from . import signals
from .watchdog import WATCH_STDIN

_PATIENCE_SECONDS = 10.0
_FULL_BYTES = 1 << 20
_CHUNK_BYTES = 1 << 16
_ERROR_BYTES = 4000
_children: dict[int, subprocess.Popen[str]] = {}
"""What `run` runs, by threads."""


def run(
    argv: Sequence[str],
    *,
    log: Path,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    on_line: Callable[[str], bool] | None = None,
    ends_with_parent: bool = False,
) -> int:
    """Run a program until it ends; append its output to a log.

    Args:
        argv: the program and its arguments, never a shell string.
        log: the file that gets standard output and standard error.
        env: variables to add to this process's own, and to `SHORT_WAITS`. The hub's tokens are not inherited.
        cwd: the working directory.
        on_line: called with each line of output first; a line for which it returns True is not logged.
        ends_with_parent: the program calls `watchdog.end_with_parent`, and stops when this process is killed.

    Returns:
        The exit code; negative when a signal ended the program.

    Raises:
        SpaceError, ArtifactError: the log can't be written, or the program failed on a full disk.
        OSError: the program can't be started.
    """
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        output = log.open("a", encoding="utf-8")
    except OSError as error:
        raise explained(error, log) from error
    with output:
        child = subprocess.Popen(
            list(argv),
            stdin=subprocess.PIPE if ends_with_parent else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**_inherited(), "PYTHONUNBUFFERED": "1", WATCH_STDIN: str(int(ends_with_parent)), **(env or {})},
            cwd=cwd,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        _children[threading.get_ident()] = child
        try:
            assert child.stdout is not None
            for line in child.stdout:
                if on_line is None or not on_line(line.rstrip("\n")):
                    output.write(line)
                    output.flush()
            code = child.wait()
        finally:
            _children.pop(threading.get_ident(), None)  # it may have run another meanwhile
            _stop(child)
            if child.stdin is not None:
                child.stdin.close()
    if code != 0 and shutil.disk_usage(log.parent).free < _FULL_BYTES:
        # Each program words this differently; llama.cpp's quantizer says "iostream error".
        raise SpaceError(f"{log.parent}: the disk is full")
    return code


def stop_child_of(thread: int) -> None:
    """Stop the program that `run` runs in a thread, given by its identifier, if there is one."""
    child = _children.get(thread)
    if child is not None:
        _stop(child)


def _inherited() -> dict[str, str]:
    """Return this process's variables without the hub's tokens, and how threads wait; other threads may change some."""
    values = {name: os.environ.get(name) for name in list(os.environ) if name not in HUB_TOKEN_VARIABLES}
    return SHORT_WAITS | {name: value for name, value in values.items() if value is not None}


class ProgramError(Exception):
    """A program ended with an exit code other than 0.

    Attributes:
        code: the exit code.
        stderr: the end of its standard error.
    """

    def __init__(self, code: int, stderr: str) -> None:
        super().__init__(stderr)
        self.code, self.stderr = code, stderr


def stream(argv: Sequence[str], stdin: Iterable[bytes] = ()) -> Iterator[bytes]:
    """Run a program and yield its standard output as it arrives, while `stdin` is written to its standard input.

    Args:
        argv: the program and its arguments, never a shell string. It does not get the hub's tokens.
        stdin: consumed in a thread; an exception that it raises is raised here.

    Raises:
        ProgramError: the program ended with an exit code other than 0.
        OSError: it can't be started.
    """
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            list(argv), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=_inherited(), bufsize=0
        )
        failures: list[BaseException] = []
        feeder = threading.Thread(target=_feed, args=(child, stdin, failures), daemon=True)
        feeder.start()
        try:
            assert child.stdout is not None
            while chunk := child.stdout.read(_CHUNK_BYTES):
                yield chunk
            code = child.wait()
        finally:
            _stop(child)
            feeder.join(_PATIENCE_SECONDS)
            child.stdout.close()  # type: ignore[union-attr]
        if failures:
            raise failures[0]
        if code != 0:
            errors.seek(max(0, errors.seek(0, os.SEEK_END) - _ERROR_BYTES))
            raise ProgramError(code, errors.read().decode("utf-8", "replace"))


def _feed(child: subprocess.Popen[bytes], stdin: Iterable[bytes], failures: list[BaseException]) -> None:
    """Write `stdin` to a child and collect what goes wrong. It is no failure that the child stops reading."""
    assert child.stdin is not None
    try:
        for chunk in stdin:
            view = memoryview(chunk)
            while view:
                view = view[child.stdin.write(view) :]
    except BrokenPipeError:
        pass
    except BaseException as error:
        failures.append(error)
    finally:
        with contextlib.suppress(OSError):
            child.stdin.close()


def start_detached(argv: Sequence[str], log: Path) -> int:
    """Start a program that survives the end of this process, its terminal and its connection.

    Args:
        argv: the program and its arguments, never a shell string.
        log: the file that its output is appended to.

    Returns:
        Its process id.

    Raises:
        OSError: it can't be started, or the log can't be written.
    """
    with log.open("ab") as output:
        child = subprocess.Popen(
            list(argv), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, **signals.detached()
        )
    return child.pid


@contextlib.contextmanager
def piped(
    argv: Sequence[str], env: Mapping[str, str], errors: IO[bytes] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program with pipes for its standard input and output while the block runs.

    At the end of the block its input is closed, and the program should end; after an error it is stopped.

    Args:
        argv: the program and its arguments, never a shell string. It does not get the hub's tokens.
        env: variables to add to this process's own.
        errors: file that gets its standard error; None for this process's own.
    """
    child = subprocess.Popen(
        list(argv), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env={**_inherited(), **env}
    )
    try:
        yield child
        assert child.stdin is not None
        child.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_PATIENCE_SECONDS)
    finally:
        _stop(child)
        for pipe in (child.stdin, child.stdout):
            with contextlib.suppress(OSError):
                assert pipe is not None
                pipe.close()


class FedProgram:
    """A program that is written to while it runs; see `fed`.

    Attributes:
        code: its exit code; None while it runs.
    """

    def __init__(self, child: subprocess.Popen[bytes]) -> None:
        self._child = child

    @property
    def code(self) -> int | None:
        return self._child.poll()

    def write(self, data: bytes) -> None:
        """Write to its standard input.

        Raises:
            OSError: it has ended.
        """
        assert self._child.stdin is not None
        self._child.stdin.write(data)
        self._child.stdin.flush()


@contextlib.contextmanager
def fed(argv: Sequence[str], log: Path, patience: float) -> Iterator[FedProgram]:
    """Run a program that reads its standard input while the block runs, in a session of its own.

    At the end of the block its input is closed, and it is stopped if it has not ended after some time. Ctrl-C in the
    terminal does not reach it.

    Args:
        argv: the program and its arguments, never a shell string. It does not get the hub's tokens.
        log: the file that its output is appended to.
        patience: seconds.

    Raises:
        OSError: it can't be started, or the log can't be written.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        child = subprocess.Popen(
            list(argv), stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, env=_inherited(),
            **signals.detached(),
        )  # fmt: skip
    try:
        yield FedProgram(child)
    finally:
        assert child.stdin is not None
        with contextlib.suppress(OSError):
            child.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(patience)
        _stop(child)


def run_interactive(argv: Sequence[str]) -> int:
    """Run a program in the user's terminal; return its exit code."""
    return subprocess.run(list(argv), check=False).returncode


def _stop(child: subprocess.Popen[bytes] | subprocess.Popen[str]) -> None:
    """Stop a child that still runs: with SIGTERM first, then with SIGKILL; on Windows both end it at once."""
    if child.poll() is None:
        with contextlib.suppress(OSError):
            child.send_signal(signal.SIGTERM)
        try:
            child.wait(_PATIENCE_SECONDS)
        except BaseException as error:  # it takes too long, or the user pressed Ctrl-C a second time
            child.kill()
            child.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise


def python(module: str, *arguments: str) -> list[str]:
    """Return the argv that runs a module with this interpreter, without the working directory in its path."""
    return [sys.executable, "-P", "-m", module, *arguments]


def last_lines(log: Path, count: int = 1) -> str:
    """Return the last lines of a log that are not empty, for an error message; "" when there are none."""
    with contextlib.suppress(OSError):
        lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
        return " | ".join([line for line in lines if line][-count:])
    return ""
