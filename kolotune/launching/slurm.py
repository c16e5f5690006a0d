"""Slurm, through submitit: it writes the script, calls sbatch, and starts us on each machine. So does its executor for
this machine, which tries a launch without a cluster.

The run folder lies where all machines see it, as does this environment's Python; nothing is sent or fetched.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from kolotune.foundation import config as configs
from kolotune.foundation.errors import ConfigError, Interrupted, LaunchError, ToolchainError
from kolotune.foundation.files import write_text
from kolotune.foundation.reporter import Reporter
from kolotune.foundation.secrets import is_secret_variable
from kolotune.run_folder.layout import RunFolder
from kolotune.runners import local
from kolotune.runners.container.paths import Paths

from .launcher import Launched, Order, Plan, last_line, require_word
from .node import Node, carry_out
from .output import Listener

HERE, CLUSTER = "local", "slurm"
_CONFIG = "kolotune.yaml"
# A port of its own for each job, so that two on one machine don't meet.
_FIRST_PORT, _PORTS = 20000, 10000
_LOOK_SECONDS = 2.0
_PIECE_BYTES = 1 << 20
_GONE_FROM_QUEUE = 2  # looks without an answer, before a job counts as over


@dataclass(frozen=True)
class Part:
    """What submitit calls on each machine of the job. Called again after a preemption, it goes on."""

    node: Node

    def __call__(self) -> int:
        import submitit

        place = submitit.JobEnvironment()
        if place.cluster == HERE:  # see `_apart`; in a session of its own no terminal reaches it any more
            os.setsid()
            signal.signal(signal.SIGINT, signal.default_int_handler)
        port = _FIRST_PORT + int(re.sub(r"\D", "", place.job_id)) % _PORTS
        rdzv = f"{place.hostnames[0]}:{port}" if self.node.machines > 1 else ""
        code = carry_out(dataclasses.replace(self.node, rdzv=rdzv, job=place.job_id), place.node)
        if code != 0:  # Slurm shall know it, too
            raise RuntimeError(f"kolotune ended with {code}")
        return code

    def checkpoint(self) -> Any:
        """What is called when Slurm takes the machines back or the time is over: the same, later."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


@dataclass(frozen=True)
class Slurm:
    """Slurm, with the user's words for sbatch.

    Attributes:
        on: "slurm", or "local": submitit's executor for this machine.
        more: further options of sbatch, as ``constraint=a100``.
        keeps_secrets: don't take variables whose names look like secrets out of the environment that the job gets.
    """

    on: str = CLUSTER
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    more: tuple[str, ...] = ()
    keeps_secrets: bool = False

    NAME: ClassVar[str] = CLUSTER

    def plan(self, order: Order) -> Plan:
        """See `contract.Launcher`."""
        self._check(order)
        folder, node = RunFolder(order.config.output_dir), self._node(order)
        shown = dataclasses.replace(node, rdzv="FIRST-MACHINE:PORT" if node.machines > 1 else "")
        if self.on == HERE:
            steps, files = ["(submitit's executor for this machine starts, in the background:)"], []
        else:
            script = folder.launching / "submission_file_JOB.sh"
            steps, files = [shlex.join(["sbatch", str(script)])], [(str(script), self.script(order))]
            steps.append("(on each of the job's machines submitit starts:)")
        steps += [shlex.join(argv) for argv in shown.commands(0)]
        if order.config.nnodes > 1:
            steps.append("(and on each but the first, where K is its number:)")
            steps += [shlex.join(argv).replace("/1 ", "/K ") for argv in shown.commands(1)]
        return Plan(tuple(steps), (*files, (node.config, configs.dump(order.config))))

    def submit(self, order: Order, reporter: Reporter) -> Launched:
        """See `contract.Launcher`."""
        self._check(order)
        submitit = _submitit()
        folder, node = RunFolder(order.config.output_dir), self._node(order)
        if self.on == CLUSTER and shutil.which("sbatch") is None:
            raise LaunchError("slurm: there is no sbatch on this machine", "Log in to a machine of the cluster first.")
        write_text(Path(node.config), configs.dump(order.config))
        if self.on == HERE:
            executor = submitit.LocalExecutor(folder.launching, python=_python())
            executor.update_parameters(timeout_min=60 * order.hours, gpus_per_node=order.gpus or 0)
        else:
            executor = submitit.SlurmExecutor(folder.launching, python=_python())
            executor.update_parameters(**self._parameters(order))
        with _without_secrets(keep=self.keeps_secrets), _apart() if self.on == HERE else contextlib.nullcontext():
            try:
                job = executor.submit(Part(node))
            except submitit.core.utils.FailedJobError as error:
                raise LaunchError(f"slurm: refused: {last_line(str(error))}") from None
        reporter.success(f"submitted: job {job.job_id}")
        return Launched(self.on, dataclasses.asdict(self), job.job_id, order.config.nnodes, str(folder.root))

    def follow(self, launched: Launched, reporter: Reporter) -> int:
        """See `contract.Launcher`."""
        logs = [self._logs(launched, number) for number in range(launched.machines)]
        listeners = [Listener(reporter if number == 0 else None, Paths()) for number in range(launched.machines)]
        read, told, gone = [0] * launched.machines, "", 0
        try:
            while listeners[0].code is None:
                state = self._state(launched)
                gone = gone + 1 if not state else 0
                if state and state != told:
                    reporter.note(f"job {launched.job}: {state}")
                    told = state
                for number, listener in enumerate(listeners):
                    read[number] += _feed(listener, logs[number][0], read[number])
                if gone >= _GONE_FROM_QUEUE and listeners[0].code is None:
                    raise self._lost(launched, listeners)
                time.sleep(_LOOK_SECONDS if listeners[0].code is None else 0)
        finally:
            for listener in listeners:
                listener.close()
        if listeners[0].code == Interrupted.exit_code and any(each.cause for each in listeners[1:]):
            raise self._lost(launched, listeners)  # another one failed, and so it was stopped
        return listeners[0].code

    def fetch(self, launched: Launched, folder: RunFolder, reporter: Reporter) -> list[str]:
        """Nothing: the results are written where they belong."""
        return []

    def cancel(self, launched: Launched, reporter: Reporter) -> None:
        """See `contract.Launcher`."""
        if self.on == HERE:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(launched.job), signal.SIGTERM)
            return
        try:
            list(local.stream(["scancel", launched.job]))
        except (local.ProgramError, OSError) as error:
            raise LaunchError(f"slurm: job {launched.job} was not stopped: {last_line(str(error))}") from None

    def script(self, order: Order) -> str:
        """The script for sbatch, as submitit writes it."""
        slurm = _submitit().slurm.slurm
        folder = RunFolder(order.config.output_dir).launching
        command = f"{_python()} -u -m submitit.core._submit {shlex.quote(str(folder))}"
        return str(slurm._make_sbatch_string(command=command, folder=folder, **self._parameters(order)))

    def _parameters(self, order: Order) -> dict[str, Any]:
        """What submitit's executor is given, in sbatch's words."""
        wanted = {
            "job_name": order.name,
            "nodes": order.config.nnodes,
            "ntasks_per_node": 1,  # torchrun starts the processes of a machine
            "time": max(1, round(60 * order.hours)),
            "gpus_per_node": order.gpus,
            "cpus_per_task": order.cpus,
            "mem": f"{round(1024 * order.memory_gb)}MB" if order.memory_gb else None,
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "additional_parameters": dict(each.split("=", 1) for each in self.more) or None,
            # One machine without a chance to go on ends the others, which would wait for it.
            "srun_args": ["--kill-on-bad-exit=1"],
        }
        return {name: value for name, value in wanted.items() if value is not None}

    def _check(self, order: Order) -> None:
        for name in ("partition", "account", "qos"):
            if (value := getattr(self, name)) is not None:
                require_word(name, value)
        for each in self.more:
            key, equals, value = each.partition("=")
            if not equals or not re.fullmatch(r"[a-z][a-z0-9-]*", key):
                raise ConfigError(f"sbatch: {each!r} is not of the form name=value", "As --sbatch constraint=a100.")
            require_word("sbatch", value)
        root = str(order.config.output_dir)
        if "%" in root or not root.isprintable():
            raise ConfigError(
                f"output-dir: {root!r} can't be the folder of a job: Slurm gives % a meaning, and reads lines",
                "Choose another --output-dir.",
            )
        if self.on == HERE and order.config.nnodes > 1:
            raise ConfigError("nnodes: this machine is only one", "Use --on slurm, or --nproc.")

    def _node(self, order: Order) -> Node:
        folder = RunFolder(order.config.output_dir)
        return Node(
            config=str(folder.launching / _CONFIG),
            run=str(folder.root),
            machines=order.config.nnodes,
            token_file=order.token_file or "",
            only_train=order.only_train,
        )

    @staticmethod
    def _logs(launched: Launched, number: int) -> tuple[Path, Path]:
        """What machine `number` writes to its output and to its error output."""
        from submitit.core.utils import JobPaths

        paths = JobPaths(RunFolder(Path(launched.run)).launching, launched.job, number)
        return paths.stdout, paths.stderr

    def _state(self, launched: Launched) -> str:
        """Slurm's word for the job's state, and why it waits; "" when it knows of no such job that goes on."""
        if self.on == HERE:
            return "running" if _is_alive(int(launched.job)) else ""
        argv = ["squeue", "--noheader", f"--jobs={launched.job}", "--format=%T %r"]
        try:
            state, _, why = b"".join(local.stream(argv)).decode("utf-8", "replace").strip().partition(" ")
        except (local.ProgramError, OSError):  # also: squeue forgets a job some minutes after its end
            return ""
        if state.startswith(("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL")):
            return ""
        return f"{state.lower()} ({why})" if state == "PENDING" and why not in ("", "None") else state.lower()

    def _lost(self, launched: Launched, listeners: list[Listener]) -> LaunchError:
        """The job is over and the run is not: which machine said what."""
        for number, listener in reversed(list(enumerate(listeners))):
            if listener.cause:
                return LaunchError(f"machine {number}: {listener.cause}", f"Its log: {self._logs(launched, number)[0]}")
        errors = self._logs(launched, 0)[1]
        said = local.last_lines(errors) or listeners[0].last_words() or "it said nothing"
        return LaunchError(f"job {launched.job} is over, and the run is not: {said}", f"Its log: {errors}")


def _feed(listener: Listener, log: Path, begin: int) -> int:
    """Gives what a log has from byte `begin` on to a listener; returns how many bytes."""
    with contextlib.suppress(OSError), log.open("rb") as file:
        file.seek(begin)
        piece = file.read(_PIECE_BYTES)
        listener.feed(piece)
        return len(piece)
    return 0


def _is_alive(process: int) -> bool:
    import psutil

    with contextlib.suppress(psutil.Error):
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    return False


def _python() -> str:
    """This interpreter as a word of the script; -P: the folder that it starts in is no place of modules."""
    return f"{shlex.quote(sys.executable)} -P"


@contextlib.contextmanager
def _without_secrets(*, keep: bool) -> Iterator[None]:
    """Takes secrets out of the environment, which sbatch hands to the job and keeps, for the time of the block."""
    held = {} if keep else {name: value for name, value in os.environ.items() if is_secret_variable(name)}
    for name in held:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(held)


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """What is started in the block is deaf to Ctrl-C, which a terminal sends to all that was started from it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _submitit() -> Any:
    """The library.

    Raises:
        ToolchainError: it is not installed.
    """
    try:
        import submitit
        import submitit.slurm.slurm
    except ModuleNotFoundError as error:
        raise ToolchainError(
            f"launch --on slurm needs {error.name}", "Install it: pip install 'kolotune[cluster]'."
        ) from None
    return submitit
