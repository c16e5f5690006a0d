"""The program on each machine of a job: ``python -m kolotune.launching.node COMMAND …``. It runs kolotune's own verbs.

The first machine does the whole run, or only trains. The others prepare the same chats and train together with it. The
output consists of the verbs' events and a last one with the exit code.

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
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from kolotune.foundation import typed_storage
from kolotune.foundation.errors import Interrupted, KolotuneError, LaunchError, RunFolderError
from kolotune.foundation.reporter import JsonReporter
from kolotune.foundation.secrets import HUB_TOKEN_VARIABLES
from kolotune.run_folder.layout import RunFolder
from kolotune.runners import local
from kolotune.version import VERSION

from .job_output import ENDED

MODULE = "kolotune.launching.node"
_NAME_SECONDS = 600  # a cluster publishes the name of the first machine some time after its start
_START_SECONDS = 60
_LOOK_SECONDS = 0.3
_CHUNK_BYTES = 1 << 16


@dataclass(frozen=True)
class About:
    """The answer to ``about``."""

    version: str
    root: str


@dataclass(frozen=True)
class NodeTask:
    """A job as its machines see it.

    Attributes:
        config: file of options.
        run: the run folder; the other machines have theirs below it, so that all may share a disk.
        machines: how many there are.
        rdzv: where they meet, as HOST:PORT; "" for a single one.
        job: the scheduler's name for it. A machine that finds it in its folder was restarted, and resumes.
        token_file: file with the hub's token; "" for none.
        python: the interpreter.
        only_train: the first machine does no more than the others.
    """

    config: str
    run: str
    machines: int = 1
    rdzv: str = ""
    job: str = ""
    token_file: str = ""
    python: str = sys.executable
    only_train: bool = False

    def commands(self, number: int, *, resumes: bool = False) -> list[list[str]]:
        """Return the commands of machine `number`, from 0; `resumes`: it was restarted."""
        kolotune = [self.python, "-P", "-m", "kolotune"]
        token = ["--hf-token", self.token_file] if self.token_file else []
        meeting = ["--nnodes", str(self.machines), "--rdzv", self.rdzv] if self.machines > 1 else []
        common = [*token, "--json"]
        checkpoint = ["--use-checkpoint"] if resumes else []
        if number == 0 and not self.only_train:
            options = ["--config", self.config, "--output-dir", self.run]
            return [[*kolotune, "run", *options, *meeting, *checkpoint, *common]]
        folder = str(RunFolder(Path(self.run)).of_machine(number).root)
        return [
            [*kolotune, "prepare", "--config", self.config, "--output-dir", folder, *common],
            [*kolotune, "train", folder, *meeting, *checkpoint, *common],
        ]

    def arguments(self, number: int | str) -> list[str]:
        """Return the arguments of ``run`` and ``start``."""
        values = {
            "config": self.config, "output-dir": self.run, "machines": str(self.machines), "number": str(number),
            "rdzv": self.rdzv, "job": self.job, "token-file": self.token_file,
        }  # fmt: skip
        only_train = ["--only-train"] if self.only_train else []
        return [*[f"--{name}={value}" for name, value in values.items() if value], *only_train]


def run_task(task: NodeTask, number: int) -> int:
    """Do the task of machine `number`; print its events and its exit code, and return the exit code."""
    folder = RunFolder(Path(task.run)).of_machine(number)
    code = 0
    try:
        if task.machines > 1:
            _wait_for_name(task.rdzv.rpartition(":")[0])
        for argv in task.commands(number, resumes=_was_started(folder, task.job)):
            code = code or _run_verb(argv, folder)
    except KolotuneError as error:
        code = _report_failure(error)
    except KeyboardInterrupt:
        code = Interrupted.exit_code
    _print(json.dumps({"event": ENDED, "code": code}))
    return code


def _run_verb(argv: list[str], folder: RunFolder) -> int:
    # The verbs get the hub's token that this process was given.
    env = {name: os.environ[name] for name in HUB_TOKEN_VARIABLES if name in os.environ}

    def on_line(line: str) -> bool:
        _print(line)
        return False  # also log it in the run folder

    code = local.run(argv, log=folder.log("launched"), env=env, on_line=on_line, ends_with_parent=True)
    if code in (-signal.SIGTERM, -signal.SIGINT):  # stopped before it could handle the signal
        return Interrupted.exit_code
    return code if code >= 0 else 128 - code  # a shell's code for a signal


def _was_started(folder: RunFolder, job: str) -> bool:
    """Whether this machine has started this very job before; remember that it has now."""
    mark = {"job": job}
    with contextlib.suppress(OSError, typed_storage.StorageError):
        if job and typed_storage.read_object(folder.part) == mark:
            return True
    typed_storage.write(folder.part, mark)
    return False


def _wait_for_name(host: str) -> None:
    deadline = time.monotonic() + _NAME_SECONDS
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise LaunchError(
                    f"rdzv: {host}: {error.strerror or error}", "Give an address that all machines reach with --rdzv."
                ) from None
        time.sleep(2)


def _print(line: str) -> None:
    print(line, flush=True)


def _report_failure(error: KolotuneError) -> int:
    JsonReporter().failure(error.cause, error.hint, error.exit_code)
    return error.exit_code


class _DetachedTask:
    """The files of a task that outlives the connection: its log, its process id, its exit code, and a lock."""

    def __init__(self, folder: Path, number: int) -> None:
        from filelock import FileLock

        folder.mkdir(parents=True, exist_ok=True)
        self.log, self._process, self._end = (folder / f"{number}.{kind}" for kind in ("log", "process", "end"))
        self.lock = FileLock(folder / f"{number}.lock")

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
        from filelock import Timeout

        try:
            with self.lock.acquire(timeout=0):
                return False
        except Timeout:
            return True

    def has_ended(self) -> bool:
        return self._end.is_file() or (self.process() is not None and not self.is_running())


def _run(task: NodeTask, number: int, detached: _DetachedTask | None) -> int:
    if detached is None:
        return run_task(task, number)
    with detached.lock.acquire(timeout=_START_SECONDS):
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
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGTERM)
        deadline = time.monotonic() + _START_SECONDS
        while detached.is_running() and time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS)
    return 0


def _terminate(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


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
        _print(json.dumps(asdict(About(VERSION, str(options.root.expanduser().absolute())))))
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
            return _report_failure(error)
    signal.signal(signal.SIGTERM, _terminate)
    return _run(task, options.number, detached)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
