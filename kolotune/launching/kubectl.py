"""Calls of kubectl: jobs and pods as typed values, and files through a pod."""

from __future__ import annotations

import contextlib
import enum
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from kolotune.foundation import typed_storage
from kolotune.foundation.errors import LaunchError
from kolotune.foundation.typed_storage import JsonObject
from kolotune.runners import local
from kolotune.runners.container import names

from .job_output import JobOutput, last_line
from .kubernetes_manifests import INDEX_ANNOTATION
from .remote import Execute, RemoteFolder, execute

T = TypeVar("T")
_READY_SECONDS = 600
_WITH_A_LOG = ("Running", "Succeeded", "Failed")


class JobState(enum.Enum):
    """The state of a job in the cluster."""

    MISSING = enum.auto()
    ACTIVE = enum.auto()
    COMPLETE = enum.auto()
    FAILED = enum.auto()


@dataclass(frozen=True)
class Condition:
    """A condition of a job or pod, as Kubernetes writes it."""

    type: str
    status: str = ""
    reason: str | None = None
    message: str | None = None


@dataclass(frozen=True)
class JobStatus:
    """The state of a job, and why it failed; "" unless it did."""

    state: JobState
    reason: str = ""


@dataclass(frozen=True)
class _Waiting:
    reason: str | None = None
    message: str | None = None


@dataclass(frozen=True)
class _ContainerState:
    waiting: _Waiting | None = None


@dataclass(frozen=True)
class _ContainerStatus:
    state: _ContainerState = _ContainerState()


@dataclass(frozen=True)
class _Status:
    phase: str = ""
    conditions: tuple[Condition, ...] | None = None
    containerStatuses: tuple[_ContainerStatus, ...] | None = None


@dataclass(frozen=True)
class _Metadata:
    name: str
    annotations: dict[str, str] = field(default_factory=dict)
    creationTimestamp: str | None = None


@dataclass(frozen=True)
class Pod:
    """A pod of a job, as Kubernetes describes it."""

    metadata: _Metadata
    status: _Status = _Status()

    @property
    def name(self) -> str:
        return self.metadata.name

    @property
    def machine(self) -> str | None:
        """The number of the job's machine that it is."""
        return self.metadata.annotations.get(INDEX_ANNOTATION)

    @property
    def has_log(self) -> bool:
        """Whether it has run."""
        return self.status.phase in _WITH_A_LOG

    def waiting_reason(self) -> str:
        """Describe why the pod does not run yet; "" when it does."""
        for container in self.status.containerStatuses or ():
            if waiting := container.state.waiting:
                return f"{waiting.reason or 'waiting'} {waiting.message or ''}".strip()
        for condition in self.status.conditions or ():
            if condition.type == "PodScheduled" and condition.status == "False":
                return f"{condition.reason or 'waiting'} {condition.message or ''}".strip()
        return ""


@dataclass(frozen=True)
class _Job:
    status: _Status = _Status()


@dataclass(frozen=True)
class _PodList:
    items: tuple[Pod, ...]


def newest_pod(pods: Sequence[Pod], machine: int) -> Pod | None:
    """Return the latest pod of a machine; None when it has none."""
    own = [pod for pod in pods if pod.machine == str(machine)]
    return max(own, key=lambda pod: pod.metadata.creationTimestamp or "", default=None)


@dataclass(frozen=True)
class Kubectl:
    """kubectl with the user's settings.

    Attributes:
        context, namespace: None: kubectl's own defaults.
        execute: runs it.
    """

    context: str | None = None
    namespace: str | None = None
    execute: Execute = execute

    def argv(self, *arguments: str) -> list[str]:
        options = [f"--context={self.context}"] if self.context else []
        options += [f"--namespace={self.namespace}"] if self.namespace else []
        return ["kubectl", *options, *arguments]

    def run(self, *arguments: str, stdin: Iterable[bytes] = (), label: str = "") -> bytes:
        """Run kubectl; return its output.

        Raises:
            LaunchError: it failed, with its own message, or is not installed.
        """
        try:
            return b"".join(self.execute(self.argv(*arguments), stdin, label))
        except local.ProgramError as error:
            raise LaunchError(f"kubectl {arguments[0]}: {last_line(error.stderr)}") from None
        except OSError:
            raise LaunchError(
                "kubernetes: there is no kubectl on this machine", "Install it, and configure it for the cluster."
            ) from None

    def create(self, objects: Sequence[JsonObject], label: str) -> None:
        manifest = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
        self.run("create", "--filename=-", stdin=[json.dumps(manifest).encode()], label=label)

    def delete_job(self, name: str) -> None:
        self.run("delete", f"job/{name}", f"service/{name}", "--ignore-not-found")

    def job_status(self, name: str) -> JobStatus:
        """Return the state of a job."""
        text = self.run("get", f"job/{name}", "--ignore-not-found", "--output=json")
        if not text.strip():
            return JobStatus(JobState.MISSING)
        for condition in _parse(_Job, text).status.conditions or ():
            if condition.status == "True" and condition.type == "Complete":
                return JobStatus(JobState.COMPLETE)
            if condition.status == "True" and condition.type == "Failed":
                return JobStatus(JobState.FAILED, f"{condition.reason or ''}: {condition.message or ''}")
        return JobStatus(JobState.ACTIVE)

    def pods(self, job: str) -> tuple[Pod, ...]:
        """Return the pods of a job, also those that were lost."""
        return _parse(_PodList, self.run("get", "pods", f"--selector=job-name={job}", "--output=json")).items

    def feed_log(self, pod: str, output: JobOutput, begin: int) -> int:
        """Feed a pod's log into `output` as it grows, from byte `begin` on; return how many bytes the log has."""
        count = 0
        with contextlib.suppress(local.ProgramError):  # the connection broke, or there is no log yet: call this again
            for chunk in local.stream(self.argv("logs", "--follow", "--container=run", f"pod/{pod}")):
                new = chunk[max(0, begin - count) :]
                count += len(chunk)
                if new:
                    output.feed(new)
        return max(count, begin)

    @contextlib.contextmanager
    def files_pod(self, pod: str, manifest: JsonObject) -> Iterator[RemoteFolder]:
        """Run a pod that mounts the volume while the block runs; give the volume's folder."""

        def reach(argv: Sequence[str]) -> list[str]:
            return self.argv("exec", "--stdin", f"pod/{pod}", "--", *argv)

        self.run("delete", f"pod/{pod}", "--ignore-not-found")
        self.create([manifest], f"{pod}.yaml")
        try:
            self.run("wait", "--for=condition=Ready", f"--timeout={_READY_SECONDS}s", f"pod/{pod}")
            yield RemoteFolder(pod, reach, names.PYTHON, names.VOLUME, self.execute)
        finally:
            with contextlib.suppress(LaunchError):
                self.run("delete", f"pod/{pod}", "--wait=false")


def _parse(kind: type[T], text: bytes) -> T:
    try:
        return typed_storage.parse(kind, text)
    except typed_storage.StorageError as error:
        raise LaunchError(f"kubectl get: the answer can't be understood: {error}") from None
