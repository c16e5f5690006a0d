"""The program on each machine of a job: ``python -m kolotune.launching.node COMMAND …``.

about ROOT              print the version of kolotune and the absolute path of ROOT
run …                   do this machine's task
start --state DIR …     do it in a process that outlives the connection
watch --state DIR …     print the output of such a process, from a byte on, until it has ended
stop --state DIR …      ask it to stop, and wait
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

from kolotune.foundation import locks, typed_storage
from kolotune.foundation.errors import KolotuneError, LaunchError, RunFolderError
from kolotune.runners import local, signals
from kolotune.version import VERSION

from .node_task import NodeTask, report_failure, run_task

MODULE = "kolotune.launching.node"
_START_SECONDS = 60
_LOOK_SECONDS = 0.3
_CHUNK_BYTES = 1 << 16


@dataclass(frozen=True)
class About:
    """The answer to ``about``."""

    version: str
    root: str


class _DetachedTask:
    """The files of a task that outlives the connection: its log, its process id, its exit code, and a lock."""

    def __init__(self, folder: Path, number: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.log, self._process, self._end = (folder / f"{number}.{kind}" for kind in ("log", "process", "end"))
        self._lock = folder / f"{number}.lock"

    def lock(self) -> AbstractContextManager[None]:
        return locks.hold(self._lock, _START_SECONDS)

    def write_process(self) -> None:
        self._process.write_text(str(os.getpid()), encoding="ascii")

    def write_end(self, code: int) -> None:
        typed_storage.write(self._end, code)

    def remove(self) -> None:
        for file in (self.log, self._process, self._end):
            file.unlink(missing_ok=True)

    def process(self) -> int | None:
        """Return the id of the process that does it, or did."""
        with contextlib.suppress(OSError, ValueError):
            return int(self._process.read_text(encoding="ascii"))
        return None

    def is_running(self) -> bool:
        return locks.is_held(self._lock)

    def has_ended(self) -> bool:
        return self._end.is_file() or (self.process() is not None and not self.is_running())


def _run(task: NodeTask, number: int, detached: _DetachedTask | None) -> int:
    if detached is None:
        return run_task(task, number)
    with detached.lock():
        detached.write_process()
        code = run_task(task, number)
        detached.write_end(code)
        return code


def _start(task: NodeTask, number: int, folder: Path) -> int:
    detached = _DetachedTask(folder, number)
    if detached.is_running():
        raise RunFolderError(
            f"{task.run}: its job is still running on {socket.gethostname()}",
            "kolotune follow RUN shows it, kolotune cancel RUN stops it.",
        )
    detached.remove()
    argv = [task.python, "-P", "-m", MODULE, "run", f"--state={folder}", *task.arguments(number)]
    local.start_detached(argv, detached.log)
    deadline = time.monotonic() + _START_SECONDS
    while detached.process() is None:
        if time.monotonic() > deadline:
            raise LaunchError(f"{socket.gethostname()}: the job did not start: {local.last_lines(detached.log)}")
        time.sleep(_LOOK_SECONDS)
    return 0


def _watch(detached: _DetachedTask, begin: int) -> int:
    """Write the log to standard output as it grows, as bytes: the reader counts them."""
    is_last = False
    with detached.log.open("rb") as log:
        log.seek(begin)
        while True:
            while chunk := log.read(_CHUNK_BYTES):
                sys.stdout.buffer.write(chunk)
                sys.stdout.buffer.flush()
            if is_last:
                return 0
            is_last = detached.has_ended()
            if not is_last:
                time.sleep(_LOOK_SECONDS)


def _stop(detached: _DetachedTask) -> int:
    number = detached.process()
    if number is not None and detached.is_running():
        signals.request_stop(number)
        deadline = time.monotonic() + _START_SECONDS
        while detached.is_running() and time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("about").add_argument("root", type=Path)
    for command in ("run", "start", "watch", "stop"):
        options = commands.add_parser(command, allow_abbrev=False)
        options.add_argument("--state", type=Path, required=command != "run")
        options.add_argument("--number", type=int, default=0)
        if command == "watch":
            options.add_argument("--begin", type=int, default=0)
        if command in ("run", "start"):
            options.add_argument("--config", required=True)
            options.add_argument("--output-dir", required=True)
            options.add_argument("--machines", type=int, default=1)
            for name in ("--rdzv", "--job", "--token-file"):
                options.add_argument(name, default="")
            options.add_argument("--only-train", action="store_true")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run one command; return the exit code."""
    options = _parser().parse_args(arguments)
    if options.command == "about":
        about = About(VERSION, str(options.root.expanduser().absolute()))
        print(json.dumps(asdict(about)), flush=True)
        return 0
    detached = _DetachedTask(options.state, options.number) if options.state else None
    if options.command in ("watch", "stop"):
        assert detached is not None
        return _watch(detached, options.begin) if options.command == "watch" else _stop(detached)
    task = NodeTask(
        config=options.config,
        run=options.output_dir,
        machines=options.machines,
        rdzv=options.rdzv,
        job=options.job,
        token_file=options.token_file,
        only_train=options.only_train,
    )
    if options.command == "start":
        try:
            return _start(task, options.number, options.state)
        except KolotuneError as error:
            return report_failure(error)
    signals.interrupt_on_termination()
    return _run(task, options.number, detached)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
