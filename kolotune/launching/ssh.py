"""Launch jobs on named machines, through the system's own ssh with its keys and settings.

kolotune is installed on each machine. Chats, options and a base model's folder are sent as tars, to folders named by
their content. The job does not depend on the connection, and continues when that ends.
"""

from __future__ import annotations

import dataclasses
import json
import re
import secrets
import shlex
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import ClassVar

from kolotune.foundation import typed_storage
from kolotune.foundation.errors import ConfigError, Interrupted, LaunchError
from kolotune.foundation.reporter import Reporter
from kolotune.run_folder.layout import RunFolder
from kolotune.runners import local
from kolotune.runners.container.path_map import PathMap
from kolotune.runners.container.results import fetch_run
from kolotune.version import VERSION

from .job_names import require_word
from .job_output import JobOutput, SilentReporter
from .launcher import LATER, MEETING_PORT, JobSpec, LaunchedJob, LaunchPlan
from .node import MODULE, About
from .node_task import NodeTask
from .remote import DryRun, Execute, RemoteFolder, SentConfig, connect, execute, send_inputs

_HOST = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9][A-Za-z0-9_.:-]*")
_NO_CONNECTION = 255  # ssh's own exit code
_TRIES = 20
_RECONNECT_SECONDS = 15.0
_LAST_WORDS_SECONDS = 30.0  # for the first machine to report its own failure, once another has failed
# Nobody is there to type a password during a job, and a dead connection must be noticed.
_OPTIONS = ("BatchMode=yes", "ConnectTimeout=20", "ServerAliveInterval=15", "ServerAliveCountMax=4")


@dataclass(frozen=True)
class _Machine:
    """One of a job's machines, with its task and its inputs."""

    host: str
    number: int
    folder: RemoteFolder
    task: NodeTask
    config: SentConfig


@dataclass(frozen=True)
class Ssh:
    """Machines that ssh reaches, as a `Launcher`.

    Attributes:
        hosts: as ssh is given them; the machines meet at the first, and it makes the results.
        folder: on each machine, for everything of ours; relative to the home there until a job has resolved it, so two
            launchers that differ in it alone are equal.
        python: the interpreter on each machine that has kolotune.
        ssh_config: settings for ssh instead of the user's.
    """

    hosts: tuple[str, ...]
    folder: str = dataclasses.field(default="kolotune-runs", compare=False)
    python: str = "python3"
    ssh_config: str | None = None

    NAME: ClassVar[str] = "ssh"

    def plan(self, spec: JobSpec) -> LaunchPlan:
        about = About(VERSION, f"HOME/{self.folder}".replace("HOME//", "/"))
        answer = json.dumps(typed_storage.plain(about)).encode()
        dry_run = DryRun({"about": answer, "have": b"[false]"})
        _, machines = self._launch(spec, SilentReporter(), "JOB", dry_run)
        commands = [
            f"({machine.host}:) {shlex.join(argv)}"
            for machine in machines
            for argv in machine.task.commands(machine.number)
        ]
        note = ["(HOME is the answer to the first command)"] if not self.folder.startswith("/") else []
        files = {str(machine.config.path): machine.config.text for machine in machines}
        return LaunchPlan((*note, *dry_run.steps, *commands), tuple(files.items()))

    def submit(self, spec: JobSpec, reporter: Reporter) -> LaunchedJob:
        paths, machines = self._launch(spec, reporter, secrets.token_hex(8), execute)
        first = machines[0]
        options = dataclasses.asdict(self) | {"folder": str(first.folder.root)}
        return LaunchedJob(self.NAME, options, spec.name, len(self.hosts), first.task.run, paths.pairs)

    def _launch(self, spec: JobSpec, reporter: Reporter, job: str, execute: Execute) -> tuple[PathMap, list[_Machine]]:
        """Send the run's inputs to all machines, then start it on each.

        Args:
            spec: what to launch.
            reporter: shows progress.
            job: distinguishes this launch from others of the same name.
            execute: runs programs on this machine.

        Returns:
            Which path there stands for which path here, and the machines.
        """
        self._check(spec)
        paths, machines = PathMap(), []
        for number, host in enumerate(self.hosts):
            reporter.doing(f"sending the run's inputs to {host}")
            folder = connect(self._remote_folder(host, execute))
            run = folder.root / spec.name
            config = send_inputs(spec.config, folder, run, paths, reporter, in_place=spec.in_place)
            paths.add(run, spec.config.output_dir)
            task = self._task(spec, config.path, run, job)
            machines.append(_Machine(host, number, folder, task, config))
        for machine in machines:
            state = f"--state={_state_folder(machine.folder, spec.name)}"
            try:
                arguments = machine.task.arguments(machine.number)
                machine.folder.run(machine.folder.module(MODULE, "start", state, *arguments))
            except LaunchError:
                for started in machines[: machine.number]:
                    _stop(started.folder, spec.name, started.number)
                raise
            reporter.success(f"started on {machine.host}")
        return paths, machines

    def follow(self, job: LaunchedJob, reporter: Reporter) -> int:
        paths = job.path_map()
        first = JobOutput(reporter, paths)
        others = [JobOutput(None, paths) for _ in self.hosts[1:]]
        readers = [_OutputReader(self, job, number, output) for number, output in enumerate([first, *others])]
        for reader in readers:
            reader.start()
        try:
            while readers[0].is_alive():
                readers[0].join(1.0)
                for number, output in enumerate(others, start=1):
                    # The first would wait for it for ever, unless it was only interrupted and may be restarted.
                    if output.code not in (None, 0, Interrupted.exit_code):
                        readers[0].join(_LAST_WORDS_SECONDS)
                        if not readers[0].is_alive():
                            break  # it had failed before, and the other one met the same problem in its place
                        self.cancel(job, reporter)
                        reason = output.cause or output.last_lines() or f"ended with {output.code}"
                        raise LaunchError(f"{self.hosts[number]}: {reason}", "The job was stopped on all machines.")
        finally:
            first.close()
        if first.code is None:
            reason = readers[0].problem or first.last_lines() or "there is no message"
            raise LaunchError(f"{self.hosts[0]}: the job was lost: {reason}")
        if others and first.code not in (0, Interrupted.exit_code):
            self.cancel(job, reporter)  # they would wait for the first
        return first.code

    def fetch(self, job: LaunchedJob, folder: RunFolder, reporter: Reporter) -> list[str]:
        return fetch_run(self._remote_folder(self.hosts[0]), PurePosixPath(job.run), folder, job.path_map())

    def cancel(self, job: LaunchedJob, reporter: Reporter) -> None:
        for number, host in enumerate(self.hosts):
            _stop(self._remote_folder(host), job.job, number)

    def watch_argv(self, job: LaunchedJob, number: int, begin: int) -> list[str]:
        """Return the command that prints the output of machine `number`, from byte `begin` on."""
        folder = self._remote_folder(self.hosts[number])
        state = _state_folder(folder, job.job)
        return folder.reach(
            folder.module(MODULE, "watch", f"--state={state}", f"--number={number}", f"--begin={begin}")
        )

    def _check(self, spec: JobSpec) -> None:
        if not self.hosts:
            raise ConfigError("host: ssh needs machines", "Name each one: --host me@gpu1 --host me@gpu2.")
        for host in self.hosts:
            if not _HOST.fullmatch(host):
                raise ConfigError(
                    f"host: {host!r} is not the name or address of a machine", "Give it as gpu1 or me@10.0.0.7."
                )
        if len(set(self.hosts)) != len(self.hosts):
            raise ConfigError("host: a machine is named twice", "For several processes on one machine use --nproc.")
        if spec.config.nnodes != len(self.hosts):
            raise ConfigError(
                f"nnodes: the run takes {spec.config.nnodes} machines, but {len(self.hosts)} are named",
                "Give --host for each; then --nnodes is not needed.",
            )
        require_word("remote-folder", self.folder)
        require_word("python", self.python)

    def _remote_folder(self, host: str, execute: Execute = execute) -> RemoteFolder:
        settings = ["-F", self.ssh_config] if self.ssh_config else []
        options = [word for option in _OPTIONS for word in ("-o", option)]

        def reach(argv: Sequence[str]) -> list[str]:
            # The machine's shell parses the command; quoting keeps each word intact.
            return ["ssh", *settings, *options, "-T", "--", host, shlex.join(argv)]

        return RemoteFolder(host, reach, self.python, PurePosixPath(self.folder), execute)

    def _task(self, spec: JobSpec, config: PurePosixPath, run: PurePosixPath, job: str) -> NodeTask:
        first = f"{self.hosts[0].rpartition('@')[2]}:{MEETING_PORT}"
        meeting = spec.config.rdzv if spec.config.rdzv not in (None, LATER) else first
        return NodeTask(
            config=str(config),
            run=str(run),
            machines=len(self.hosts),
            rdzv=meeting if len(self.hosts) > 1 else "",
            job=job,
            token_file=spec.token_file or "",
            python=self.python,
            only_train=spec.only_train,
        )


def _state_folder(folder: RemoteFolder, name: str) -> PurePosixPath:
    return folder.root / ".launched" / name


def _stop(folder: RemoteFolder, name: str, number: int) -> None:
    folder.run(folder.module(MODULE, "stop", f"--state={_state_folder(folder, name)}", f"--number={number}"))


class _OutputReader(threading.Thread):
    """Reads one machine's output. When the connection breaks, it reconnects and continues at the same byte.

    Attributes:
        problem: why it gave up; "" if it did not.
    """

    def __init__(self, ssh: Ssh, job: LaunchedJob, number: int, output: JobOutput) -> None:
        super().__init__(name=f"watch-{number}", daemon=True)
        self._ssh, self._job, self._number, self._output = ssh, job, number, output
        self.problem = ""

    def run(self) -> None:
        begin, tries = 0, 0
        while tries < _TRIES:
            try:
                for chunk in local.stream(self._ssh.watch_argv(self._job, self._number, begin)):
                    begin, tries = begin + len(chunk), 0
                    self._output.feed(chunk)
                return
            except (local.ProgramError, OSError) as error:
                self.problem = str(error).strip().rpartition("\n")[2]
                if not isinstance(error, local.ProgramError) or error.code != _NO_CONNECTION:
                    return
            tries += 1
            time.sleep(_RECONNECT_SECONDS)
