"""Launch jobs on Kubernetes, through kubectl with its contexts and logins.

A small pod of its own copies files to the volume claim and back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import ClassVar, TypeVar

from kolotune.foundation import typed_storage
from kolotune.foundation.errors import ConfigError, Interrupted, LaunchError, RunFolderError
from kolotune.foundation.reporter import Reporter
from kolotune.run_folder.layout import RunFolder
from kolotune.runners.container import names
from kolotune.runners.container.path_map import PathMap
from kolotune.runners.container.results import fetch_run
from kolotune.version import VERSION

from .job_output import JobOutput, SilentReporter
from .kubectl import JobState, JobStatus, Kubectl, Pod, newest_pod
from .kubernetes_manifests import GPUS, Manifests
from .launcher import LATER, MEETING_PORT, JobSpec, LaunchedJob, LaunchPlan
from .node import About
from .node_task import NodeTask
from .remote import DryRun, Execute, SentConfig, connect, execute, send_inputs

T = TypeVar("T")
_LABEL = re.compile(r"[a-z0-9]([a-z0-9.-]{0,250}[a-z0-9])?")
_IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]*")
_KEY = re.compile(r"[A-Za-z0-9._-]+")
_FILES_SUFFIX = "-files"
_LOOK_SECONDS = 5.0
_TRIES = 12


@dataclass(frozen=True)
class Kubernetes:
    """A namespace of a cluster, as a `Launcher`.

    Attributes:
        image: the container's image; `kolotune container build` makes one, to be pushed to the cluster's registry.
        claim: an existing volume claim; with several machines, one that many can write.
        namespace, context: None: kubectl's own defaults.
        token_secret: NAME/KEY of an existing secret with the hub's token; None: the job has none.
        gpu_kind: the vendor of the requested GPUs.
    """

    image: str
    claim: str
    namespace: str | None = None
    context: str | None = None
    token_secret: str | None = None
    gpu_kind: str = "nvidia"

    NAME: ClassVar[str] = "kubernetes"

    def plan(self, spec: JobSpec) -> LaunchPlan:
        import yaml

        about = json.dumps(typed_storage.plain(About(VERSION, str(names.VOLUME))))
        dry_run = DryRun({"have": b"[false]", "get": b"", "about": about.encode()})
        config = self._launch(spec, SilentReporter(), PathMap(), dry_run)
        task = _task(spec, config.path)
        steps = [*dry_run.steps, *[f"(the first pod:) {shlex.join(argv)}" for argv in task.commands(0)]]
        if task.machines > 1:
            commands = [shlex.join(argv).replace("/1 ", "/K ") for argv in task.commands(1)]
            steps += [f"(each other pod, K is its number:) {command}" for command in commands]
        job = yaml.safe_dump_all(self._manifests().job_with_service(spec, task), sort_keys=False)
        pod = yaml.safe_dump(self._manifests().files_pod(f"{spec.name}{_FILES_SUFFIX}"), sort_keys=False)
        files = f"{spec.name}{_FILES_SUFFIX}.yaml"
        return LaunchPlan(tuple(steps), ((files, pod), (str(config.path), config.text), (f"{spec.name}.yaml", job)))

    def submit(self, spec: JobSpec, reporter: Reporter) -> LaunchedJob:
        paths = PathMap()
        self._launch(spec, reporter, paths, execute)
        reporter.success(f"submitted: job {spec.name}")
        run = str(names.VOLUME / spec.name)
        options = dataclasses.asdict(self)
        return LaunchedJob(self.NAME, options, spec.name, spec.config.nnodes, run, paths.pairs)

    def _launch(self, spec: JobSpec, reporter: Reporter, paths: PathMap, execute: Execute) -> SentConfig:
        """Copy the run's inputs to the volume and create the job; return the options as they were sent."""
        self._check(spec)
        kubectl = self._kubectl(execute)
        self._remove_old_job(spec.name, kubectl)
        run = names.VOLUME / spec.name
        reporter.doing(f"sending the run's inputs to the claim {self.claim}")
        pod = f"{spec.name}{_FILES_SUFFIX}"
        with kubectl.files_pod(pod, self._manifests().files_pod(pod)) as folder:
            config = send_inputs(spec.config, connect(folder), run, paths, reporter, in_place=spec.in_place)
        paths.add(run, spec.config.output_dir)
        kubectl.create(self._manifests().job_with_service(spec, _task(spec, config.path)), f"{spec.name}.yaml")
        return config

    def follow(self, job: LaunchedJob, reporter: Reporter) -> int:
        output, shown = JobOutput(reporter, job.path_map()), ""
        read: dict[str, int] = {}  # bytes of each pod's log
        kubectl = self._kubectl()
        try:
            while True:
                status, pods = _retried(lambda: (kubectl.job_status(job.job), kubectl.pods(job.job)))
                first = newest_pod(pods, 0)
                if first and first.has_log:
                    if first.name not in read:  # a new try
                        output.code = None
                    read[first.name] = kubectl.feed_log(first.name, output, read.get(first.name, 0))
                if output.code == 0:
                    return 0
                if status.state is not JobState.ACTIVE:
                    return self._failure_code(job, output, status, pods)
                waiting = first.waiting_reason() if first else "waits for its pods"
                if waiting and waiting != shown:
                    reporter.note(f"job {job.job}: {waiting}")
                    shown = waiting
                time.sleep(_LOOK_SECONDS)
        finally:
            output.close()

    def _failure_code(self, job: LaunchedJob, output: JobOutput, status: JobStatus, pods: Sequence[Pod]) -> int:
        """Return the exit code of a job that has ended without success.

        Raises:
            LaunchError: the failure was not in the first machine's run.
        """
        if output.code is not None and output.code != Interrupted.exit_code:
            return output.code
        for number in range(1, job.machines):
            pod = newest_pod(pods, number)
            if pod and pod.has_log:
                other = JobOutput(None, job.path_map())
                self._kubectl().feed_log(pod.name, other, 0)
                if other.cause:
                    raise LaunchError(f"machine {number}: {other.cause}", f"kubectl logs {pod.name}")
        if output.code is not None:
            return output.code
        ending = "no longer exists" if status.state is JobState.MISSING else "has ended"
        reason = status.reason or output.last_lines() or "there is no message"
        raise LaunchError(f"job {job.job} {ending}, but the run is not finished: {reason}")

    def fetch(self, job: LaunchedJob, folder: RunFolder, reporter: Reporter) -> list[str]:
        pod = f"{job.job}{_FILES_SUFFIX}"
        with self._kubectl().files_pod(pod, self._manifests().files_pod(pod)) as volume:
            return fetch_run(volume, PurePosixPath(job.run), folder, job.path_map())

    def cancel(self, job: LaunchedJob, reporter: Reporter) -> None:
        self._kubectl().delete_job(job.job)

    def _kubectl(self, execute: Execute = execute) -> Kubectl:
        return Kubectl(self.context, self.namespace, execute)

    def _manifests(self) -> Manifests:
        return Manifests(self.image, self.claim, self.token_secret, self.gpu_kind)

    def _check(self, spec: JobSpec) -> None:
        for option, value, rule in (
            ("image", self.image, _IMAGE),
            ("claim", self.claim, _LABEL),
            ("namespace", self.namespace, _LABEL),
        ):
            if value is not None and not rule.fullmatch(value):
                raise ConfigError(
                    f"{option}: {value!r} is not a valid name in Kubernetes", "Give it as `kubectl get` shows it."
                )
        name, _, key = (self.token_secret or "a/b").partition("/")
        if not (_LABEL.fullmatch(name) and _KEY.fullmatch(key)):
            # The value is not shown: it may be the token itself.
            raise ConfigError("token-secret: give NAME/KEY of a secret in the cluster, never the token itself")
        if self.gpu_kind not in GPUS:
            raise ConfigError(f"gpu-kind: {self.gpu_kind!r} is none of {', '.join(GPUS)}")
        if spec.config.rdzv not in (None, LATER):
            raise ConfigError("rdzv: on Kubernetes the pods always meet at the first one", "Leave rdzv out.")

    def _remove_old_job(self, name: str, kubectl: Kubectl) -> None:
        """Remove an ended job of the same name."""
        state = kubectl.job_status(name).state
        if state is JobState.ACTIVE:
            raise RunFolderError(
                f"job {name}: is still running", "kolotune follow RUN shows it, kolotune cancel RUN stops it."
            )
        if state is not JobState.MISSING:
            kubectl.delete_job(name)


def _task(spec: JobSpec, config: PurePosixPath) -> NodeTask:
    machines = spec.config.nnodes
    return NodeTask(
        config=str(config),
        run=str(names.VOLUME / spec.name),
        machines=machines,
        rdzv=f"{spec.name}-0.{spec.name}:{MEETING_PORT}" if machines > 1 else "",
        job="$(KOLOTUNE_JOB)",
        token_file=spec.token_file or "",
        python=names.PYTHON,
        only_train=spec.only_train,
    )


def _retried(look: Callable[[], T]) -> T:
    """Return the result of `look`; call it several times while the cluster does not answer."""
    for _ in range(_TRIES):
        with contextlib.suppress(LaunchError):
            return look()
        time.sleep(_LOOK_SECONDS)
    return look()
