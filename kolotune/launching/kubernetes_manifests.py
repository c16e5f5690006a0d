"""Manifests for Kubernetes: an indexed Job, a headless Service where its pods meet, and a pod for files.

A volume claim contains what a run needs and makes. It is mounted where the container's image has its volume, so that a
pod of that image finds everything where a container does.
"""

from __future__ import annotations

from dataclasses import dataclass

from kolotune.foundation import errors
from kolotune.foundation.secrets import HUB_TOKEN
from kolotune.foundation.typed_storage import JsonObject
from kolotune.runners.container import names

from .launcher import MEETING_PORT, JobSpec
from .node import MODULE
from .node_task import NodeTask

GPUS = {"nvidia": "nvidia.com/gpu", "amd": "amd.com/gpu"}
INDEX_ANNOTATION = "batch.kubernetes.io/job-completion-index"
# The image's converter is linked into the volume, as in the image's own command (Dockerfile).
LINK_TOOLCHAIN = (
    "mkdir -p /runs/.cache/toolchain && ln -sfn /opt/kolotune/cache/toolchain/* /runs/.cache/toolchain/ && exec"
)
_RETRIES = 6  # of a machine, when it was lost or training stopped
_KEPT_SECONDS = 7 * 86_400  # how long a finished job's pods are kept, with their logs
_FILES_SECONDS = 86_400
_LOCKED_CONTAINER: JsonObject = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
# Another try may succeed after these errors; after all others it would fail the same way.
_RETRIED = (errors.TrainingError, errors.OfflineError, errors.Interrupted)


def final_codes() -> list[int]:
    """Return the exit codes after which a machine is not restarted."""
    codes, remaining = set(), list(errors.KolotuneError.__subclasses__())
    while remaining:
        error = remaining.pop()
        remaining += error.__subclasses__()
        if error not in _RETRIED:
            codes.add(error.exit_code)
    return sorted(codes)


@dataclass(frozen=True)
class Manifests:
    """Makes manifests; see `kubernetes.Kubernetes` for the attributes."""

    image: str
    claim: str
    token_secret: str | None
    gpu_kind: str

    def job_with_service(self, spec: JobSpec, task: NodeTask) -> list[JsonObject]:
        """Return the job, after the service by which its pods find each other."""
        objects = [self._job(spec, task)]
        if task.machines > 1:
            service: JsonObject = {
                "clusterIP": "None",
                "selector": {"job-name": spec.name},
                "publishNotReadyAddresses": True,  # they meet before they are ready
                "ports": [{"name": "meeting", "port": MEETING_PORT}],
            }
            objects.insert(0, _object("v1", "Service", spec.name, service))
        return objects

    def files_pod(self, name: str) -> JsonObject:
        """Return a pod that only mounts the volume, for copying files."""
        container: JsonObject = {
            "name": "files",
            "image": self.image,
            "command": ["sleep", str(_FILES_SECONDS)],
            "securityContext": _LOCKED_CONTAINER,
            "volumeMounts": [{"name": "runs", "mountPath": str(names.VOLUME)}],
        }
        limits: JsonObject = {"activeDeadlineSeconds": _FILES_SECONDS, "terminationGracePeriodSeconds": 0}
        return _object("v1", "Pod", name, self._pod(container) | limits)

    def _job(self, spec: JobSpec, task: NodeTask) -> JsonObject:
        pod = self._pod(self._container(spec, task), shares_memory=True) | {"subdomain": spec.name}
        job: JsonObject = {
            "completionMode": "Indexed",
            "completions": task.machines,
            "parallelism": task.machines,
            "backoffLimit": _RETRIES * task.machines,
            "activeDeadlineSeconds": max(1, round(3600 * spec.hours)),
            "ttlSecondsAfterFinished": _KEPT_SECONDS,
            "podFailurePolicy": {
                "rules": [
                    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                    {
                        "action": "FailJob",
                        "onPodConditions": [],  # some versions of the schema require it
                        "onExitCodes": {"containerName": "run", "operator": "In", "values": final_codes()},
                    },
                ]
            },
            "template": {"metadata": {"labels": {"app.kubernetes.io/name": "kolotune"}}, "spec": pod},
        }
        return _object("batch/v1", "Job", spec.name, job)

    def _container(self, spec: JobSpec, task: NodeTask) -> JsonObject:
        resources: dict[str, str] = {}
        if spec.cpus:
            resources["cpu"] = str(spec.cpus)
        if spec.memory_gb:
            resources["memory"] = f"{round(1024 * spec.memory_gb)}Mi"
        if spec.gpus:
            resources[GPUS[self.gpu_kind]] = str(spec.gpus)
        env: list[JsonObject] = [
            _pod_field("KOLOTUNE_MACHINE", f"metadata.annotations['{INDEX_ANNOTATION}']"),
            _pod_field("KOLOTUNE_JOB", "metadata.labels['batch.kubernetes.io/controller-uid']"),
        ]
        if self.token_secret:
            name, _, key = self.token_secret.partition("/")
            env.append({"name": HUB_TOKEN, "valueFrom": {"secretKeyRef": {"name": name, "key": key}}})
        return {
            "name": "run",
            "image": self.image,
            # The script is always the same; the arguments follow as separate words, which the shell does not parse.
            "command": ["/bin/sh", "-c", f'{LINK_TOOLCHAIN} "$@"', "run"],
            "args": [names.PYTHON, "-P", "-m", MODULE, "run", *task.arguments("$(KOLOTUNE_MACHINE)")],
            "env": env,
            "resources": {"requests": dict(resources), "limits": resources} if resources else {},
            "securityContext": _LOCKED_CONTAINER,
            "volumeMounts": [
                {"name": "runs", "mountPath": str(names.VOLUME)},
                {"name": "shared-memory", "mountPath": "/dev/shm"},
            ],
        }

    def _pod(self, container: JsonObject, *, shares_memory: bool = False) -> JsonObject:
        volumes: list[JsonObject] = [{"name": "runs", "persistentVolumeClaim": {"claimName": self.claim}}]
        if shares_memory:  # processes of one machine exchange more than the 64 MB that a container has by default
            volumes.append({"name": "shared-memory", "emptyDir": {"medium": "Memory"}})
        return {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": names.USER,
                "runAsGroup": names.USER,
                "fsGroup": names.USER,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [container],
            "volumes": volumes,
        }


def _object(version: str, kind: str, name: str, spec: JsonObject) -> JsonObject:
    labels = {"app.kubernetes.io/name": "kolotune", "app.kubernetes.io/instance": name}
    return {"apiVersion": version, "kind": kind, "metadata": {"name": name, "labels": labels}, "spec": spec}


def _pod_field(name: str, path: str) -> JsonObject:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}
