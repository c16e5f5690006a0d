"""What each machine of a job does: ``python -m kolotune.launching.node COMMAND …``. It starts kolotune's own verbs.

The first machine does the whole run, or only trains. The others train with it: they prepare the same chats, and train.
The job's output is the verbs' events, and at last one that says how it ended.

about ROOT              what is installed, and ROOT as a whole path
run …                   does this machine's part
start --state DIR …     does it in a process that outlives the connection
watch --state DIR …     what such a process prints, from a byte on, until it has ended
stop --state DIR …      asks it to end, and waits
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
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from kolotune.foundation.errors import Interrupted, KolotuneError, LaunchError, RunFolderError
from kolotune.foundation.files import write_json
from kolotune.foundation.reporter import JsonReporter
from kolotune.foundation.secrets import HUB_TOKEN_VARIABLES
from kolotune.run_folder.layout import RunFolder
from kolotune.runners import local
from kolotune.version import VERSION

from .output import ENDED

MODULE = "kolotune.launching.node"
_PATIENCE_SECONDS = 600  # for the first machine's name to be known: a cluster tells it some time after it started
_START_SECONDS = 60
_LOOK_SECONDS = 0.3
_PIECE_BYTES = 1 << 16


@dataclass(frozen=True)
class Node:
    """A job as its machines see it.

    Attributes:
        config: file of options.
        run: the run folder; machines after the first have theirs below it, so that they may share a disk.
        machines: how many there are.
        rdzv: where they meet, as HOST:PORT; "" for a single one.
        job: what the scheduler calls it: a machine that finds it in its folder comes back, and goes on.
        token_file: where the hub's token is read; "" for nowhere.
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

    def commands(self, number: int, *, again: bool = False) -> list[list[str]]:
        """What machine `number`, from 0, runs; `again`: it was lost, and goes on."""
        kolotune = [self.python, "-P", "-m", "kolotune"]
        token = ["--hf-token", self.token_file] if self.token_file else []
        together = ["--nnodes", str(self.machines), "--rdzv", self.rdzv] if self.machines > 1 else []
        more = [*token, "--json"]
        resumed = ["--use-checkpoint"] if again else []
        if number == 0 and not self.only_train:
            options = ["--config", self.config, "--output-dir", self.run]
            return [[*kolotune, "run", *options, *together, *resumed, *more]]
        folder = str(RunFolder(Path(self.run)).of_machine(number).root)
        return [
            [*kolotune, "prepare", "--config", self.config, "--output-dir", folder, *more],
            [*kolotune, "train", folder, *together, *resumed, *more],
        ]

    def arguments(self, number: int | str) -> list[str]:
        """Of ``run`` and ``start``."""
        given = {
            "config": self.config, "output-dir": self.run, "machines": str(self.machines), "number": str(number),
            "rdzv": self.rdzv, "job": self.job, "token-file": self.token_file,
        }  # fmt: skip
        only = ["--only-train"] if self.only_train else []
        return [*[f"--{name}={value}" for name, value in given.items() if value], *only]


def carry_out(node: Node, number: int) -> int:
    """Does the part of machine `number`; prints what it prints, and the end; returns the exit code."""
    folder = RunFolder(Path(node.run)).of_machine(number)
    code = 0
    try:
        if node.machines > 1:
            _await_name(node.rdzv.rpartition(":")[0])
        again = _was_here(folder, node.job)
        for argv in node.commands(number, again=again):
            code = code or _run(argv, folder)
    except KolotuneError as error:
        code = _failed(error)
    except KeyboardInterrupt:
        code = Interrupted.exit_code
    _say(json.dumps({"event": ENDED, "code": code}))
    return code


def _run(argv: list[str], folder: RunFolder) -> int:
    # The verbs read the hub's token where this process was given one.
    env = {name: os.environ[name] for name in HUB_TOKEN_VARIABLES if name in os.environ}

    def on_line(line: str) -> bool:
        _say(line)
        return False  # it goes to the log in the run folder, too

    code = local.run(argv, log=folder.log("launched"), env=env, on_line=on_line, ends_with_parent=True)
    if code in (-signal.SIGTERM, -signal.SIGINT):  # it was asked to stop before it could know how
        return Interrupted.exit_code
    return code if code >= 0 else 128 - code  # as shells tell a signal


def _was_here(folder: RunFolder, job: str) -> bool:
    """Whether this folder has been a part of this very job before; from now on it has."""
    mark = {"job": job}
    with contextlib.suppress(OSError, ValueError):
        if job and json.loads(folder.part.read_text(encoding="utf-8")) == mark:
            return True
    write_json(folder.part, mark)
    return False


def _await_name(host: str) -> None:
    """Waits until a name can be resolved."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
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


def _say(line: str) -> None:
    print(line, flush=True)


def _failed(error: KolotuneError) -> int:
    JsonReporter().failure(error.cause, error.hint, error.exit_code)
    return error.exit_code


class _State:
    """A machine's part that runs on its own: its log, who does it, and how it ended."""

    def __init__(self, folder: Path, number: int) -> None:
        from filelock import FileLock

        folder.mkdir(parents=True, exist_ok=True)
        self.log, self._process, self._end = (folder / f"{number}.{kind}" for kind in ("log", "process", "end"))
        self.lock = FileLock(folder / f"{number}.lock")

    def begin(self) -> None:
        self._process.write_text(str(os.getpid()), encoding="ascii")

    def end(self, code: int) -> None:
        write_json(self._end, code)

    def forget(self) -> None:
        for each in (self.log, self._process, self._end):
            each.unlink(missing_ok=True)

    def process(self) -> int | None:
        """Who does it, or did."""
        with contextlib.suppress(OSError, ValueError):
            return int(self._process.read_text(encoding="ascii"))
        return None

    def is_held(self) -> bool:
        from filelock import Timeout

        try:
            with self.lock.acquire(timeout=0):
                return False
        except Timeout:
            return True

    def has_ended(self) -> bool:
        return self._end.is_file() or (self.process() is not None and not self.is_held())


def _run_here(node: Node, number: int, state: _State | None) -> int:
    if state is None:
        return carry_out(node, number)
    with state.lock.acquire(timeout=_START_SECONDS):
        state.begin()
        code = carry_out(node, number)
        state.end(code)
        return code


def _start(node: Node, number: int, folder: Path) -> int:
    state = _State(folder, number)
    if state.is_held():
        raise RunFolderError(
            f"{node.run}: its job is at work on {socket.gethostname()}",
            "kolotune follow RUN shows it, kolotune cancel RUN stops it.",
        )
    state.forget()
    argv = [node.python, "-P", "-m", MODULE, "run", f"--state={folder}", *node.arguments(number)]
    local.start_detached(argv, state.log)
    deadline = time.monotonic() + _START_SECONDS
    while state.process() is None:
        if time.monotonic() > deadline:
            raise LaunchError(f"{socket.gethostname()}: the job did not start: {local.last_lines(state.log)}")
        time.sleep(_LOOK_SECONDS)
    return 0


def _watch(state: _State, begin: int) -> int:
    """Writes the log as it grows, to standard output, as bytes: whoever reads counts them."""
    done = False
    with state.log.open("rb") as log:
        log.seek(begin)
        while True:
            while piece := log.read(_PIECE_BYTES):
                sys.stdout.buffer.write(piece)
                sys.stdout.buffer.flush()
            if done:
                return 0
            done = state.has_ended()
            if not done:
                time.sleep(_LOOK_SECONDS)


def _stop(state: _State) -> int:
    number = state.process()
    if number is not None and state.is_held():
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGTERM)
        deadline = time.monotonic() + _START_SECONDS
        while state.is_held() and time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS)
    return 0


def _terminate(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(arguments: Sequence[str]) -> int:
    """Does one command; returns the exit code."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("about").add_argument("root", type=Path)
    for command in ("run", "start", "watch", "stop"):
        each = commands.add_parser(command, allow_abbrev=False)
        each.add_argument("--state", type=Path, required=command != "run")
        each.add_argument("--number", type=int, default=0)
        if command == "watch":
            each.add_argument("--begin", type=int, default=0)
        if command in ("run", "start"):
            each.add_argument("--config", required=True)
            each.add_argument("--output-dir", required=True)
            each.add_argument("--machines", type=int, default=1)
            for name in ("--rdzv", "--job", "--token-file"):
                each.add_argument(name, default="")
            each.add_argument("--only-train", action="store_true")
    given = parser.parse_args(arguments)
    if given.command == "about":
        _say(json.dumps({"version": VERSION, "root": str(given.root.expanduser().absolute())}))
        return 0
    state = _State(given.state, given.number) if given.state else None
    if given.command in ("watch", "stop"):
        assert state is not None
        return _watch(state, given.begin) if given.command == "watch" else _stop(state)
    node = Node(
        config=given.config,
        run=given.output_dir,
        machines=given.machines,
        rdzv=given.rdzv,
        job=given.job,
        token_file=given.token_file,
        only_train=given.only_train,
    )
    if given.command == "start":
        try:
            return _start(node, given.number, given.state)
        except KolotuneError as error:
            return _failed(error)
    signal.signal(signal.SIGTERM, _terminate)
    return _run_here(node, given.number, state)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
