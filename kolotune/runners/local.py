"""Starts processes on this machine. The only place in kolotune that does."""

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
from typing import Any

from kolotune.foundation.errors import SpaceError
from kolotune.foundation.files import explained

from .watchdog import WATCH_STDIN

_PATIENCE_SECONDS = 10.0
_FULL_BYTES = 1 << 20
_PIECE_BYTES = 1 << 16
_SAID_BYTES = 4000
# Values of these are secrets or would leak into what a child writes.
_KEPT_FROM_CHILDREN = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


def run(
    argv: Sequence[str],
    *,
    log: Path,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    on_line: Callable[[str], bool] | None = None,
    ends_with_us: bool = False,
) -> int:
    """Runs a program to its end; its output goes to `log`.

    Args:
        argv: the program and its arguments, never a shell string.
        log: file that the output is appended to.
        env: variables set for it in addition to this process's own, less the hub's tokens.
        cwd: folder it is started in.
        on_line: sees every line of output first; a line for which it returns True stays out of the log.
        ends_with_us: for programs of our own that call `watchdog.end_with_parent`: they end when we are killed.

    Returns:
        The exit code; negative when a signal ended it.

    Raises:
        SpaceError, ArtifactError: the log can't be written, or the program failed on a full disk.
        OSError: the program can't be started.
    """
    inherited = _inherited()
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        output = log.open("a", encoding="utf-8")
    except OSError as error:
        raise explained(error, log) from error
    with output:
        child = subprocess.Popen(
            list(argv),
            stdin=subprocess.PIPE if ends_with_us else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**inherited, "PYTHONUNBUFFERED": "1", WATCH_STDIN: str(int(ends_with_us)), **(env or {})},
            cwd=cwd,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        try:
            assert child.stdout is not None
            for line in child.stdout:
                if on_line is None or not on_line(line.rstrip("\n")):
                    output.write(line)
                    output.flush()
            code = child.wait()
        finally:
            _end(child)
            if child.stdin is not None:
                child.stdin.close()
    if code != 0 and shutil.disk_usage(log.parent).free < _FULL_BYTES:
        # Programs say it in many words, llama.cpp's quantizer as "iostream error".
        raise SpaceError(f"{log.parent}: the disk is full")
    return code


def _inherited() -> dict[str, str]:
    """This process's variables, less the hub's tokens; another thread may take some away meanwhile."""
    found = {name: os.environ.get(name) for name in list(os.environ) if name not in _KEPT_FROM_CHILDREN}
    return {name: value for name, value in found.items() if value is not None}


class ProgramError(Exception):
    """A program ended with another code than 0.

    Args:
        code: the exit code.
        said: the end of its standard error.
    """

    def __init__(self, code: int, said: str) -> None:
        super().__init__(said)
        self.code, self.said = code, said


def through(argv: Sequence[str], typed: Iterable[bytes] = ()) -> Iterator[bytes]:
    """What a program writes to its standard output, as it comes, while `typed` goes into its standard input.

    Args:
        argv: the program and its arguments, never a shell string. It does not get the hub's tokens.
        typed: read in a thread; what is raised there is raised here.

    Raises:
        ProgramError: it ended with another code than 0.
        OSError: it can't be started.
    """
    inherited = _inherited()
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            list(argv), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=inherited, bufsize=0
        )
        failed: list[BaseException] = []
        feeder = threading.Thread(target=_feed, args=(child, typed, failed), daemon=True)
        feeder.start()
        try:
            assert child.stdout is not None
            while piece := child.stdout.read(_PIECE_BYTES):
                yield piece
            code = child.wait()
        finally:
            _end(child)
            feeder.join(_PATIENCE_SECONDS)
            child.stdout.close()  # type: ignore[union-attr]
        if failed:
            raise failed[0]
        if code != 0:
            errors.seek(max(0, errors.seek(0, os.SEEK_END) - _SAID_BYTES))
            raise ProgramError(code, errors.read().decode("utf-8", "replace"))


def _feed(child: subprocess.Popen[bytes], typed: Iterable[bytes], failed: list[BaseException]) -> None:
    """Writes `typed` into a child; notes what goes wrong with it. A child that reads no more is no failure of ours."""
    assert child.stdin is not None
    try:
        for piece in typed:
            view = memoryview(piece)
            while view:
                view = view[child.stdin.write(view) :]
    except BrokenPipeError:
        pass
    except BaseException as error:
        failed.append(error)
    finally:
        with contextlib.suppress(OSError):
            child.stdin.close()


def detached(argv: Sequence[str], log: Path) -> int:
    """Starts a program that goes on when this process, its terminal or its connection ends.

    Args:
        argv: the program and its arguments, never a shell string.
        log: file that its output is appended to.

    Returns:
        Its process number.

    Raises:
        OSError: it can't be started, or the log can't be written.
    """
    with log.open("ab") as output:
        child = subprocess.Popen(
            list(argv), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    return child.pid


@contextlib.contextmanager
def piped(argv: Sequence[str], env: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A program that is spoken to through its standard input and output, for the time of the block.

    When the block ends its input is closed, which it should take as its end; after an error it is stopped.
    """
    inherited = _inherited()
    child = subprocess.Popen(list(argv), stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**inherited, **env})
    try:
        yield child
        assert child.stdin is not None
        child.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_PATIENCE_SECONDS)
    finally:
        _end(child)
        for pipe in (child.stdin, child.stdout):
            with contextlib.suppress(OSError):
                assert pipe is not None
                pipe.close()


def interactive(argv: Sequence[str]) -> int:
    """Hands the terminal to a program until it ends; returns its exit code."""
    return subprocess.run(list(argv), check=False).returncode


def _end(child: subprocess.Popen[Any]) -> None:
    """Stops a child that still runs: politely, then by force."""
    if child.poll() is None:
        with contextlib.suppress(OSError):
            child.send_signal(signal.SIGTERM)
        try:
            child.wait(_PATIENCE_SECONDS)
        except BaseException as error:  # it takes too long, or the user asked a second time
            child.kill()
            child.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise


def python(module: str, *arguments: str) -> list[str]:
    """The argv that runs a module of this environment, isolated from the folder it is started in."""
    return [sys.executable, "-P", "-m", module, *arguments]


def last_lines(log: Path, count: int = 1) -> str:
    """The last lines of a log that are not empty, for an error message; "" when there are none."""
    with contextlib.suppress(OSError):
        lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
        return " | ".join([line for line in lines if line][-count:])
    return ""
