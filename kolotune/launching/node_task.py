"""The task of one machine of a job: kolotune's own verbs, run one after the other.

The first machine does the whole run, or only trains. The others prepare the same chats and train together with it. The
output consists of the verbs' events and a last one with the exit code.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from kolotune.foundation import typed_storage
from kolotune.foundation.errors import Interrupted, KolotuneError, LaunchError
from kolotune.foundation.reporter import JsonReporter
from kolotune.foundation.secrets import HUB_TOKEN_VARIABLES
from kolotune.run_folder.layout import RunFolder
from kolotune.runners import local, signals

from .job_output import ENDED

_NAME_SECONDS = 600  # a cluster publishes the name of the first machine some time after its start


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
        code = report_failure(error)
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
    if signals.was_stopped(code):
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


def report_failure(error: KolotuneError) -> int:
    """Print an error as an event; return its exit code."""
    JsonReporter().failure(error.cause, error.hint, error.exit_code)
    return error.exit_code
