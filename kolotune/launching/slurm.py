"""Launch jobs on Slurm, through submitit: it writes the script, calls sbatch and starts kolotune on each machine.

submitit's executor for this machine is here, too; it tries a launch without a cluster. All machines see the run folder
and this environment's Python; nothing is sent or fetched.
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
from kolotune.foundation.installation import install_command
from kolotune.foundation.reporter import Reporter
from kolotune.foundation.secrets import is_secret_variable
from kolotune.run_folder.layout import RunFolder
from kolotune.runners import local, signals
from kolotune.runners.container.path_map import PathMap

from .job_names import require_word
from .job_output import JobOutput, last_line
from .launcher import JobSpec, LaunchedJob, LaunchPlan
from .node_task import NodeTask, run_task

HERE, CLUSTER = "local", "slurm"
_CONFIG = "kolotune.yaml"
# Each job has a port of its own, so that two on one machine don't meet.
_FIRST_PORT, _PORTS = 20000, 10000
_LOOK_SECONDS = 2.0
_CHUNK_BYTES = 1 << 20
_MISSING_LOOKS = 2  # a job that Slurm does not know for so many looks has ended
_ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL")


@dataclass(frozen=True)
class SlurmTask:
    """The callable that submitit runs on each machine of a job. After a preemption it is called again, and resumes."""

    task: NodeTask

    def __call__(self) -> int:
        import submitit

        machine = submitit.JobEnvironment()
        if machine.cluster == HERE:  # see `_ignoring_ctrl_c`; a session of its own is out of reach of the terminal
            signals.leave_terminal()
            signal.signal(signal.SIGINT, signal.default_int_handler)
        port = _FIRST_PORT + int(re.sub(r"\D", "", machine.job_id)) % _PORTS
        rdzv = f"{machine.hostnames[0]}:{port}" if self.task.machines > 1 else ""
        code = run_task(dataclasses.replace(self.task, rdzv=rdzv, job=machine.job_id), machine.node)
        if code != 0:  # so that Slurm counts the job as failed
            raise RuntimeError(f"kolotune ended with {code}")
        return code

    def checkpoint(self) -> object:
        """Return the same callable, for later; submitit calls this when Slurm takes the machines or time is up."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


@dataclass(frozen=True)
class QueuedJob:
    """A job that has not ended: Slurm's word for its state, and why it waits; "" when it does not."""

    state: str
    reason: str = ""

    def describe(self) -> str:
        return f"{self.state} ({self.reason})" if self.reason else self.state


@dataclass(frozen=True)
class Slurm:
    """Slurm with the user's options for sbatch, as a `Launcher`.

    Attributes:
        on: "slurm", or "local" for submitit's executor for this machine.
        more: further options of sbatch, such as ``constraint=a100``.
        keeps_secrets: leave variables whose names look like secrets in the job's environment.
    """

    on: str = CLUSTER
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    more: tuple[str, ...] = ()
    keeps_secrets: bool = False

    NAME: ClassVar[str] = CLUSTER

    def plan(self, spec: JobSpec) -> LaunchPlan:
        self._check(spec)
        folder, task = RunFolder(spec.config.output_dir), _task(spec)
        shown = dataclasses.replace(task, rdzv="FIRST-MACHINE:PORT" if task.machines > 1 else "")
        if self.on == HERE:
            steps, files = ["(submitit's executor for this machine starts, in the background:)"], []
        else:
            script = folder.launching / "submission_file_JOB.sh"
            steps, files = [shlex.join(["sbatch", str(script)])], [(str(script), self.script(spec))]
            steps.append("(submitit starts on each machine of the job:)")
        steps += [shlex.join(argv) for argv in shown.commands(0)]
        if spec.config.nnodes > 1:
            steps.append("(on each machine but the first, K is its number:)")
            steps += [shlex.join(argv).replace("/1 ", "/K ") for argv in shown.commands(1)]
        return LaunchPlan(tuple(steps), (*files, (task.config, configs.dump(spec.config))))

    def submit(self, spec: JobSpec, reporter: Reporter) -> LaunchedJob:
        self._check(spec)
        submitit = _import_submitit()
        folder, task = RunFolder(spec.config.output_dir), _task(spec)
        if self.on == CLUSTER and shutil.which("sbatch") is None:
            raise LaunchError("slurm: there is no sbatch on this machine", "Log in to a machine of the cluster first.")
        write_text(Path(task.config), configs.dump(spec.config))
        if self.on == HERE:
            executor = submitit.LocalExecutor(folder.launching, python=_python())
            executor.update_parameters(timeout_min=60 * spec.hours, gpus_per_node=spec.gpus or 0)
        else:
            executor = submitit.SlurmExecutor(folder.launching, python=_python())
            executor.update_parameters(**self._parameters(spec))
        with (
            _without_secrets(keep=self.keeps_secrets),
            _ignoring_ctrl_c() if self.on == HERE else contextlib.nullcontext(),
        ):
            try:
                job = executor.submit(SlurmTask(task))
            except submitit.core.utils.FailedJobError as error:
                raise LaunchError(f"slurm: the job was refused: {last_line(str(error))}") from None
        reporter.success(f"submitted: job {job.job_id}")
        return LaunchedJob(self.on, dataclasses.asdict(self), job.job_id, spec.config.nnodes, str(folder.root))

    def follow(self, job: LaunchedJob, reporter: Reporter) -> int:
        outputs = [JobOutput(reporter if number == 0 else None, PathMap()) for number in range(job.machines)]
        read, shown, missing = [0] * job.machines, "", 0
        try:
            while outputs[0].code is None:
                queued = self._queued(job)
                missing = missing + 1 if queued is None else 0
                if queued is not None and queued.describe() != shown:
                    shown = queued.describe()
                    reporter.note(f"job {job.job}: {shown}")
                for number, output in enumerate(outputs):
                    read[number] += _feed(output, _logs(job, number)[0], read[number])
                if missing >= _MISSING_LOOKS and outputs[0].code is None:
                    raise self._lost_error(job, outputs)
                time.sleep(_LOOK_SECONDS if outputs[0].code is None else 0)
        finally:
            for output in outputs:
                output.close()
        if outputs[0].code == Interrupted.exit_code and any(output.cause for output in outputs[1:]):
            raise self._lost_error(job, outputs)  # the first one was stopped because another one failed
        return outputs[0].code

    def fetch(self, job: LaunchedJob, folder: RunFolder, reporter: Reporter) -> list[str]:
        """Fetch nothing: the job writes its results to the run folder."""
        return []

    def cancel(self, job: LaunchedJob, reporter: Reporter) -> None:
        if self.on == HERE:
            signals.request_stop(int(job.job))
            return
        try:
            list(local.stream(["scancel", job.job]))
        except (local.ProgramError, OSError) as error:
            raise LaunchError(f"slurm: job {job.job} was not stopped: {last_line(str(error))}") from None

    def script(self, spec: JobSpec) -> str:
        """Return the script for sbatch, as submitit writes it."""
        slurm = _import_submitit().slurm.slurm
        folder = RunFolder(spec.config.output_dir).launching
        command = f"{_python()} -u -m submitit.core._submit {shlex.quote(str(folder))}"
        return str(slurm._make_sbatch_string(command=command, folder=folder, **self._parameters(spec)))

    def _parameters(self, spec: JobSpec) -> dict[str, object]:
        """Return the parameters of submitit's executor, which are sbatch's options."""
        parameters: dict[str, object] = {
            "job_name": spec.name,
            "nodes": spec.config.nnodes,
            "ntasks_per_node": 1,  # torchrun starts the processes of a machine
            "time": max(1, round(60 * spec.hours)),
            "gpus_per_node": spec.gpus,
            "cpus_per_task": spec.cpus,
            "mem": f"{round(1024 * spec.memory_gb)}MB" if spec.memory_gb else None,
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "additional_parameters": dict(option.split("=", 1) for option in self.more) or None,
            # A machine that can't continue ends the others, which would wait for it.
            "srun_args": ["--kill-on-bad-exit=1"],
        }
        return {name: value for name, value in parameters.items() if value is not None}

    def _check(self, spec: JobSpec) -> None:
        for name in ("partition", "account", "qos"):
            if (value := getattr(self, name)) is not None:
                require_word(name, value)
        for option in self.more:
            key, equals, value = option.partition("=")
            if not equals or not re.fullmatch(r"[a-z][a-z0-9-]*", key):
                raise ConfigError(
                    f"sbatch: {option!r} is not of the form name=value", "Give it as --sbatch constraint=a100."
                )
            require_word("sbatch", value)
        root = str(spec.config.output_dir)
        if "%" in root or not root.isprintable():
            raise ConfigError(
                f"output-dir: {root!r} can't be used with Slurm, which gives % a meaning and reads lines",
                "Choose another --output-dir.",
            )
        if self.on == HERE and spec.config.nnodes > 1:
            raise ConfigError("nnodes: --on local uses this machine only", "Use --on slurm, or --nproc.")

    def _queued(self, job: LaunchedJob) -> QueuedJob | None:
        """Return the job's state in the queue; None when it has ended, or Slurm does not know it."""
        if self.on == HERE:
            return QueuedJob("running") if _is_alive(int(job.job)) else None
        argv = ["squeue", "--noheader", f"--jobs={job.job}", "--format=%T %r"]
        try:
            state, _, reason = b"".join(local.stream(argv)).decode("utf-8", "replace").strip().partition(" ")
        except (local.ProgramError, OSError):  # squeue also forgets a job some minutes after its end
            return None
        if not state or state.startswith(_ENDED):
            return None
        return QueuedJob(state.lower(), reason if state == "PENDING" and reason != "None" else "")

    def _lost_error(self, job: LaunchedJob, outputs: list[JobOutput]) -> LaunchError:
        """Return the error for a job that has ended without finishing its run."""
        for number, output in reversed(list(enumerate(outputs))):
            if output.cause:
                return LaunchError(f"machine {number}: {output.cause}", f"Its log: {_logs(job, number)[0]}")
        log = _logs(job, 0)[1]
        reason = local.last_lines(log) or outputs[0].last_lines() or "there is no message"
        return LaunchError(f"job {job.job} has ended, but the run is not finished: {reason}", f"Its log: {log}")


def _task(spec: JobSpec) -> NodeTask:
    folder = RunFolder(spec.config.output_dir)
    return NodeTask(
        config=str(folder.launching / _CONFIG),
        run=str(folder.root),
        machines=spec.config.nnodes,
        token_file=spec.token_file or "",
        only_train=spec.only_train,
    )


def _logs(job: LaunchedJob, number: int) -> tuple[Path, Path]:
    """Return the files with the output and the error output of machine `number`."""
    from submitit.core.utils import JobPaths

    paths = JobPaths(RunFolder(Path(job.run)).launching, job.job, number)
    return paths.stdout, paths.stderr


def _feed(output: JobOutput, log: Path, begin: int) -> int:
    """Feed a log from byte `begin` on into `output`; return how many bytes were read."""
    with contextlib.suppress(OSError), log.open("rb") as file:
        file.seek(begin)
        chunk = file.read(_CHUNK_BYTES)
        output.feed(chunk)
        return len(chunk)
    return 0


def _is_alive(process: int) -> bool:
    import psutil

    with contextlib.suppress(psutil.Error):
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    return False


def _python() -> str:
    """Return this interpreter as a word of the script; with -P it imports no module from the working directory."""
    return f"{shlex.quote(sys.executable)} -P"


@contextlib.contextmanager
def _without_secrets(*, keep: bool) -> Iterator[None]:
    """Remove secrets from the environment while the block runs; sbatch passes it to the job and stores it."""
    secrets = {} if keep else {name: value for name, value in os.environ.items() if is_secret_variable(name)}
    for name in secrets:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(secrets)


@contextlib.contextmanager
def _ignoring_ctrl_c() -> Iterator[None]:
    """Processes started in the block ignore Ctrl-C, which a terminal sends to all of its processes."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _import_submitit() -> Any:
    """Return the library.

    Raises:
        ToolchainError: it is not installed.
    """
    try:
        import submitit
        import submitit.slurm.slurm
    except ModuleNotFoundError as error:
        raise ToolchainError(
            f"launch --on slurm needs {error.name}", f"To install it, {install_command('cluster')}."
        ) from None
    return submitit
