"""Kubernetes, through kubectl, with its contexts and logins: an indexed Job, a headless Service where its pods meet.

A volume claim holds what a run needs and makes. It is mounted where the container's image has its volume, so that a pod
of that image finds all as a container does; a small pod of its own takes files there and back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, ClassVar, TypeVar

from kolotune.foundation import errors
from kolotune.foundation.errors import ConfigError, LaunchError, RunFolderError
from kolotune.foundation.reporter import Reporter
from kolotune.foundation.secrets import HUB_TOKEN
from kolotune.run_folder.layout import RunFolder
from kolotune.runners import local
from kolotune.runners.container import names
from kolotune.runners.container.paths import Paths
from kolotune.runners.container.transfer import bring_out
from kolotune.version import VERSION

from .launcher import LATER, MEETING_PORT, Launched, Order, Plan, Quiet, as_typed, last_line, paths_of
from .node import MODULE, Node
from .output import Listener
from .remote import Execute, Place, Rehearsal, arrived, really, sent_config

T = TypeVar("T")
FILES_SUFFIX = "-files"
GPUS = {"nvidia": "nvidia.com/gpu", "amd": "amd.com/gpu"}
_LABEL = re.compile(r"[a-z0-9]([a-z0-9.-]{0,250}[a-z0-9])?")
_IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]*")
_KEY = re.compile(r"[A-Za-z0-9._-]+")
_INDEX = "batch.kubernetes.io/job-completion-index"
_RETRIES = 6  # of a machine, when it was lost or training stopped
_KEPT_SECONDS = 7 * 86_400  # a finished job's pods, with their logs
_READY_SECONDS = 600
_FILES_SECONDS = 86_400
_LOOK_SECONDS = 5.0
_TRIES = 12
_GOING_ON = "going on"
_WITH_A_LOG = ("Running", "Succeeded", "Failed")
# The converter that the image brings stands in the volume, as the image's own command has it (Dockerfile).
LINK_TOOLCHAIN = (
    "mkdir -p /runs/.cache/toolchain && ln -sfn /opt/kolotune/cache/toolchain/* /runs/.cache/toolchain/ && exec"
)
# Another try can change how these end; for all others it is the same again.
_WORTH_A_TRY = (errors.TrainingError, errors.OfflineError, errors.Interrupted)


def hopeless_codes() -> list[int]:
    """The exit codes after which a machine need not try again."""
    found, waiting = set(), list(errors.KolotuneError.__subclasses__())
    while waiting:
        each = waiting.pop()
        waiting += each.__subclasses__()
        if each not in _WORTH_A_TRY:
            found.add(each.exit_code)
    return sorted(found)


@dataclass(frozen=True)
class Kubernetes:
    """A namespace of a cluster.

    Attributes:
        image: of the container; `kolotune container build` makes one, to be pushed where the cluster finds it.
        claim: an existing claim of a volume; several machines need one that many can write.
        namespace, context: None: as kubectl has it.
        token_secret: NAME/KEY of an existing secret with the hub's token; None: the job has none.
        gpu_kind: whose GPUs are asked for.
    """

    image: str
    claim: str
    namespace: str | None = None
    context: str | None = None
    token_secret: str | None = None
    gpu_kind: str = "nvidia"

    NAME: ClassVar[str] = "kubernetes"

    def plan(self, order: Order) -> Plan:
        """See `contract.Launcher`."""
        import yaml

        about = json.dumps({"version": VERSION, "root": str(names.VOLUME)})
        rehearsal = Rehearsal({"have": b"[false]", "get": b"", "about": about.encode()})
        config, text = self._launch(order, Quiet(), Paths(), rehearsal)
        node = self._node(order, config, names.VOLUME / order.name)
        steps = [*rehearsal.steps, *[f"(the first pod:) {as_typed(argv)}" for argv in node.commands(0)]]
        if node.machines > 1:
            others = [as_typed(argv).replace("/1 ", "/K ") for argv in node.commands(1)]
            steps += [f"(each other pod, K is its number:) {each}" for each in others]
        job = yaml.safe_dump_all(self.manifest(order, config), sort_keys=False)
        pod = yaml.safe_dump(self.files_pod(order.name), sort_keys=False)
        files = f"{order.name}{FILES_SUFFIX}.yaml"
        return Plan(tuple(steps), ((files, pod), (str(config), text), (f"{order.name}.yaml", job)))

    def submit(self, order: Order, reporter: Reporter) -> Launched:
        """See `contract.Launcher`."""
        paths = Paths()
        self._launch(order, reporter, paths, really)
        reporter.success(f"submitted: job {order.name}")
        run = str(names.VOLUME / order.name)
        return Launched(self.NAME, dataclasses.asdict(self), order.name, order.config.nnodes, run, paths.pairs)

    def _launch(self, order: Order, reporter: Reporter, paths: Paths, execute: Execute) -> tuple[PurePosixPath, str]:
        """Puts what the run needs on the volume, and makes the job; returns the file of options there, and its text."""
        self._check(order)
        self._make_way(order.name, execute)
        run = names.VOLUME / order.name
        reporter.doing(f"sending what the run needs to the claim {self.claim}")
        with self._files(order.name, execute) as place:
            place = arrived(place)
            sent = sent_config(order.config, place, run, paths, reporter, in_place=order.in_place)
        paths.add(run, order.config.output_dir)
        self._create(self.manifest(order, sent[0]), f"{order.name}.yaml", execute)
        return sent

    def follow(self, launched: Launched, reporter: Reporter) -> int:
        """See `contract.Launcher`."""
        listener, told = Listener(reporter, paths_of(launched)), ""
        heard: dict[str, int] = {}
        try:
            while True:
                state, pods = _patiently(lambda: (self._job_state(launched.job), self._pods(launched.job)))
                first = _newest(pods, 0)
                name = first["metadata"]["name"] if first else ""
                if first and first["status"].get("phase") in _WITH_A_LOG:
                    if name not in heard:  # a new try
                        listener.code = None
                    heard[name] = self._listen(name, listener, heard.get(name, 0))
                if listener.code == 0:
                    return 0
                if state != _GOING_ON:
                    return self._end(launched, listener, state, pods)
                waiting = _waits_for(first)
                if waiting and waiting != told:
                    reporter.note(f"job {launched.job}: {waiting}")
                    told = waiting
                time.sleep(_LOOK_SECONDS)
        finally:
            listener.close()

    def _end(self, launched: Launched, listener: Listener, state: str, pods: Sequence[dict[str, Any]]) -> int:
        """How a job ended that did not end well.

        Raises:
            LaunchError: the first machine's run was not what failed.
        """
        if listener.code not in (None, errors.Interrupted.exit_code):
            return int(listener.code or 0)
        for number in range(1, launched.machines):
            pod = _newest(pods, number)
            if pod and pod["status"].get("phase") in _WITH_A_LOG:
                other = Listener(None, paths_of(launched))
                self._listen(pod["metadata"]["name"], other, 0)
                if other.cause:
                    raise LaunchError(f"machine {number}: {other.cause}", f"kubectl logs {pod['metadata']['name']}")
        if listener.code is not None:
            return listener.code
        said = self._why(launched.job) or listener.last_words() or "it said nothing"
        raise LaunchError(f"job {launched.job} is {'over' if state else 'gone'}, and the run is not: {said}")

    def fetch(self, launched: Launched, folder: RunFolder, reporter: Reporter) -> list[str]:
        """See `contract.Launcher`."""
        with self._files(launched.job) as place:
            return bring_out(place, PurePosixPath(launched.run), folder, paths_of(launched))

    def cancel(self, launched: Launched, reporter: Reporter) -> None:
        """See `contract.Launcher`."""
        self._delete(launched.job)

    def manifest(self, order: Order, config: PurePosixPath) -> list[dict[str, Any]]:
        """The job, after the service by which its pods find each other."""
        node = self._node(order, config, names.VOLUME / order.name)
        found = [self._job(order, node)]
        if node.machines > 1:
            service = {
                "clusterIP": "None",
                "selector": {"job-name": order.name},
                "publishNotReadyAddresses": True,  # they meet before they are ready
                "ports": [{"name": "meeting", "port": MEETING_PORT}],
            }
            found.insert(0, {"apiVersion": "v1", "kind": "Service", "metadata": _called(order.name), "spec": service})
        return found

    def files_pod(self, name: str) -> dict[str, Any]:
        """A pod that only has the volume, for files to go there and back."""
        container = {
            "name": "files",
            "image": self.image,
            "command": ["sleep", str(_FILES_SECONDS)],
            "securityContext": _LOCKED_CONTAINER,
            "volumeMounts": [{"name": "runs", "mountPath": str(names.VOLUME)}],
        }
        spec = self._pod(container) | {"activeDeadlineSeconds": _FILES_SECONDS, "terminationGracePeriodSeconds": 0}
        return {"apiVersion": "v1", "kind": "Pod", "metadata": _called(f"{name}{FILES_SUFFIX}"), "spec": spec}

    def _job(self, order: Order, node: Node) -> dict[str, Any]:
        pod = self._pod(self._container(order, node)) | {"subdomain": order.name}
        template = {"metadata": {"labels": {"app.kubernetes.io/name": "kolotune"}}, "spec": pod}
        spec = {
            "completionMode": "Indexed",
            "completions": node.machines,
            "parallelism": node.machines,
            "backoffLimit": _RETRIES * node.machines,
            "activeDeadlineSeconds": max(1, round(3600 * order.hours)),
            "ttlSecondsAfterFinished": _KEPT_SECONDS,
            "podFailurePolicy": {
                "rules": [
                    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                    {
                        "action": "FailJob",
                        "onPodConditions": [],  # the schemas of some versions want it
                        "onExitCodes": {"containerName": "run", "operator": "In", "values": hopeless_codes()},
                    },
                ]
            },
            "template": template,
        }
        return {"apiVersion": "batch/v1", "kind": "Job", "metadata": _called(order.name), "spec": spec}

    def _container(self, order: Order, node: Node) -> dict[str, Any]:
        asked: dict[str, str] = {}
        if order.cpus:
            asked["cpu"] = str(order.cpus)
        if order.memory_gb:
            asked["memory"] = f"{round(1024 * order.memory_gb)}Mi"
        if order.gpus:
            asked[GPUS[self.gpu_kind]] = str(order.gpus)
        env: list[dict[str, Any]] = [
            _from_pod("KOLOTUNE_MACHINE", f"metadata.annotations['{_INDEX}']"),
            _from_pod("KOLOTUNE_JOB", "metadata.labels['batch.kubernetes.io/controller-uid']"),
        ]
        if self.token_secret:
            name, _, key = self.token_secret.partition("/")
            env.append({"name": HUB_TOKEN, "valueFrom": {"secretKeyRef": {"name": name, "key": key}}})
        argv = self._place("").module(MODULE, "run", *node.arguments("$(KOLOTUNE_MACHINE)"))
        return {
            "name": "run",
            "image": self.image,
            # The script is the same for all; what differs are words after it, which no shell reads.
            "command": ["/bin/sh", "-c", f'{LINK_TOOLCHAIN} "$@"', "run"],
            "args": argv,
            "env": env,
            "resources": {"requests": dict(asked), "limits": asked} if asked else {},
            "securityContext": _LOCKED_CONTAINER,
            "volumeMounts": [
                {"name": "runs", "mountPath": str(names.VOLUME)},
                {"name": "shared-memory", "mountPath": "/dev/shm"},
            ],
        }

    def _pod(self, container: dict[str, Any]) -> dict[str, Any]:
        mounts = {each["name"] for each in container["volumeMounts"]}
        volumes: list[dict[str, Any]] = [{"name": "runs", "persistentVolumeClaim": {"claimName": self.claim}}]
        if "shared-memory" in mounts:  # processes of one machine exchange more than the 64 MB of a container's own
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

    def _node(self, order: Order, config: PurePosixPath, run: PurePosixPath) -> Node:
        machines = order.config.nnodes
        return Node(
            config=str(config),
            run=str(run),
            machines=machines,
            rdzv=f"{order.name}-0.{order.name}:{MEETING_PORT}" if machines > 1 else "",
            job="$(KOLOTUNE_JOB)",
            token_file=order.token_file or "",
            python=names.PYTHON,
            only_train=order.only_train,
        )

    def _check(self, order: Order) -> None:
        for option, value, rule in (
            ("image", self.image, _IMAGE),
            ("claim", self.claim, _LABEL),
            ("namespace", self.namespace, _LABEL),
        ):
            if value is not None and not rule.fullmatch(value):
                raise ConfigError(f"{option}: {value!r} is no name that Kubernetes takes", "As `kubectl get` shows it.")
        name, _, key = (self.token_secret or "a/b").partition("/")
        if not (_LABEL.fullmatch(name) and _KEY.fullmatch(key)):
            # Not repeated: it may be the token itself.
            raise ConfigError("token-secret: takes NAME/KEY of a secret in the cluster, never the token itself")
        if self.gpu_kind not in GPUS:
            raise ConfigError(f"gpu-kind: {self.gpu_kind!r} is none of {', '.join(GPUS)}")
        if order.config.rdzv not in (None, LATER):
            raise ConfigError("rdzv: the pods meet at the first one", "Leave rdzv out.")

    def _argv(self, *arguments: str) -> list[str]:
        chosen = [f"--context={self.context}"] if self.context else []
        chosen += [f"--namespace={self.namespace}"] if self.namespace else []
        return ["kubectl", *chosen, *arguments]

    def _place(self, pod: str, execute: Execute = really) -> Place:
        def reach(argv: Sequence[str]) -> list[str]:
            return self._argv("exec", "--stdin", f"pod/{pod}", "--", *argv)

        return Place(pod, reach, names.PYTHON, names.VOLUME, execute)

    def _told(self, *arguments: str, typed: Iterable[bytes] = (), what: str = "", execute: Execute = really) -> bytes:
        try:
            return b"".join(execute(self._argv(*arguments), typed, what))
        except local.ProgramError as error:
            raise LaunchError(f"kubectl {arguments[0]}: {last_line(error.stderr)}") from None
        except OSError:
            raise LaunchError(
                "kubernetes: there is no kubectl on this machine", "Install it, and let it reach the cluster."
            ) from None

    def _create(self, objects: Sequence[dict[str, Any]], what: str, execute: Execute) -> None:
        whole = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
        self._told("create", "--filename=-", typed=[json.dumps(whole).encode()], what=what, execute=execute)

    def _delete(self, name: str) -> None:
        self._told("delete", f"job/{name}", f"service/{name}", "--ignore-not-found")

    def _make_way(self, name: str, execute: Execute) -> None:
        """An old job of the same name goes when it is over."""
        state = self._job_state(name, execute)
        if state == _GOING_ON:
            raise RunFolderError(
                f"job {name}: is at work", "kolotune follow RUN shows it, kolotune cancel RUN stops it."
            )
        if state:
            self._delete(name)

    @contextlib.contextmanager
    def _files(self, name: str, execute: Execute = really) -> Iterator[Place]:
        """The volume, by a pod that is there for the time of the block."""
        pod = f"{name}{FILES_SUFFIX}"
        self._told("delete", f"pod/{pod}", "--ignore-not-found", execute=execute)
        self._create([self.files_pod(name)], f"{pod}.yaml", execute)
        try:
            self._told("wait", "--for=condition=Ready", f"--timeout={_READY_SECONDS}s", f"pod/{pod}", execute=execute)
            yield self._place(pod, execute)
        finally:
            with contextlib.suppress(LaunchError):
                self._told("delete", f"pod/{pod}", "--wait=false", execute=execute)

    def _job_state(self, name: str, execute: Execute = really) -> str:
        """The state of a job: Complete, Failed, going on; empty when there is none."""
        text = self._told("get", f"job/{name}", "--ignore-not-found", "--output=json", execute=execute)
        if not text.strip():
            return ""
        for each in json.loads(text).get("status", {}).get("conditions") or ():
            if each.get("type") in ("Complete", "Failed") and each.get("status") == "True":
                return str(each["type"])
        return _GOING_ON

    def _why(self, name: str) -> str:
        """What the cluster says about a job's failure."""
        with contextlib.suppress(LaunchError, ValueError):
            loaded = json.loads(self._told("get", f"job/{name}", "--output=json"))
            for each in loaded.get("status", {}).get("conditions") or ():
                if each.get("type") == "Failed":
                    return f"{each.get('reason', '')}: {each.get('message', '')}"
        return ""

    def _pods(self, name: str) -> list[dict[str, Any]]:
        """The pods of a job, also those that were lost."""
        loaded = json.loads(self._told("get", "pods", f"--selector=job-name={name}", "--output=json"))
        return list(loaded["items"])

    def _listen(self, pod: str, listener: Listener, heard: int) -> int:
        """Tells a pod's log as it comes, without the bytes that were heard before; returns how many there are."""
        count = 0
        with contextlib.suppress(local.ProgramError):  # the connection broke, or the log is not there yet: once more
            for piece in local.stream(self._argv("logs", "--follow", "--container=run", f"pod/{pod}")):
                new = piece[max(0, heard - count) :]
                count += len(piece)
                if new:
                    listener.feed(new)
        return max(count, heard)


_LOCKED_CONTAINER = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def _newest(pods: Sequence[dict[str, Any]], number: int) -> dict[str, Any] | None:
    """The last pod of machine `number`; None when it has none."""
    found = [each for each in pods if each["metadata"].get("annotations", {}).get(_INDEX) == str(number)]
    return max(found, key=lambda each: str(each["metadata"].get("creationTimestamp", "")), default=None)


def _patiently(look: Callable[[], T]) -> T:
    """What `look` finds; a cluster that does not answer is asked some times."""
    for _ in range(_TRIES):
        with contextlib.suppress(LaunchError):
            return look()
        time.sleep(_LOOK_SECONDS)
    return look()


def _called(name: str) -> dict[str, Any]:
    return {"name": name, "labels": {"app.kubernetes.io/name": "kolotune", "app.kubernetes.io/instance": name}}


def _from_pod(name: str, path: str) -> dict[str, Any]:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def _waits_for(pod: dict[str, Any] | None) -> str:
    """Why a pod does not run yet; "" when it does."""
    if pod is None:
        return "waits for its pods"
    status = pod.get("status", {})
    for each in status.get("containerStatuses") or ():
        if waiting := each.get("state", {}).get("waiting"):
            return f"{waiting.get('reason', 'waiting')} {waiting.get('message', '')}".strip()
    for each in status.get("conditions") or ():
        if each.get("type") == "PodScheduled" and each.get("status") == "False":
            return f"{each.get('reason', 'waiting')} {each.get('message', '')}".strip()
    return ""
